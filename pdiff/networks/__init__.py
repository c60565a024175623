"""Networks and their data: architectures, data sets, populations of checkpoints, predictions and evaluators.

Imports `errors`, `files`, `seeds`, `parallel` and `method`; torchvision and timm are imported here only.
The registries (`architectures`, `datasets`, `evaluators`) and what a configuration needs are imported without torch.
"""
