"""`Generator`: what every kind of generator can do: fit, sample, save, load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pdiff.errors import UserError, for_users
from pdiff.files import read_json, read_tensors, write_json, write_tensors
from pdiff.method.collection import Collection, not_finite
from pdiff.method.generators import GENERATORS, GeneratorOptions, LatentDiffusionOptions
from pdiff.method.log import Log, ignore
from pdiff.method.options import resolve
from pdiff.method.standardize import Standardizer
from pdiff.method.vectors import Matrix
from pdiff.seeds import stream

if TYPE_CHECKING:
    from pdiff.method.diffusion import Diagnostics

FORMAT = 2  # of the files of `save`
Tensors = dict[str, Tensor]
Check = Callable[[Callable[[Collection], Collection]], object]


class Generator(ABC):
    """A distribution over networks, fitted on a collection. Users call `fit`, `sample`, `save` and `load`.

    Example:
        >>> import pdiff
        >>> states = [torch.nn.Linear(4, 2).state_dict() for _ in range(20)]
        >>> options = pdiff.LatentDiffusion(diffusion={"steps": 20})
        >>> generator = Generator.fit(Collection.stack(states), options, seed=0)
        >>> networks = generator.sample(100, seed=1)
        >>> len(networks), networks[0]["weight"].shape
        (100, torch.Size([2, 4]))
        >>> generator.save("generator")
        >>> again = Generator.load("generator").sample(100, seed=1)
        >>> torch.equal(again.tensors["weight"], networks.tensors["weight"])
        True

    A new kind is a subclass, entered into GENERATORS with its options. It implements `fit`, `sample_vectors` and, for
    its files, `tensors`, `config` and `from_saved`.

    Attributes:
        standardizer: checkpoints <-> vectors (N, D).
        compresses: whether there is a compression, through which `reconstruct` passes networks.
        diagnostics: what the fit found out about its samples; None where it looked at none, and after `load`.
    """

    standardizer: Standardizer
    compresses: ClassVar[bool] = False
    diagnostics: Diagnostics | None = None

    @classmethod
    @abstractmethod
    def fit(
        cls,
        collection: Collection,
        options: GeneratorOptions | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        log: Log = ignore,
        state: Path | None = None,
        check: Check = ignore,
        **population: Any,
    ) -> Generator:
        """Fit the kind of generator that the options name; every kind overrides this with the same arguments.

        Args:
            collection: N checkpoints of one layout.
            options: those of one kind, see GENERATORS; latent diffusion when absent.
            seed: of everything random.
            device: where to train.
            log: receives the losses as points.
            state: a folder of this fit alone, from whose files it resumes after an interruption.
            check: called with the function that reconstructs a collection through the fitted compression, as soon as
                there is one; an exception that it raises ends the fit.
            population: what else the kind must know of the networks, by the names in `options.inputs`: `groups`, the
                interchangeable units of their architecture (`Groups`); `conditions` (N, C) where its options name
                `columns`, NaN where a value is not known; `outputs`, tensors (B, *shape) of B networks twice -> how far
                the outputs of the first B are from those of the second, (B,), on the same inputs.

        Raises:
            UserError: nothing in the collection can be generated, it holds NaN or infinity, or the training diverged.

        Example:
            >>> import pdiff
            >>> collection = pdiff.Collection({"weight": torch.randn(20, 2, 4)})
            >>> pdiff.Generator.fit(collection, pdiff.Gaussian(scale=0.5)).sample(3)[0]["weight"].shape
            torch.Size([2, 4])
        """
        options = options or LatentDiffusionOptions()
        kind = resolve(options.implementation)
        common = {"seed": seed, "device": device, "log": log, "state": state, "check": check}
        with for_users("train"):
            if missing := [name for name in options.inputs if name not in population]:
                raise ValueError(f"{type(options).__name__}: fit needs {' and '.join(missing)}, but got none")
            return kind.fit(collection.cpu(), options, **common, **population)

    @torch.no_grad()
    def sample(
        self, count: int, *, seed: int = 0, first: int = 0, device: torch.device | str = "cpu", **options: Any
    ) -> Collection:
        """Sample networks `first` .. `first + count - 1` of a seed; network k depends on (seed, k) alone.

        Args:
            count: how many.
            seed: of the sampling.
            first: number of the first one.
            device: where to compute.
            options: of the kind's `sample_vectors`, such as `sampler` and `sampling_steps`.

        Returns:
            The networks, on the CPU.

        Raises:
            UserError: the generator diverged: a network holds NaN or infinity; an option that cannot be used; or
                `count` < 1.
        """
        if count < 1:
            raise UserError(f"count >= 1 must hold, but got {count}")
        seeds = [stream(seed, k) for k in range(first, first + count)]
        with for_users("generate"):
            networks = self.standardizer.decode(self.sample_vectors(seeds, device=device, **options))
            if name := not_finite(networks.tensors):
                raise ValueError(f"{name} of a generated network holds NaN or infinity; the generator diverged")
        return networks

    def save(self, folder: Path | str) -> None:
        """Write `generator.safetensors` and `generator.json`: all that sampling needs."""
        folder = Path(folder)
        constants = {f"constant.{name}": tensor for name, tensor in self.standardizer.constants.items()}
        write_tensors(folder / "generator.safetensors", self.tensors() | constants)
        kind = next(kind for kind, options in GENERATORS.items() if resolve(options.implementation) is type(self))
        config = {"format": FORMAT, "kind": kind, **self.standardizer.config(), **self.config()}
        write_json(folder / "generator.json", config)

    @staticmethod
    def load(folder: Path | str) -> Generator:
        """Read what `save` wrote, whichever kind it is.

        Raises:
            UserError: a damaged file, another format, or tensors that do not fit the JSON file.
        """
        folder = Path(folder)
        path = folder / "generator.json"
        config, tensors = read_json(path), read_tensors(folder / "generator.safetensors")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise UserError(f"{path}: not a generator of format {FORMAT}")
        if name := not_finite(tensors):
            raise UserError(f"{folder / 'generator.safetensors'}: {name} holds NaN or infinity")
        try:
            standardizer = Standardizer.from_config(config, with_prefix("constant.", tensors))
            return resolve(GENERATORS[config["kind"]].implementation).from_saved(standardizer, tensors, config)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise UserError(f"{path}: does not fit generator.safetensors: {reason[:300]}") from None

    @abstractmethod
    def sample_vectors(self, seeds: list[int], *, device: torch.device | str, label: str = "sample") -> Matrix:
        """Standardised vectors of new networks, one for each seed, (len(seeds), D), on the CPU.

        Args:
            seeds: one for each network.
            device: where to compute.
            label: of a progress bar. A kind may have further options, its `sampling` in GENERATORS.
        """

    @abstractmethod
    def tensors(self) -> Tensors:
        """Everything fitted but the standardizer, by name."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What else `from_saved` needs, as plain data."""

    @classmethod
    @abstractmethod
    def from_saved(cls, standardizer: Standardizer, tensors: Tensors, config: dict[str, Any]) -> Generator:
        """The generator whose `tensors` and `config` these are, which may be damaged.

        Raises:
            AttributeError, KeyError, TypeError, ValueError, RuntimeError: they do not fit.
        """

    def warm_up(self, **options: Any) -> None:  # noqa: B027 (most kinds need nothing)
        """Import what sampling with some options needs, so that its measured seconds do not include that."""

    def reconstruct(self, networks: Collection, *, device: torch.device | str = "cpu") -> Collection:
        """Networks through the fitted compression and back.

        Raises:
            NotImplementedError: the kind does not compress.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compression")

    def sizes(self) -> dict[str, float]:
        """Sizes worth logging, such as the number of latents."""
        return {}

    def modules(self) -> dict[str, tuple[nn.Module, int]]:
        """Modules that are useful by themselves: name -> module of rows (B, width), and the width."""
        return {}


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with a prefix, by their names without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
