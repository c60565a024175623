"""Experiments: configuration in YAML, schema, digests; the stages, each mapping folders to a folder; metrics, reports.

May import networks, method and the ground floor. What answers without tensors (config, stages, metrics) needs no torch.
"""
