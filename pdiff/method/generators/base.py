"""What every generator can do: fit, sample, save, load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff.files import read_json, read_tensors, write_json, write_tensors
from pdiff.method.collection import Collection, not_finite
from pdiff.method.generators import GENERATORS, GeneratorOptions, LatentDiffusionOptions
from pdiff.method.log import Log, ignore
from pdiff.method.options import resolve
from pdiff.method.standardize import Slot, Standardizer
from pdiff.seeds import sample_seed

FORMAT = 2
Tensors = dict[str, Tensor]
Check = Callable[[Callable[[Collection], Collection]], object]
Trajectory = Iterator[tuple[float, Collection]]


class Generator(ABC):
    """A distribution over networks, fitted on a collection.

    Attributes:
        standardizer: checkpoints <-> vectors (N, D).
    """

    standardizer: Standardizer

    @staticmethod
    def fit(collection: Collection, options: GeneratorOptions | None = None, **more: Any) -> Generator:
        """Fit a generator; `options` (one of the classes in GENERATORS) say which one. The rest is that of `fitted`."""
        options = options or LatentDiffusionOptions()
        return resolve(options.implementation).fitted(collection, options, **more)

    @classmethod
    @abstractmethod
    def fitted(
        cls,
        collection: Collection,
        options: Any,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log: Log = ignore,
        state: Path | None = None,
        check: Check = ignore,
    ) -> Generator:
        """Fit this kind of generator.

        Args:
            collection: N checkpoints of one layout.
            options: of this kind.
            seed: of everything random.
            device: where to compute.
            log: gets the losses as points.
            state: a folder in which an interrupted fit finds what it had done.
            check: called with the function that reconstructs a collection through the fitted compression, as soon as
                there is one; what it raises ends the fit.

        Raises:
            ValueError: nothing in the collection can be generated, or the training diverged.
        """

    @abstractmethod
    def vectors(self, seeds: list[int], *, device: torch.device | str, **options: Any) -> Tensor:
        """Standardised vectors of new networks, one for each seed, (len(seeds), D), on the CPU."""

    @torch.inference_mode()
    def sample(
        self, count: int, *, seed: int = 0, first: int = 0, device: torch.device | str = "cpu", **options: Any
    ) -> Collection:
        """Sample networks `first` .. `first + count - 1` of a seed; network k depends on (seed, k) alone.

        Args:
            count: how many.
            seed: of the sampling.
            first: number of the first one.
            device: where to compute.
            options: of this kind of generator, such as `sampler` and `sampling_steps`.

        Raises:
            ValueError: the generator diverged: a network holds NaN or infinity; or `count` < 1.
        """
        if count < 1:
            raise ValueError(f"count >= 1 must hold, but got {count}")
        seeds = [sample_seed(seed, k) for k in range(first, first + count)]
        networks = self.standardizer.decode(self.vectors(seeds, device=device, **options))
        if name := not_finite(networks.tensors):
            raise ValueError(f"{name} of a generated network holds NaN or infinity; the generator diverged")
        return networks

    def warm_up(self, **options: Any) -> None:  # noqa: B027 (most kinds need nothing)
        """Import what sampling needs, so that measures of it do not include that."""

    def sizes(self) -> dict[str, float]:
        """Sizes worth logging, such as the number of latents."""
        return {}

    def modules(self) -> dict[str, tuple[nn.Module, int]]:
        """Modules that are useful by themselves: name -> module of rows (B, width), and the width."""
        return {}

    @abstractmethod
    def tensors(self) -> Tensors:
        """Everything fitted but the standardizer, by name."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What else `restored` needs, as plain data."""

    @classmethod
    @abstractmethod
    def restored(cls, standardizer: Standardizer, tensors: Tensors, description: dict[str, Any]) -> Generator:
        """The inverse of `tensors` and `description`.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: they do not fit.
        """

    def save(self, folder: Path) -> None:
        """Write `generator.safetensors` and `generator.json`: all that sampling needs."""
        standardizer = self.standardizer
        constants = {f"constant.{name}": tensor for name, tensor in standardizer.constants.items()}
        write_tensors(folder / "generator.safetensors", self.tensors() | constants)
        (kind,) = (kind for kind, options in GENERATORS.items() if resolve(options.implementation) is type(self))
        description = {
            "format": FORMAT,
            "kind": kind,
            "order": standardizer.order,
            "slots": [asdict(slot) for slot in standardizer.slots],
            **self.description(),
        }
        write_json(folder / "generator.json", description)

    @staticmethod
    def load(folder: Path) -> Generator:
        """Read what `save` wrote, of whichever kind.

        Raises:
            ValueError: a damaged file, another format, or tensors that do not fit the description.
        """
        path = folder / "generator.json"
        description, tensors = read_json(path), read_tensors(folder / "generator.safetensors")
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise ValueError(f"{path}: not a generator of format {FORMAT}")
        if name := not_finite(tensors):
            raise ValueError(f"{folder / 'generator.safetensors'}: {name} holds NaN or infinity")
        try:
            slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in description["slots"]]
            standardizer = Standardizer(slots, under("constant.", tensors), description["order"])
            if sorted(standardizer.order) != sorted([*standardizer.constants, *(slot.name for slot in slots)]):
                raise ValueError("its order names other tensors than its slots and the constants")
            kind = resolve(GENERATORS[description["kind"]].implementation)
            return kind.restored(standardizer, tensors, description)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: does not fit generator.safetensors: {str(error).splitlines()[0]}") from None


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
