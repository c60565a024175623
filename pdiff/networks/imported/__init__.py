"""Networks that were trained elsewhere: one file for each format of a population's files.

Imports `errors`, `files`, `method` and, of this package, `patterns`. Formats are detected and listed without torch,
which is imported where tensors are read (`plain`, `template`).
"""

FORMATS: dict[str, str] = {
    "lora": "pdiff.networks.imported.lora",
    "hugging_face": "pdiff.networks.imported.hugging_face",
    "ray_tune": "pdiff.networks.imported.ray_tune",
    "small_cnn_zoo": "pdiff.networks.imported.small_cnn_zoo",
    "plain": "pdiff.networks.imported.files",
}
"""Format -> its module; `auto` takes the first one that detects it.

A module has two functions: `detects(folder) -> bool`, and `checkpoints(folder)`, which yields a `zoo.Checkpoint` for
each checkpoint, in order, or raises a UserError. Neither reads a tensor.
"""
