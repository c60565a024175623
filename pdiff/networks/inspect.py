"""A look at a folder of somebody's checkpoint files: their layout, what is constant, which files are suspicious.

Every file is read once, in parallel, and remembered as digests and a sketch of a few kilobytes: folders may be larger
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

from pdiff.errors import UserError
from pdiff.method.collection import StateDict, is_generated, not_finite
from pdiff.networks.imported.plain import Template, files_of, in_threads

SKETCH = 64  # numbers that a tensor is sketched by; distances are then right to about a tenth
BLOCK = 1 << 16  # numbers that are sketched at a time: what stays in a cache, and leaves no holes in the memory
OUTLYING = 3.5  # modified z-score from which a value counts as an outlier (Iglewicz and Hoaglin, 1993)
FAR = 3.0  # ... and how many times as far as usual it must be, see `_outliers`

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, eq=False)
class Look:
    """What is remembered of one file.

    Attributes:
        path: the file.
        trouble: why it cannot be used; empty where it can.
        layout: name -> shape and type.
        digests: name -> fingerprint of the values.
        sketch: name -> float64 (SKETCH,) or fewer, and the standard deviation of the tensor; of what is generated.
    """

    path: Path
    trouble: str = ""
    layout: Layout = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)
    sketch: dict[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """What a folder of checkpoint files holds.

    Attributes:
        folder: where they lie.
        used: files that can be used, in the order of their names.
        unusable: name of a file -> why it cannot be used.
        reported: name of a file that can be used -> what is remarkable about it.
        layout: of the used files: name -> shape and type.
        roles: name of a tensor -> "generated", "constant" over the used files, "integer" or "single" (not generated).
    """

    folder: Path
    used: tuple[Path, ...]
    unusable: dict[str, str]
    reported: dict[str, str]
    layout: Layout
    roles: dict[str, str]

    def count(self, role: str = "generated") -> int:
        """Numbers in all tensors of a role."""
        return sum(torch.Size(self.layout[name][0]).numel() for name, own in self.roles.items() if own == role)


def survey(folder: Path) -> Survey:
    """Look at every checkpoint file of a folder.

    Raises:
        UserError: no folder, fewer than two files that can be used, or nothing in them that varies.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoints: {folder} is not a folder")
    looks = list(in_threads(_look, files_of(folder), "look"))
    sound = [look for look in looks if not look.trouble]
    if len(sound) < 2:
        why = next((f"; {look.path.name} {look.trouble}" for look in looks if look.trouble), "")
        raise UserError(f"--checkpoints: {folder} holds {len(sound)} usable checkpoint files, expected at least 2{why}")
    common = Counter(frozenset(look.layout.items()) for look in sound).most_common(1)[0][0]
    used = [look for look in sound if look.layout.items() == common]
    unusable = {look.path.name: look.trouble or _difference(look.layout, used[0]) for look in looks if look not in used}
    if len(used) < 2:
        raise UserError(
            f"--checkpoints: no two files in {folder} have the same layout; {next(iter(unusable.values()))}"
        )
    roles = _roles(used)
    if "generated" not in roles.values():
        raise UserError(f"--checkpoints: the {len(used)} files in {folder} are all the same: nothing to generate")
    reported = {**_outliers(used, roles), **_duplicates(used)}
    return Survey(folder, tuple(look.path for look in used), unusable, reported, used[0].layout, roles)


def _look(path: Path) -> Look:
    """Read one file."""
    try:
        if not path.stat().st_size:
            return Look(path, "is empty")
        state = Template.read(path).state
    except OSError as error:
        return Look(path, f"cannot be read: {error.strerror}")
    except UserError as error:
        return Look(path, str(error).removeprefix(f"{path}: "))
    if name := not_finite(state):
        return Look(path, f"{name} holds NaN or infinity")
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    return Look(path, "", layout, {name: _digest(tensor) for name, tensor in state.items()}, _sketch(state))


def _digest(tensor: Tensor) -> bytes:
    """A fingerprint of the values of a tensor."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).digest()[:16]


def _sketch(state: StateDict) -> dict[str, tuple[Tensor, float]]:
    """A few numbers per generated tensor, whose differences are about as long as those of the tensors themselves.

    A count sketch (Charikar, Chen and Farach-Colton, 2002): numbers get random signs and are added up in SKETCH
    buckets, so that the expected square of the sketch's length is that of the tensor.
    """
    sketches = {}
    for name, tensor in state.items():
        if is_generated(name, tensor):
            flat = tensor.flatten()
            buckets = min(len(flat), SKETCH)
            total = torch.zeros(buckets, dtype=torch.float64)
            for part, signs in zip(flat.split(BLOCK), _signs(len(flat)).split(BLOCK), strict=True):
                signed = torch.nn.functional.pad(part.float() * signs, (0, -len(part) % buckets))
                total += signed.view(-1, buckets).sum(dim=0, dtype=torch.float64)
            sketches[name] = total, flat.float().std().item()
    return sketches


@lru_cache(maxsize=1024)
def _signs(count: int) -> Tensor:
    """Random signs, int8 (count,)."""
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int8) * 2 - 1


def _difference(layout: Layout, usual: Look) -> str:
    """How a layout differs from the one that most files have."""
    expected = usual.layout
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


def _roles(looks: Sequence[Look]) -> dict[str, str]:
    """Name -> role, see `Survey`."""
    roles = {}
    for name, (shape, dtype) in looks[0].layout.items():
        if not dtype.is_floating_point:
            roles[name] = "integer"
        elif not is_generated(name, torch.empty(shape, dtype=dtype, device="meta")):
            roles[name] = "single"
        else:
            roles[name] = "generated" if len({look.digests[name] for look in looks}) > 1 else "constant"
    return roles


def _duplicates(looks: Sequence[Look]) -> dict[str, str]:
    """Files whose tensors are all those of an earlier file."""
    seen: dict[frozenset, str] = {}
    found = {}
    for look in looks:
        first = seen.setdefault(frozenset(look.digests.items()), look.path.name)
        if first != look.path.name:
            found[look.path.name] = f"duplicate of {first}"
    return found


def _outliers(looks: Sequence[Look], roles: Mapping[str, str]) -> dict[str, str]:
    """Files that lie far from all others in weight space.

    A file's distance is that of its sketch from the median of all sketches, tensor by tensor in units of the tensor's
    standard deviation, so that no tensor hides the others. Medians, since a mean follows the outliers it should find.
    Far is a distance of a modified z-score 0.6745 (d - median) / MAD over 3.5, the usual robust rule, which for
    networks is not enough: in many dimensions independent distances are nearly equal, and their MAD is nearly 0. So
    it must also be over 3 times the median distance. Of checkpoints spread evenly over a straight path none is over
    twice as far as the median, of a random walk about 1.5 times: what is found has left the path.
    """
    squares = torch.zeros(len(looks), dtype=torch.float64)
    for name in (name for name, role in roles.items() if role == "generated"):
        rows = torch.stack([look.sketch[name][0] for look in looks])
        scale = torch.tensor([look.sketch[name][1] for look in looks], dtype=torch.float64).median()
        squares += ((rows - rows.median(dim=0).values) / (scale or 1.0)).square().sum(dim=1)
    distances = squares.sqrt()
    usual = distances.median()
    deviation = (distances - usual).abs().median()
    far = (0.6745 * (distances - usual) > OUTLYING * deviation) & (distances > FAR * usual) & (usual > 0)
    ratios = (distances / usual).tolist()
    return {
        look.path.name: f"outlier: {ratio:.1f} times as far from the median of all files as usual"
        for look, ratio, is_far in zip(looks, ratios, far.tolist(), strict=True)
        if is_far
    }
