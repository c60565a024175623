"""Diffusion against the schedulers of diffusers and against denoisers that are ideal in closed form."""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pdiff.method.denoisers.mlp import MLPDenoiser
from pdiff.method.diffusion import Diagnostics, Preview, Sampling, denoising_loss, heldout_loss, nearest_ratio
from pdiff.method.objectives import OBJECTIVES, Objective
from pdiff.method.samplers import samplers_of
from pdiff.seeds import stream

PAIRS = [(prediction, sampler) for prediction, kind in OBJECTIVES.items() for sampler in samplers_of(kind)]
SHORT = {"timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}  # reaches noise in fewer timesteps


def made(prediction: str, **options: float) -> Objective:
    """An objective with those of some options that it has."""
    kind = OBJECTIVES[prediction]
    return kind(**{name: value for name, value in options.items() if name in kind.model_fields})


def sampled(objective: Objective, denoiser: nn.Module, size: int, seeds, **options) -> Tensor:
    return Sampling(objective, denoiser, size, list(seeds), **options).samples()


class Ideal(nn.Module):
    """The best possible denoiser: what is predicted follows from the posterior mean of z_0.

    Args:
        objective: what is predicted.
        posterior_mean: (z_t (B, L), signal (B, 1), spread (B, 1)) -> E[z_0 | z_t = signal z_0 + spread eps].
    """

    def __init__(self, objective: Objective, posterior_mean: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.objective, self.posterior_mean, self.times = objective, posterior_mean, []
        if objective.path == "ddpm":
            betas = torch.linspace(objective.beta_start, objective.beta_end, objective.timesteps, dtype=torch.float64)
            self.signals = (1 - betas).log().cumsum(0).mul(0.5).exp().float()

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        self.times.append(t[0].item())
        (prediction,) = (name for name, kind in OBJECTIVES.items() if type(self.objective) is kind)
        if prediction == "flow":
            spread = t[:, None].float() / self.objective.timesteps
            signal = 1 - spread
        else:
            signal = self.signals[t.long()][:, None]
            spread = (1 - signal**2).sqrt()
        z_0 = self.posterior_mean(z, signal, spread)
        noise = (z - signal * z_0) / spread
        return {"flow": noise - z_0, "epsilon": noise, "sample": z_0, "v_prediction": signal * noise - spread * z_0}[
            prediction
        ]


def gaussian(mean: float, std: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Posterior mean where z_0 ~ N(mean, std^2)."""
    return lambda z, a, b: mean + a * std**2 / (a**2 * std**2 + b**2) * (z - a * mean)


def among(points: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Posterior mean where z_0 is one of some points (P, L), each as likely."""
    return lambda z, a, b: (-((z[:, None] - a[..., None] * points) ** 2).sum(-1) / (2 * b**2)).softmax(1) @ points


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_corruption_is_that_of_diffusers(prediction: str) -> None:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    z, noise, u = torch.randn(50, 3), torch.randn(50, 3), torch.rand(50)
    u[:2] = torch.tensor([0.0, 1 - 1e-6])
    z_t, t, target = made(prediction).add_noise(z, noise, u)
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    assert t.tolist() == [int(p * 1000) for p in u.tolist()] and t[:2].tolist() == [0, 999]
    assert torch.allclose(z_t, scheduler.add_noise(z, noise, t), atol=1e-5)
    targets = {"epsilon": noise, "sample": z, "v_prediction": scheduler.get_velocity(z, noise, t)}
    assert torch.allclose(target, targets[prediction], atol=1e-5)


def test_the_path_of_flow_is_straight() -> None:
    z, noise = torch.tensor([[1.0, -2.0]]).repeat(3, 1), torch.tensor([[5.0, 2.0]]).repeat(3, 1)
    z_t, t, target = made("flow", timesteps=200).add_noise(z, noise, torch.tensor([0.0, 0.25, 0.5]))
    assert z_t.tolist() == [[1, -2], [2, -1], [3, 0]]
    assert t.tolist() == [0, 50, 100] and target.tolist() == [[4, 4]] * 3


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_loss_of_an_ideal_denoiser_is_zero_on_one_point(prediction: str) -> None:
    torch.manual_seed(0)
    objective, point = made(prediction), torch.tensor([[1.0, -2.0, 0.5]])
    ideal, z = Ideal(objective, among(point)), point.repeat(64, 1)
    assert denoising_loss(objective, ideal, z).item() < 1e-4
    assert heldout_loss(objective, ideal, z[:3]) < 1e-4


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_target_denoises(prediction: str) -> None:
    torch.manual_seed(0)
    objective, z, noise = made(prediction), torch.randn(50, 3), torch.randn(50, 3)
    z_t, t, target = objective.add_noise(z, noise, torch.rand(50))
    torch.testing.assert_close(objective.denoised(z_t, t, target), z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_term_of_the_loss_sees_denoised_latents_and_true_ones(prediction: str) -> None:
    objective, z, seen = made(prediction), torch.randn(4000, 2), []
    denoiser = Ideal(objective, gaussian(0.0, 1.0))

    def term(found: Tensor, true: Tensor) -> Tensor:
        seen.append((found, true))
        return torch.arange(4000.0)

    torch.manual_seed(0)
    plain = denoising_loss(objective, denoiser, z)
    torch.manual_seed(0)
    assert (denoising_loss(objective, denoiser, z, term) - plain).item() == pytest.approx(3999 / 2)
    ((found, true),) = seen
    assert torch.equal(true, z)
    assert 0.3 < (found - z).square().mean() < 0.8  # what an ideal denoiser cannot know; 1 would be nothing at all


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_heldout_loss_always_uses_the_same_noise(prediction: str) -> None:
    torch.manual_seed(0)
    objective, denoiser, z = made(prediction), Ideal(made(prediction), gaussian(0.0, 1.0)), torch.randn(40, 8)
    first, state = heldout_loss(objective, denoiser, z), torch.get_rng_state()
    assert heldout_loss(objective, denoiser, z) == first
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing had been evaluated
    losses = torch.tensor([denoising_loss(objective, denoiser, z).item() for _ in range(50)])
    assert first == pytest.approx(losses.mean().item(), rel=0.1)


@pytest.mark.parametrize("steps", [60, 100])  # 60 does not divide the timesteps
@pytest.mark.parametrize(("prediction", "sampler"), PAIRS)
def test_ideal_denoisers_sample_a_gaussian(prediction: str, sampler: str, steps: int) -> None:
    objective = made(prediction)
    z = sampled(objective, Ideal(objective, gaussian(3.0, 0.5)), 64, range(64), sampler=sampler, steps=steps)
    assert z.dtype == torch.float32 and z.shape == (64, 64)
    assert z.mean().item() == pytest.approx(3.0, abs=0.04)  # 0.0078 is its standard error
    assert z.std().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("prediction", "sampler"), PAIRS)
def test_ideal_denoisers_sample_the_points(prediction: str, sampler: str) -> None:
    objective, points = made(prediction, **SHORT), torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -3.0]])
    z = sampled(objective, Ideal(objective, among(points)), 2, range(90), sampler=sampler, steps=50)
    distance, nearest = torch.cdist(z, points).min(1)
    assert distance.max() < 0.15
    assert nearest.bincount(minlength=3).min() > 15  # 30 of each are expected


@pytest.mark.parametrize("steps", [1, 7, 29, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_against_its_formula(prediction: str, steps: int) -> None:
    """Song et al. 2021, eq. 12 without noise, on timesteps evenly spaced from the last one."""
    objective = made(prediction, timesteps=50, beta_start=1e-3, beta_end=0.3)
    mean = gaussian(1.0, 0.7)
    found = sampled(objective, Ideal(objective, mean), 4, [5], sampler="ddim", steps=steps)
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))
    times = [round(50 * k / steps) - 1 for k in range(steps, -1, -1)]
    for t, after in pairwise(times):
        a, b = objective.alpha_bar[t], objective.alpha_bar[after] if after >= 0 else torch.tensor(1.0)
        z_0 = mean(z, a.sqrt(), (1 - a).sqrt())
        z = b.sqrt() * z_0 + (1 - b).sqrt() * (z - a.sqrt() * z_0) / (1 - a).sqrt()
    assert torch.allclose(found, z, atol=1e-4)


def test_midpoint_heun_and_euler_are_of_second_and_first_order() -> None:
    """Ideal flow to N(0, s^2) multiplies the start by s: the variance of z at time u is (1 - u)^2 s^2 + u^2."""
    objective = made("flow")
    start = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))

    def error(sampler: str, steps: int) -> float:
        z = sampled(objective, Ideal(objective, gaussian(0.0, 0.5)), 8, [0], sampler=sampler, steps=steps)
        return (z - 0.5 * start).abs().max().item()

    assert error("euler", 10) / error("euler", 20) == pytest.approx(2, rel=0.3)
    assert error("heun", 11) < error("euler", 11) / 3
    assert error("midpoint", 10) > 4 * error("midpoint", 20)
    assert all(error("midpoint", calls) < error("heun", calls) / 5 for calls in (20, 40))
    assert error("euler", 500) < 0.01 and error("heun", 99) < 0.005


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_midpoint_against_its_formula(steps: int) -> None:
    objective, mean = made("flow"), gaussian(1.0, 0.7)
    ideal = Ideal(objective, mean)
    found = sampled(objective, ideal, 4, [5], sampler="midpoint", steps=steps)
    z = torch.randn(1, 4, generator=torch.Generator().manual_seed(5))

    def velocity(z: Tensor, u: float) -> Tensor:
        return (z - mean(z, torch.tensor(1 - u), torch.tensor(u))) / u

    for k in range(0, steps - 1, 2):
        u, h = 1 - k / steps, 1 / steps
        z = z - 2 * h * velocity(z - h * velocity(z, u), u - h)
    z = z - velocity(z, 1 / steps) / steps if steps % 2 else z
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    assert ideal.times == pytest.approx([1000 - 1000 * k / steps for k in range(steps)])


@pytest.mark.parametrize(("prediction", "sampler"), PAIRS)
def test_a_sample_depends_on_its_seed_alone(prediction: str, sampler: str) -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(5, width=16).eval()
    nn.init.normal_(denoiser.output.weight, std=0.1)
    objective = made(prediction, **SHORT)
    seeds = [stream(0, k) for k in range(6)]

    def these(chosen: list[int]) -> Tensor:
        return sampled(objective, denoiser, 5, [seeds[k] for k in chosen], sampler=sampler, steps=10)

    together = these([0, 1, 2, 3, 4, 5])
    assert torch.allclose(torch.cat([these([k]) for k in range(6)]), together, rtol=1e-3, atol=1e-4)
    assert torch.allclose(these([4, 2]), together[[4, 2]], rtol=1e-3, atol=1e-4)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 0.01


@pytest.mark.parametrize(("prediction", "sampler"), PAIRS)
def test_no_more_calls_than_steps_and_only_known_timesteps(prediction: str, sampler: str) -> None:
    objective = made(prediction, **SHORT)
    for steps in (1, 2, 3, 7, 29, 62, 97, 100):
        ideal = Ideal(objective, gaussian(0.0, 1.0))
        z = sampled(objective, ideal, 2, [0, 1], sampler=sampler, steps=steps)
        assert z.isfinite().all()
        assert steps - (sampler == "heun") <= len(ideal.times) <= steps
        assert min(ideal.times) >= 0 and 98 <= ideal.times[0] <= 100
        assert ideal.times == sorted(ideal.times, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "heun", "steps": 5}, "'heun' cannot follow the path ddpm, expected one of ddpm, ddim, dpmsolver"),
        ({"sampler": "leap", "steps": 5}, "'leap' cannot follow"),
        ({"sampler": "ddim", "steps": 0}, r"1 <= steps <= timesteps must hold, but got \(0, 1000\)"),
        ({"sampler": "ddim", "steps": 1001}, r"1 <= steps <= timesteps must hold, but got \(1001, 1000\)"),
    ],
)
def test_sampling_that_cannot_be_is_refused(options: dict, message: str) -> None:
    objective = made("epsilon")
    with pytest.raises(ValueError, match=message):
        Sampling(objective, Ideal(objective, gaussian(0.0, 1.0)), 2, [0], **options)


def test_sampling_yields_every_timestep() -> None:
    objective = made("epsilon")
    denoiser = Ideal(objective, gaussian(0.0, 1.0))
    steps = Sampling(objective, denoiser, 2, [0], sampler="ddim", steps=5)
    seen = [t for t, _ in steps]
    assert len(steps) == len(seen) == 6 and seen[-1] == 0
    assert [int(t) for t in seen[:-1]] == denoiser.times == [999, 799, 599, 399, 199]


def test_the_nearest_ratio_against_plain_python() -> None:
    g = torch.Generator().manual_seed(0)
    z, fitted = torch.randn(9, 3, generator=g), torch.randn(20, 3, generator=g)

    def ratio(point: Tensor, others: list[Tensor]) -> float:
        first, second, *_ = sorted(math.dist(point.tolist(), other.tolist()) for other in others)
        return first / second

    expected = statistics.median(ratio(point, list(fitted)) for point in z)
    assert nearest_ratio(z, fitted) == pytest.approx(expected, rel=1e-5)
    own = statistics.median([ratio(fitted[k], [*fitted[:k], *fitted[k + 1 :]]) for k in range(19)])
    assert nearest_ratio(fitted[:19], fitted, skipped=1) == pytest.approx(own, rel=1e-5)
    assert nearest_ratio(fitted[:3], fitted) == nearest_ratio(z[:1], z[:1].repeat(3, 1)) == 0  # copies


@pytest.mark.parametrize("prediction", OBJECTIVES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_preview_tells_new_samples_from_copies_and_from_a_collapse(prediction: str, scale: float) -> None:
    objective = made(prediction)
    z = scale * torch.randn(200, 16, generator=torch.Generator().manual_seed(1)) + 1.0
    preview = Preview(objective, z, seed=0)
    state = torch.get_rng_state()
    good = preview(Ideal(objective, gaussian(1.0, scale)))
    assert good.dispersion == pytest.approx(1, abs=0.15) and good.nearest_ratio == pytest.approx(0.93, abs=0.06)
    assert good.expected_ratio == pytest.approx(0.93, abs=0.03) and not good.memorised
    copies = preview(Ideal(objective, among(z[:20])))
    assert copies.nearest_ratio < 0.2 and copies.memorised and copies.dispersion > 0.8
    collapsed = preview(Ideal(objective, gaussian(1.0, 0.3 * scale)))
    assert 0.1 < collapsed.dispersion < 0.5 and not collapsed.memorised
    assert preview(Ideal(objective, gaussian(1.0, scale))) == good  # the same noise
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("z", [torch.randn(1, 3), torch.randn(2, 3), torch.ones(9, 3)])
def test_too_few_distinct_latents_have_no_diagnostics(z: Tensor) -> None:
    found = Preview(made("flow"), z, seed=0)(Ideal(made("flow"), gaussian(0.0, 1.0)))
    assert found.metrics() == found.final() == {} and not found.memorised


def test_copies_are_nearer_than_half_of_what_is_expected() -> None:
    assert [Diagnostics(1.0, r, 0.8).memorised for r in (0.39, 0.41)] == [True, False]
