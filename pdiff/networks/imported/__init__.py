"""Networks that were trained elsewhere: one file for each format of a population's files.

Imports `errors`, `files`, `method` and, of this package, `patterns`; `files` here does not import torch.
"""
