"""Experiments: their configuration in YAML, its schema and digests; the stages, each mapping folders to a folder; reports.

May import networks, method and the ground floor. What answers without tensors (config, stages, metrics) imports no torch.
"""
