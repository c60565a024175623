"""Samplers: how noise is turned into latents, most by the schedulers of diffusers. SAMPLERS lists them.

Importing this module imports neither torch nor diffusers, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pdiff.method.objectives import Objective


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    Attributes:
        paths: of the objectives that it can follow.
        scheduler: makes the scheduler of diffusers, or one like it, for an objective.
        calls: denoiser calls of one step.
    """

    paths: tuple[str, ...]
    scheduler: Callable[[Objective], Any]
    calls: int = 1

    def prepared(self, objective: Objective, steps: int, device: Any) -> Any:
        """A scheduler whose timesteps take at most `steps` denoiser calls, from pure noise to data."""
        scheduler = self.scheduler(objective)
        if objective.path == "flow":
            scheduler.set_timesteps((steps + self.calls - 1) // self.calls, device=device)
            # the exact positions: DPM-Solver rounds them to integers
            scheduler.timesteps = (scheduler.sigmas[:-1] * objective.timesteps).to(device)
        else:  # asked for a number of steps, diffusers may add a timestep -1, and may not begin at pure noise
            spaced = [round(objective.timesteps * k / steps) - 1 for k in range(steps, 0, -1)]
            scheduler.set_timesteps(timesteps=spaced, device=device)
        return scheduler


class Midpoint:
    """The midpoint rule on even steps: half a step, and from where it began a whole one along the prediction there.

    Second order, with calls at every half step and none of them near the data, where Heun's method ends. At equal calls
    it is closer than Heun's to the exact flow of Gaussians, by 10 times or more. An odd last call is a step of Euler's.
    """

    def __init__(self, objective: Objective) -> None:
        self.begin: tuple[Any, Any] = (1.0, None)  # position and latents at the beginning of a step
        self.calls = 0

    def set_timesteps(self, steps: int, device: Any) -> None:
        import torch

        self.sigmas = torch.linspace(1, 0, steps + 1, device=device)  # positions: noise, middle, end, middle, ...

    def step(self, prediction: Any, t: Any, z: Any, *, generator: Any = None) -> SimpleNamespace:
        if self.calls % 2 == 0:
            self.begin = (self.sigmas[self.calls], z)
        self.calls += 1
        sigma, begin = self.begin
        return SimpleNamespace(prev_sample=begin + (self.sigmas[self.calls] - sigma) * prediction)


def heun(objective: Objective) -> Any:
    import diffusers

    return diffusers.FlowMatchHeunDiscreteScheduler(objective.timesteps)


def euler(objective: Objective) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(objective.timesteps)


def ddpm(objective: Objective) -> Any:
    import diffusers

    return diffusers.DDPMScheduler(**objective.scheduler_options(), clip_sample=False)


def ddim(objective: Objective) -> Any:
    """The first order of DPM-Solver; DDIMScheduler itself goes astray where the steps do not divide the timesteps."""
    return dpm_solver(objective, order=1)


def dpm_solver(objective: Objective, *, order: int = 2) -> Any:
    import diffusers

    options = {"solver_order": order, "use_flow_sigmas": objective.path == "flow"}
    return diffusers.DPMSolverMultistepScheduler(**objective.scheduler_options(), **options)


SAMPLERS: dict[str, Sampler] = {
    "midpoint": Sampler(("flow",), Midpoint),
    "heun": Sampler(("flow",), heun, calls=2),
    "euler": Sampler(("flow",), euler),
    "ddpm": Sampler(("ddpm",), ddpm),
    "ddim": Sampler(("ddpm",), ddim),
    "dpmsolver++": Sampler(("flow", "ddpm"), dpm_solver),
}


def samplers_of(objective: Objective | type[Objective]) -> list[str]:
    """The names of the samplers that can follow an objective; the first one is the default."""
    return [name for name, sampler in SAMPLERS.items() if objective.path in sampler.paths]
