"""Counting bytes of tensors that are never allocated: PyTorch's fake tensors have shapes and types, and no data."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it: `now` of those that are alive, `peak` its maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class Fake(FakeTensorMode):
    """Fake tensors that can be copied, as averaged weights are; small real tensors may be used beside them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __deepcopy__(self, memo: dict) -> Fake:
        return self


@contextmanager
def counted() -> Iterator[Allocations]:
    """Make tensors fake inside the block, and count their bytes."""
    with warnings.catch_warnings(), Fake(), Allocations() as allocations:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # when one is copied
        yield allocations


def bytes_of(values: Iterable[Any]) -> int:
    """Bytes of those values that are tensors."""
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, Tensor))
