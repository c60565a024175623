"""MLflow: finished runs are found and reused, new ones recorded; models; queries. The only package that imports mlflow.

The engine knows its store by a protocol alone. Imports: mlflow, and pdiff's experiment and what stands below it.
"""
