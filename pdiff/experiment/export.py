"""Networks of a collection as ordinary files of state dicts."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.files import write_state, write_tensors
from pdiff.method.collection import Collection


def export(collection: Collection, base: Path, out: Path, *, form: str, index: list[int] | None = None) -> list[Path]:
    """Write networks of a collection as state dicts, one file each.

    Args:
        collection: what to write.
        base: beginning of the file names, such as `generated`.
        out: folder to write to.
        form: "pth" or "safetensors".
        index: which networks; all when absent.

    Returns:
        The files.

    Raises:
        UserError: an index outside of the collection.
    """
    paths = []
    for k in tqdm(range(len(collection)) if index is None else index, desc="export", unit="file", disable=None):
        if not 0 <= k < len(collection):
            raise UserError(f"--index: {k} is not in 0 .. {len(collection) - 1}")
        path = out / f"{base}_{k:05d}.{form}"
        state = {name: tensor.clone() for name, tensor in collection[k].items()}
        if form == "safetensors":
            write_tensors(path, state)
        else:
            write_state(path, state)
        paths.append(path)
    return paths
