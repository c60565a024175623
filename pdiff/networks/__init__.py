"""Networks and their data: architectures, data sets, populations of checkpoints, predictions and evaluators.

Imports `errors`, `files`, `seeds`, `parallel` and `method`; torchvision and timm are imported here only.
`options`, `patterns`, `user_code`, `evaluators` and `imported.files` do not import torch.
"""
