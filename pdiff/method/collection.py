"""`Collection`: N checkpoints of one layout, stacked; and which of their tensors are generated."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pdiff.errors import Damaged, UserError
from pdiff.files import new_tensors, read_json, read_tensors, scratch_tensors, write_json
from pdiff.method.vectors import blocks
from pdiff.parallel.ranks import rank_zero_only

StateDict = dict[str, Tensor]
HELDOUT_BLOCKS = 4  # runs of consecutive checkpoints that are held out, see `heldout_split`


class Collection:
    """N checkpoints of one layout, each tensor stacked along a first dimension.

    Tensors may be mapped to files: those of `load` are, and large ones of whatever makes a new collection here.

    Args:
        tensors: name -> (N, *shape), in state-dict order.
        names: what each checkpoint is called, N of them; numbered when absent.

    Raises:
        UserError: no checkpoints, or tensors that disagree about N.

    Example:
        >>> import torch
        >>> collection = Collection.stack([torch.nn.Linear(4, 2).state_dict() for _ in range(3)])
        >>> len(collection), list(collection[0]), collection.tensors["weight"].shape
        (3, ['weight', 'bias'], torch.Size([3, 2, 4]))
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Sequence[str] | None = None) -> None:
        self.tensors = dict(tensors)
        counts = {tensor.shape[0] if tensor.ndim else 0 for tensor in self.tensors.values()}
        if len(counts) != 1 or 0 in counts:
            raise UserError(f"a collection needs tensors of one count, at least 1, but got counts {sorted(counts)}")
        (self.count,) = counts
        self.names = list(names) if names is not None else [f"{k:05d}" for k in range(self.count)]
        if len(self.names) != self.count:
            raise UserError(f"a collection of {self.count} checkpoints needs as many names, but got {len(self.names)}")

    @classmethod
    def stack(cls, states: Sequence[StateDict], names: Sequence[str] | None = None) -> Collection:
        """Stack N state dicts of one layout, from any device; the collection is on the CPU.

        Raises:
            UserError: there are none, or they hold different tensors, or tensors of different shapes or types.

        Example:
            >>> network = torch.nn.Linear(4, 2)
            >>> collection = Collection.stack([network.state_dict(), network.state_dict()], names=["first", "again"])
            >>> network.load_state_dict(collection[1])
            <All keys matched successfully>
        """
        return cls(_joined(torch.stack, [_on_cpu(state, f"part {k}") for k, state in enumerate(states)]), names)

    @classmethod
    def from_folder(cls, folder: Path | str, *, parameters: Sequence[str] = ("all",)) -> Collection:
        """Read a folder of .pth, .pt or .safetensors files, one state dict each; nothing in a pickle is run.

        Args:
            folder: of the files; numbers in their names are sorted by value.
            parameters: names or patterns of the tensors to read.

        Raises:
            UserError: fewer than two files, or one that is damaged or of another layout; with file and tensor.

        Example:
            >>> for seed in range(3):
            ...     torch.save(torch.nn.Linear(4, 2).state_dict(), f"network_{seed}.pth")
            >>> Collection.from_folder(".").names
            ['network_0.pth', 'network_1.pth', 'network_2.pth']
        """
        from pdiff.networks.imported.plain import read_collection

        return read_collection(Path(folder), parameters, key="folder")

    def cpu(self) -> Collection:
        """The same checkpoints on the CPU."""
        return Collection({name: tensor.detach().cpu() for name, tensor in self.tensors.items()}, self.names)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> StateDict:
        """Checkpoint `index`, a state dict (views)."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __iter__(self) -> Iterator[StateDict]:
        return (self[index] for index in range(len(self)))

    def select(self, index: Tensor | slice | Sequence[int]) -> Collection:
        """The sub-collection of some checkpoints: views where they are given by a slice, else copies."""
        rows = torch.arange(self.count)[index]
        if isinstance(index, slice):
            tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        else:
            tensors = empty(self[0], len(rows))
            for name, out in tensors.items():
                torch.index_select(self.tensors[name].detach(), 0, rows.to(out.device), out=out)
        return Collection(tensors, [self.names[row] for row in rows.tolist()])

    def map(self, function: Callable[[Tensor], Tensor]) -> Collection:
        """Apply a function to each stacked tensor, (N, *shape) -> (M, *shape); the M checkpoints are numbered."""
        return Collection({name: function(tensor) for name, tensor in self.tensors.items()})

    @classmethod
    def concatenate(cls, parts: Sequence[Collection], names: Sequence[str] | None = None) -> Collection:
        """Several collections of one layout, one after the other; the checkpoints are numbered when `names` is absent.

        Raises:
            UserError: there are none, or they hold different tensors, or tensors of different shapes or types.
        """
        if len(parts) == 1:
            return cls(parts[0].tensors, names)
        return cls(_joined(torch.cat, [part.tensors for part in parts]), names)

    def varying(self) -> set[str]:
        """Names of the tensors in which the checkpoints differ."""
        return {name for name, rows in self.tensors.items() if any(not torch.equal(row, rows[0]) for row in rows)}

    def save(self, path: Path | str, rows: Tensor | None = None) -> None:
        """Write `path` (safetensors, each tensor (N, *shape)) and its index beside it (JSON).

        Args:
            path: of the file.
            rows: of the checkpoints to write, int64; all when absent. Nothing is copied before.

        Example:
            >>> collection = Collection({"weight": torch.randn(5, 2, 4)})
            >>> collection.save("networks.safetensors")
            >>> len(Collection.load("networks.safetensors"))
            5
        """
        if rows is None:
            return self.save_joined(path, [self], self.names)

        def fill(name: str, out: Tensor) -> None:
            torch.index_select(self.tensors[name].cpu(), 0, rows, out=out)

        return _write(Path(path), self[0], [self.names[row] for row in rows.tolist()], fill)

    @staticmethod
    def save_joined(path: Path | str, parts: Sequence[Collection], names: Sequence[str] | None = None) -> None:
        """Write several collections of one layout as one, as `save` does; numbered when `names` is absent."""
        counts = [len(part) for part in parts]
        names = [f"{k:05d}" for k in range(sum(counts))] if names is None else list(names)

        def fill(name: str, out: Tensor) -> None:
            for rows, part in zip(out.split(counts), parts, strict=True):
                rows.copy_(part.tensors[name])

        _write(Path(path), parts[0][0], names, fill)

    @classmethod
    def load(cls, path: Path | str) -> Collection:
        """Read what `save` wrote, checked against its index; its tensors are mapped to the file.

        Raises:
            Damaged: a missing or unreadable file, another layout than the index says, NaN or infinity.
        """
        path = Path(path)
        index, tensors = read_json(path.with_suffix(".json")), read_tensors(path)
        found = {n: {"shape": list(t.shape[1:]), "dtype": str(t.dtype)[6:]} for n, t in tensors.items()}
        if (
            not isinstance(index, dict)
            or found != index.get("layout")
            or not isinstance(index.get("checkpoints"), list)
        ):
            raise Damaged(path, f"its tensors are not those of its index {path.with_suffix('.json').name}")
        if name := not_finite(tensors):
            raise Damaged(path, f"tensor {name!r} holds NaN or infinity, expected finite numbers")
        return cls({name: tensors[name] for name in index["layout"]}, index["checkpoints"])


@rank_zero_only
def _write(path: Path, like: StateDict, names: Sequence[str], fill: Callable[[str, Tensor], object]) -> None:
    """Write a collection and its index.

    Args:
        path: of the collection.
        like: one checkpoint; its numbers do not matter.
        names: of the checkpoints.
        fill: puts the numbers of the tensor of a name into one of the file, (N, *shape).
    """
    with new_tensors(path, {n: tensor.expand(len(names), *tensor.shape) for n, tensor in like.items()}) as tensors:
        for name, tensor in tensors.items():
            fill(name, tensor)
    layout = {name: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for name, t in like.items()}
    write_json(path.with_suffix(".json"), {"count": len(names), "layout": layout, "checkpoints": list(names)})


def _joined(join: Callable[[list[Tensor]], Tensor], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several parts, joined by name; the order of names is that of the first part."""
    if not parts:
        raise UserError("nothing to join, expected at least one part")
    rows = 0 if join is torch.stack else 1  # leading dimensions that may differ
    for k, part in enumerate(parts):
        if different := sorted(part.keys() ^ parts[0].keys()):
            raise UserError(f"part {k} holds other tensors than part 0: they differ in {', '.join(different[:4])}")
        for name, tensor in part.items():
            found, expected = ((tuple(t.shape[rows:]), t.dtype) for t in (tensor, parts[0][name]))
            if found != expected:
                what, like = (f"{shape} {str(dtype)[6:]}" for shape, dtype in (found, expected))
                raise UserError(f"part {k}: {name} is {what}, expected {like} as in part 0")
    first = parts[0] if not rows else {name: tensor[0] for name, tensor in parts[0].items()}
    count = len(parts) if not rows else sum(len(next(iter(part.values()))) for part in parts)
    joined = empty(first, count)
    for name, out in joined.items():
        join([part[name].detach() for part in parts], out=out)
    return joined


def empty(like: StateDict, count: int) -> StateDict:
    """Uninitialised stacked tensors, (count, *shape) each, of the types and on the device of a checkpoint's.

    Large ones are in a file, see `scratch_tensors`.
    """
    stacked = {name: torch.empty(count, *t.shape, dtype=t.dtype, device="meta") for name, t in like.items()}
    if all(tensor.device.type in ("cpu", "meta") for tensor in like.values()):
        return scratch_tensors(stacked)
    return {name: torch.empty_like(tensor, device=like[name].device) for name, tensor in stacked.items()}


def _on_cpu(state: StateDict, where: str) -> StateDict:
    """The tensors of a state dict on the CPU."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {name} is a {type(value).__name__}, expected a tensor")
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if one does."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not all(map(_finite, _parts(t)))), None)


def _finite(numbers: Tensor) -> bool:
    """Whether all numbers are finite: so they are if their sum is, and if that is not, it may only be too large."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Rows of a tensor, as many at a time as are cheap to compute with."""
    rows = tensor if tensor.ndim else tensor[None]
    return (rows[part] for part in blocks(len(rows), bytes_each=8 * rows[0].numel() if len(rows) else 1))


def is_generated(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of one checkpoint is generated: floating, with more than one element (method, section 2)."""
    return tensor.is_floating_point() and tensor.numel() > 1 and not name.endswith("num_batches_tracked")


def generated_tensors(state: StateDict) -> StateDict:
    """The tensors of one checkpoint that are generated.

    Raises:
        ValueError: there is none.
    """
    found = {name: tensor for name, tensor in state.items() if is_generated(name, tensor)}
    if not found:
        raise ValueError("nothing to generate: the checkpoints have no floating tensor of more than one element")
    return found


def generated_numbers(state: StateDict) -> int:
    """How many numbers of one checkpoint are generated; see `generated_tensors`."""
    return sum(tensor.numel() for tensor in generated_tensors(state).values())


def heldout_split(
    count: int, fraction: float, *, seed: int, groups: Sequence[Hashable] = (), equal: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Indices of checkpoints to fit on and of those held out, both ascending; at least two to fit on, if there are.

    Of one trajectory, held out are a few blocks of consecutive checkpoints: neighbours on it are nearly copies of each
    other, so the loss on single held-out checkpoints would be low even for a generator that memorises. Of several runs
    some whole ones are held out, at random; one at least, if the fraction makes a checkpoint.

    Args:
        count: of all checkpoints.
        fraction: of them that is held out.
        seed: of the choice.
        groups: the training that each checkpoint comes from; none if all are of one.
        equal: a number for each checkpoint, the same for equal ones, which are held out together; none if all differ.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, dtype=torch.bool)
    held, numbers = round(count * fraction), {group: k for k, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) > 1:
        run_of = torch.tensor([numbers[group] for group in groups])
        chosen = max(round(len(numbers) * fraction), min(held, 1))
        for run in torch.randperm(len(numbers), generator=generator)[:chosen]:
            mask = _with_two_left(mask | (run_of == run), mask)
    else:
        held = min(held, max(count - 2, 0))
        blocks = min(HELDOUT_BLOCKS, max(held, 1))
        for block in range(blocks):
            start, end = block * count // blocks, (block + 1) * count // blocks
            length = (block + 1) * held // blocks - block * held // blocks
            first = start + int(torch.randint(end - start - length + 1, (), generator=generator))
            mask[first : first + length] = True
    if len(equal):
        numbers = torch.tensor(equal)
        mask = _with_two_left(torch.isin(numbers, numbers[mask]), torch.zeros_like(mask))
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]


def _with_two_left(mask: Tensor, otherwise: Tensor) -> Tensor:
    """What is held out, or something else where that would not leave two checkpoints."""
    return mask if (~mask).sum() >= 2 else otherwise
