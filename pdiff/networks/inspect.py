"""Inspection of a folder of checkpoint files: their layout, which tensors are constant, which files are suspicious.

Every file is read once, in parallel, and reduced to digests and a sketch of a few kilobytes, so folders may be larger
than memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pdiff.errors import UserError, printable
from pdiff.method.collection import StateDict, is_generated, not_finite
from pdiff.networks.imported.plain import check_varying, in_threads
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.imported.zoo import Checkpoint, format_of, listed

SKETCH = 64  # numbers in the sketch of a tensor; distances are then accurate to about a tenth
BLOCK = 1 << 16  # numbers that are sketched at a time: they fit in a cache, and do not fragment the memory
OUTLYING = 3.5  # modified z-score above which a value counts as an outlier (Iglewicz and Hoaglin, 1993)
FAR = 3.0  # an outlier must also be this many times as far as the median, see `_outliers`

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, eq=False)
class FileSummary:
    """What is kept of one file.

    Attributes:
        checkpoint: the file, or the checkpoint in a zoo.
        problem: why it cannot be used; empty where it can.
        layout: name -> shape and type.
        digests: name -> fingerprint of the values.
        sketch: name of a tensor that can be generated -> its sketch, float64 (SKETCH,) or fewer, and its standard
            deviation.
    """

    checkpoint: Checkpoint
    problem: str = ""
    layout: Layout = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    sketch: dict[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """What a folder of checkpoint files holds.

    Attributes:
        folder: of the files.
        format: of the folder, one of FORMATS.
        used: checkpoints that can be used, in their order.
        unusable: name of a file -> why it cannot be used.
        reported: name of a file that can be used -> why it is suspicious.
        layout: of the used files: name -> shape and type.
        roles: name of a tensor -> "generated", "constant" over the used files, "integer" or "single" (one number); only
            the first kind is generated.
    """

    folder: Path
    format: str
    used: tuple[Checkpoint, ...]
    unusable: dict[str, str]
    reported: dict[str, str]
    layout: Layout
    roles: dict[str, str]

    def count(self, role: str = "generated") -> int:
        """Numbers in all tensors of a role."""
        return sum(torch.Size(self.layout[name][0]).numel() for name in self.roles if self.roles[name] == role)


def inspect_folder(folder: Path, format: str = "auto", select: SourceSelect | None = None) -> Inspection:
    """Inspect every checkpoint of a folder.

    Args:
        folder: of plain files, or a zoo of another format.
        format: a name of FORMATS, or `auto`.
        select: which checkpoints of a zoo are inspected; all when absent.

    Raises:
        UserError: no folder, fewer than two files that can be used, or no tensor that varies.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoints: {folder} is not a folder")
    format = format_of(folder, format)
    files = list(in_threads(_summary, listed(folder, format, select=select), "inspect"))
    sound = [file for file in files if not file.problem]
    if len(sound) < 2:
        why = next((f"; {file.checkpoint.name} {file.problem}" for file in files if file.problem), "")
        raise UserError(f"--checkpoints: {folder} holds {len(sound)} usable checkpoint files, expected at least 2{why}")
    common = Counter(frozenset(file.layout.items()) for file in sound).most_common(1)[0][0]
    used = [file for file in sound if file.layout.items() == common]
    unusable = {f.checkpoint.name: f.problem or _difference(f.layout, used[0].layout) for f in files if f not in used}
    if len(used) < 2:
        raise UserError(
            f"--checkpoints: no two files in {folder} have the same layout; {next(iter(unusable.values()))}"
        )
    first = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in used[0].layout.items()}
    varying = {name for name in first if len({file.digests[name] for file in used}) > 1}
    check_varying(varying, first, f"--checkpoints: the {len(used)} files in {folder}")
    roles = {name: _role(name, tensor, varies=name in varying) for name, tensor in first.items()}
    reported = {**_outliers(used, roles), **_duplicates(used)}
    return Inspection(
        folder, format, tuple(file.checkpoint for file in used), unusable, reported, used[0].layout, roles
    )


def _summary(checkpoint: Checkpoint) -> FileSummary:
    """Read one checkpoint."""
    path = checkpoint.files[0]
    try:
        if not path.stat().st_size and path.is_file():
            return FileSummary(checkpoint, "is empty")
        state = checkpoint.read().state
    except OSError as error:
        return FileSummary(checkpoint, f"cannot be read: {error.strerror}")
    except UserError as error:
        return FileSummary(checkpoint, str(error).removeprefix(printable(f"{path}: ")))
    if name := not_finite(state):
        return FileSummary(checkpoint, f"{name} holds NaN or infinity")
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    digests = {name: _digest(tensor) for name, tensor in state.items()}
    return FileSummary(checkpoint, "", layout, digests, sketches(state))


def _digest(tensor: Tensor) -> bytes:
    """A fingerprint of the values of a tensor."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).digest()[:16]


def sketches(state: StateDict) -> dict[str, tuple[Tensor, float]]:
    """A sketch of every tensor that can be generated, and its standard deviation; sketches preserve distances.

    A count sketch (Charikar, Chen and Farach-Colton, 2002): numbers get random signs and are summed in SKETCH buckets,
    so that the expected squared norm of the sketch is that of the tensor.
    """
    found = {}
    for name, tensor in state.items():
        if is_generated(name, tensor):
            flat = tensor.flatten()
            buckets = min(len(flat), SKETCH)
            total = torch.zeros(buckets, dtype=torch.float64)
            for part, signs in zip(flat.split(BLOCK), _signs(len(flat)).split(BLOCK), strict=True):
                signed = torch.nn.functional.pad(part.float() * signs, (0, -len(part) % buckets))
                total += signed.view(-1, buckets).sum(dim=0, dtype=torch.float64)
            found[name] = total, flat.float().std().item()
    return found


@lru_cache(maxsize=1024)
def _signs(count: int) -> Tensor:
    """Random signs, int8 (count,)."""
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int8) * 2 - 1


def _difference(layout: Layout, expected: Layout) -> str:
    """How a layout differs from the one that most files have."""
    if missing := [name for name in expected if name not in layout]:
        return f"other layout than most files: has no {_some(missing)}"
    if more := [name for name in layout if name not in expected]:
        return f"other layout than most files: has {_some(more)}, too"
    shapes = [name for name in expected if layout[name][0] != expected[name][0]]
    if shapes:
        name = shapes[0]
        return f"other layout than most files: {name} is {layout[name][0]} instead of {expected[name][0]}"
    types = [name for name in expected if layout[name][1] != expected[name][1]]
    found, usually = (str(which[types[0]][1])[6:] for which in (layout, expected))
    return f"other types than most files: {found} instead of {usually} in {_some(types)}"


def _some(names: Sequence[str]) -> str:
    """The first names of several."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _role(name: str, tensor: Tensor, *, varies: bool) -> str:
    """The role of a tensor, see `Inspection`."""
    if not tensor.is_floating_point():
        return "integer"
    if not is_generated(name, tensor):
        return "single"
    return "generated" if varies else "constant"


def _duplicates(files: Sequence[FileSummary]) -> dict[str, str]:
    """Files with the same tensors as an earlier one."""
    seen: dict[frozenset, str] = {}
    found = {}
    for file in files:
        name = file.checkpoint.name
        first = seen.setdefault(frozenset(file.digests.items()), name)
        if first != name:
            found[name] = f"duplicate of {first}"
    return found


def _outliers(files: Sequence[FileSummary], roles: Mapping[str, str]) -> dict[str, str]:
    """Files that lie far from all others in weight space.

    The distance of a file is that of its sketch from the median of all sketches, each tensor in units of its standard
    deviation, so that none dominates. Medians are used because a mean follows the outliers. The usual robust rule is a
    modified z-score 0.6745 (d - median) / MAD above 3.5. It is not enough for networks: in many dimensions independent
    distances are nearly equal, and their MAD is nearly 0. So d must also be over 3 times the median distance. Of
    checkpoints spread evenly over a straight path none is over twice as far as the median, of a random walk about 1.5
    times: an outlier has left the path.
    """
    squares = torch.zeros(len(files), dtype=torch.float64)
    for name in (name for name, role in roles.items() if role == "generated"):
        rows = torch.stack([file.sketch[name][0] for file in files])
        scale = torch.tensor([file.sketch[name][1] for file in files], dtype=torch.float64).median()
        squares += ((rows - rows.median(dim=0).values) / (scale or 1.0)).square().sum(dim=1)
    distances = squares.sqrt()
    median = distances.median()
    deviation = (distances - median).abs().median()
    far = (0.6745 * (distances - median) > OUTLYING * deviation) & (distances > FAR * median) & (median > 0)
    ratios = (distances / median).tolist()
    return {
        file.checkpoint.name: f"outlier: {ratio:.1f} times as far from the median of all files as usual"
        for file, ratio, is_far in zip(files, ratios, far.tolist(), strict=True)
        if is_far
    }
