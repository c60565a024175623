"""Networks of a collection as ordinary files of state dicts."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.files import write_state, write_tensors
from pdiff.method.collection import Collection
from pdiff.networks.imported.template import Template


def export(
    collection: Collection,
    base: str,
    out: Path,
    *,
    form: str,
    index: list[int] | None = None,
    template: Template | None = None,
) -> list[Path]:
    """Write networks of a collection as state dicts, one file each: all of them or, after an error, none.

    Args:
        collection: what to write.
        base: beginning of the file names, such as `generated`.
        out: folder to write to.
        form: "pth" or "safetensors"; or "source", as `template` is.
        index: which networks; all when absent.
        template: a file, or folder, of the networks that the collection was made from.

    Returns:
        The files.

    Raises:
        UserError: an index outside of the collection or given twice, a file that exists, or no folder.
        OSError: the folder cannot be written to.
    """
    chosen = range(len(collection)) if index is None else index
    for k, times in Counter(chosen).items():
        if not 0 <= k < len(collection):
            raise UserError(f"--index {k}: not in 0 .. {len(collection) - 1}")
        if times > 1:
            raise UserError(f"--index {k}: given {times} times, expected each network once")
    suffix = template.suffix if template else f".{form}"
    paths = [out / f"{base}_{k:05d}{suffix}" for k in chosen]
    if there := next((path for path in paths if os.path.lexists(path)), None):
        raise UserError(f"--out {out}: {there.name} exists, expected a folder without files of these names")
    parent = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file, expected a folder")
    try:
        with TemporaryDirectory(dir=parent, prefix=".export-") as scratch:
            for k, path in zip(tqdm(chosen, desc="export", unit="file", disable=None), paths, strict=True):
                state = {name: tensor.clone() for name, tensor in collection[k].items()}
                if template:
                    template.write(Path(scratch, path.name), state)
                else:
                    (write_tensors if form == "safetensors" else write_state)(Path(scratch, path.name), state)
            out.mkdir(parents=True, exist_ok=True)
            for path in paths:
                os.rename(Path(scratch, path.name), path)
    except OSError as error:  # no permission, a full disk
        raise OSError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return paths
