"""Diffusion: the denoising loss, the training of a denoiser, and sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff.method.log import Log, Point
from pdiff.method.objectives import Objective
from pdiff.method.samplers import SAMPLERS, samplers_of
from pdiff.method.training import Batches, Best, Trainer, follow, shuffled_rows
from pdiff.parallel import ranks
from pdiff.seeds import stream

if TYPE_CHECKING:
    from pdiff.method.generators import DiffusionOptions

HELDOUT_BATCH = 256  # noisy latents that the denoiser takes at a time
PREVIEWED = 32  # latents that are sampled at every evaluation
PREVIEW_SAMPLER = (
    "dpmsolver++"  # where it can follow the path; the ancestral one loses 30 % of the spread in so few calls
)
PREVIEW_CALLS = 10  # denoiser calls of a preview: of a Gaussian it finds 94 to 99 % of the spread
COMPARED = 256  # fitted latents, at most, whose own nearest ratios are measured
FEWEST = 3  # distinct latents that have a nearest and a second nearest each
MEMORISED = 0.5  # of the expected nearest ratio. A copy has 0, and in many dimensions anything else has nearly 1: below
# half of that, a sample stands twice as near to one fitted latent as to any other.


Batch = Tensor | tuple[Tensor, Tensor]
"""Latents (B, L); or latents, and the conditions of each (B, C), which the denoiser takes as its third argument."""


class Rows(Protocol):
    """Batches by their indices: a tensor (N, L), or what makes the rows when they are asked for."""

    device: torch.device

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor, /) -> Any: ...


Term = Callable[[Tensor, Tensor], Tensor]
"""Denoised latents (B, L), and those that they were before noise was added -> what else is wrong with each, (B,)."""


def denoising_loss(objective: Objective, denoiser: nn.Module, batch: Batch, term: Term | None = None) -> Tensor:
    """Mean squared error of the prediction from latents z (B, L) with noise at random positions, a scalar.

    The mean of a further `term` of the latents that the prediction stands for is added.
    """
    z, *condition = batch if isinstance(batch, tuple) else (batch,)
    z_t, t, target = objective.add_noise(z, torch.randn_like(z), torch.rand_like(z[:, 0]))
    prediction = denoiser(z_t, t, *condition)
    loss = F.mse_loss(prediction, target)
    if term:
        loss = loss + term(objective.denoised(z_t, t, prediction), z).mean()
    return loss


@torch.no_grad()
def heldout_loss(objective: Objective, denoiser: nn.Module, batch: Batch, *, repeats: int = 32) -> float:
    """Denoising error of latents (B, L), each at `repeats` evenly spaced positions; the same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    z, *condition = (part.repeat(repeats, 1) for part in (batch if isinstance(batch, tuple) else (batch,)))
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    u = ((torch.randperm(len(z), generator=generator) + 0.5) / len(z)).to(z.device)
    z_t, t, target = objective.add_noise(z, noise, u)
    batches = zip(*(part.split(HELDOUT_BATCH) for part in (z_t, t, *condition)), strict=True)
    return F.mse_loss(torch.cat([denoiser(*batch) for batch in batches]), target).item()


def trainer(
    denoiser: nn.Module,
    batches: Batches,
    objective: Objective,
    options: DiffusionOptions,
    *,
    seed: int,
    term: Term | None = None,
) -> Trainer:
    """The training of a denoiser on batches of latents (B, L); `term` as in `denoising_loss`."""

    def loss(batch: Batch) -> Tensor:
        return denoising_loss(objective, denoiser, batch, term)

    return Trainer(denoiser, loss, batches, options, steps=options.steps, seed=seed, ema=options.ema, autocast=True)


def fit(
    denoiser: nn.Module,
    objective: Objective,
    z: Rows,
    heldout: Batch,
    options: DiffusionOptions,
    *,
    seed: int,
    log: Log,
    path: Path | None = None,
    preview: Preview | None = None,
    term: Term | None = None,
) -> nn.Module:
    """Train a denoiser on latents z (N, L), and evaluate its loss on held-out ones (M, L); M may be 0.

    Args:
        denoiser: untrained, on the device of the latents.
        objective: what it predicts.
        z: latents that it is trained on.
        heldout: latents that it is evaluated on; they may be none.
        options: of the training.
        seed: of batches and noise.
        log: receives `diffusion/loss` and, of every evaluation, `diffusion/heldout_loss` and the diagnostics.
        path: file of the training state, from which an interrupted training resumes.
        preview: of the latents z; made here when absent. It does not change what is trained.
        term: of the loss, see `denoising_loss`.

    Returns:
        The moving average of the denoiser in evaluation mode: the last one; with `options.stop_on` heldout_loss the one
        with the lowest held-out loss; with memorising, where samples became copies, the one evaluated before that.
    """
    batches = shuffled_rows(z, options.batch_size, seed)
    steps = trainer(denoiser.train(), batches, objective, options, seed=seed, term=term)
    preview, best, memorised = preview or Preview(objective, z, seed=seed), Best(), False
    evaluated = len(heldout[0] if isinstance(heldout, tuple) else heldout)
    for step in follow(steps, "diffusion/loss", log, path=path, beside=(best,)):
        if step.number % options.evaluate_every:
            continue
        averaged = steps.averaged.eval()
        found = preview(averaged)
        metrics = found.metrics()
        if evaluated:
            metrics["diffusion/heldout_loss"] = loss = heldout_loss(objective, averaged, heldout)
        denoiser.train()
        for name, value in metrics.items():
            log(Point(name, value, step.number))
        if options.stop_on == "heldout_loss" and evaluated:
            best.update(-loss, averaged)
            if best.since_best >= options.patience:
                break
        if options.stop_on == "memorising":
            if memorised := found.memorised:
                break
            best.update(step.number, averaged)
    if memorised or options.stop_on == "heldout_loss":
        best.restore(steps.averaged)
    return steps.averaged.eval()


class Diagnostics(NamedTuple):
    """What a few samples of a denoiser say about it; NaN where there are too few latents to compare them with.

    Attributes:
        dispersion: rms distance of the samples from their mean over that of the fitted latents from theirs; 1 if they
            spread alike.
        nearest_ratio: distance of a sample to the nearest fitted latent over that to the second nearest, the median
            over the samples; 0 if they are copies.
        expected_ratio: the same of the fitted latents, each among the others.
    """

    dispersion: float = math.nan
    nearest_ratio: float = math.nan
    expected_ratio: float = math.nan

    @property
    def memorised(self) -> bool:
        """Whether most samples are near copies of fitted latents."""
        return self.nearest_ratio < MEMORISED * self.expected_ratio

    def metrics(self) -> dict[str, float]:
        """Name of a metric -> its value, of those that are known."""
        return known({"diffusion/dispersion": self.dispersion, "diffusion/nearest_ratio": self.nearest_ratio})

    def final(self) -> dict[str, float]:
        """The same of the denoiser that is kept; the nearest ratio in units of the expected one."""
        relative = self.nearest_ratio / self.expected_ratio if self.expected_ratio else math.nan
        return known({"diffusion/final_dispersion": self.dispersion, "diffusion/final_nearest_ratio": relative})


def known(values: dict[str, float]) -> dict[str, float]:
    """Those of some metrics that could be measured."""
    return {name: value for name, value in values.items() if not math.isnan(value)}


class Preview:
    """Samples a few latents from the same noise at every call, and compares them with the fitted ones.

    Compared are latents whose components have deviation 1 over the fitted ones. The noise comes from generators of its
    own: a training with previews is the same as one without.

    Args:
        objective: what the denoiser predicts.
        z: the fitted latents (N, L), on the denoiser's device.
        seed: of the noise.
        samples: how many latents.
        calls: denoiser calls, at most.
        view: latents (B, L) -> rows as they are compared: the same for latents that stand for the same network.
    """

    def __init__(
        self,
        objective: Objective,
        z: Tensor,
        *,
        seed: int,
        samples: int = PREVIEWED,
        calls: int = PREVIEW_CALLS,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.view = view or (lambda z: z)
        z = self.view(z)
        self.objective, self.known = objective, len(z.unique(dim=0)) >= FEWEST
        if self.known:
            std = z.std(0)
            self.scale = torch.where(std > 1e-8, std, 1.0)
            self.fitted = z / self.scale
            some = self.fitted[:: -(-len(z) // COMPARED)]
            self.expected_ratio = ranks.mean(nearest_ratio(some, self.fitted, skipped=1))
            self.steps = min(calls, objective.timesteps)
            self.seeds = [stream(stream(seed, "preview"), k) for k in range(samples)]
            known = samplers_of(objective)
            self.sampler = PREVIEW_SAMPLER if PREVIEW_SAMPLER in known else known[0]
            SAMPLERS[self.sampler].prepared(objective, self.steps, z.device)  # imports diffusers, which takes seconds

    def __call__(self, denoiser: nn.Module) -> Diagnostics:
        """The diagnostics of a denoiser in evaluation mode, the same on all processes."""
        if not self.known:
            return Diagnostics()
        size, device = self.fitted.shape[1], self.fitted.device
        options = {"sampler": self.sampler, "steps": self.steps, "device": device}
        *_, (_, z) = Sampling(self.objective, denoiser, size, self.seeds, **options)
        z = self.view(z) / self.scale
        dispersion = (z.var(0).mean() / self.fitted.var(0).mean()).sqrt().item()
        ratio = nearest_ratio(z, self.fitted)
        return Diagnostics(ranks.mean(dispersion), ranks.mean(ratio), self.expected_ratio)


def nearest_ratio(z: Tensor, fitted: Tensor, *, skipped: int = 0) -> float:
    """Median over latents (B, L) of the distance to the nearest of the fitted ones (N, L) over that to the second.

    Args:
        z: latents.
        fitted: those that they are compared with, N >= 2 + `skipped`.
        skipped: how many of the nearest do not count: 1 where the latents are fitted ones, which find themselves.
    """
    exact = "donot_use_mm_for_euclid_dist"  # also for copies, where a matrix product would leave rounding errors
    nearest = torch.cdist(z, fitted, compute_mode=exact).topk(skipped + 2, largest=False).values[:, skipped:]
    return (nearest[:, 0] / nearest[:, 1].clamp_min(torch.finfo(z.dtype).tiny)).median().item()


def gaussian_noise(size: int, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """Noise of N(0, 1), a row for each seed, (len(seeds), size), and the generators that it came from, to go on with.

    Computed on the CPU, so that it is the same for every device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(size, generator=generator) for generator in generators]), generators


class Sampling:
    """Samples latents by a sampler: iterating yields z_t on its way from noise to data, and its timestep t.

    The first z_t is noise; the last one, at t = 0, are the samples. There are len(self) of them. Latent k depends on
    seed k alone, whatever the batch.

    Args:
        objective: what the denoiser predicts.
        denoiser: in evaluation mode, on `device`.
        size: L.
        seeds: one for each latent.
        sampler: a name in `SAMPLERS` whose paths include the objective's.
        steps: denoiser calls, at most; between 1 and the objective's timesteps.
        device: where to compute.

    Raises:
        ValueError: the sampler is unknown or cannot follow the objective; too few or too many steps.
    """

    def __init__(
        self,
        objective: Objective,
        denoiser: nn.Module,
        size: int,
        seeds: Sequence[int],
        *,
        sampler: str,
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if sampler not in (known := samplers_of(objective)):
            raise ValueError(
                f"sampler {sampler!r} cannot follow the path {objective.path}, expected one of {', '.join(known)}"
            )
        if not 1 <= steps <= objective.timesteps:
            raise ValueError(f"1 <= steps <= timesteps must hold, but got ({steps}, {objective.timesteps})")
        self.denoiser = denoiser
        self.scheduler = SAMPLERS[sampler].prepared(objective, steps, device)
        noise, self.generators = gaussian_noise(size, seeds)
        self.noise = noise.to(device)

    def __len__(self) -> int:
        return len(self.scheduler.timesteps) + 1

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[float, Tensor]]:
        z = self.noise
        for t in self.scheduler.timesteps:
            yield float(t), z
            prediction = self.denoiser(z, t.expand(len(z)))
            z = self.scheduler.step(prediction, t, z, generator=self.generators).prev_sample
        yield 0.0, z

    def samples(self, label: str = "sample") -> Tensor:
        """The samples, float32 (len(seeds), L), with a progress bar."""
        z = self.noise
        for _, z in tqdm(self, desc=label, unit="step", disable=None):  # noqa: B007
            pass
        return z
