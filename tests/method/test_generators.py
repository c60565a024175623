"""Generators on collections of a known distribution; files that come back the same or not at all."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pdiff.files import read_tensors, write_tensors
from pdiff.method import diffusion, training
from pdiff.method.autoencoders import AUTOENCODERS, ConvAutoencoderOptions, PCAOptions
from pdiff.method.collection import Collection, heldout_split
from pdiff.method.denoisers import ConvDenoiserOptions, DenoiserOptions, MLPDenoiserOptions
from pdiff.method.generators import DiffusionOptions, GaussianOptions, LatentDiffusionOptions
from pdiff.method.generators.base import Generator
from pdiff.method.generators.gaussian import Gaussian
from pdiff.method.generators.latent_diffusion import LatentDiffusion, latent_scale
from pdiff.method.log import Log, Point, ignore
from pdiff.method.objectives import OBJECTIVES, Flow, Sample, Velocity
from pdiff.method.options import Section, resolve
from pdiff.method.standardize import Standardizer

SMALL = MLPDenoiserOptions(width=64, blocks=1)
QUICK = {"steps": 400, "learning_rate": 5e-3, "batch_size": 128, "evaluate_every": 100}


def gaussian_collection(count: int = 400) -> Collection:
    """Networks with three degrees of freedom, each Gaussian, and a constant."""
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(count, 3, generator=g) * torch.tensor([1.0, 0.5, 0.25])
    offset, mixing = 3 * torch.randn(12, generator=g), torch.randn(3, 12, generator=g)
    rows = offset + factors @ mixing
    return Collection({"a": rows[:, :8].reshape(-1, 4, 2), "n": torch.arange(count), "b": 10 * rows[:, 8:]})


def fit(collection: Collection, log: Log = ignore, *, prediction: str = "flow", **diffusion: object) -> LatentDiffusion:
    """A generator by principal components."""
    options = LatentDiffusionOptions(
        denoiser=SMALL, objective=OBJECTIVES[prediction](), diffusion=DiffusionOptions(**QUICK | diffusion)
    )
    return Generator.fit(collection, options, log=log)


def fit_denoiser(
    latents: Tensor,
    heldout: Tensor,
    options: DiffusionOptions,
    *,
    log: Log = ignore,
    path: Path | None = None,
    denoiser: DenoiserOptions = SMALL,
    **parts: object,
) -> nn.Module:
    torch.manual_seed(0)
    module = denoiser.build(latents.shape[1])
    return diffusion.fit(module, Flow(), latents, heldout, options, seed=0, log=log, path=path, **parts)


def fit_autoencoder(x: Tensor, options: Section, *, log: Log = ignore, path: Path | None = None) -> nn.Module:
    return options.fit(x, seed=0, device="cpu", log=log, path=path)


@pytest.fixture(scope="module")
def fitted() -> LatentDiffusion:
    """A generator of the collection above."""
    return fit(gaussian_collection(50), steps=20)


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "sampler"), [("flow", "heun"), ("v_prediction", "dpmsolver++")])
def test_generated_networks_are_distributed_like_the_originals(prediction: str, sampler: str) -> None:
    originals, log = gaussian_collection(), []
    generator = fit(originals, log.append, prediction=prediction)
    sampled = generator.sample(400, sampler=sampler, sampling_steps=20)
    assert list(sampled.tensors) == ["a", "n", "b"] and set(sampled.tensors["n"].tolist()) == {0}
    assert generator.autoencoder.latent_size <= 3  # it found the degrees of freedom
    for name in ("a", "b"):
        real, new = originals.tensors[name].flatten(1), sampled.tensors[name].flatten(1)
        assert ((new.mean(0) - real.mean(0)) / real.std(0)).abs().max() < 0.25
        assert (new.std(0) / real.std(0) - 1).abs().max() < 0.25
    losses = {point.name for point in log if point.name.endswith("loss")}
    assert losses == {"autoencoder/loss", "diffusion/loss", "diffusion/heldout_loss"}


def test_the_first_networks_of_more_samples_are_the_same(fitted: Generator) -> None:
    few, many = (fitted.sample(count, sampler="heun", sampling_steps=7) for count in (2, 5))
    for name in few.tensors:
        assert torch.allclose(few.tensors[name], many.tensors[name][:2], rtol=1e-4, atol=1e-4)


def test_a_loaded_generator_samples_the_same(fitted: Generator, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generator.json", "generator.safetensors"]
    expected = fitted.sample(3, sampler="euler", sampling_steps=5)
    found = Generator.load(tmp_path).sample(3, sampler="euler", sampling_steps=5)
    assert list(found.tensors) == list(expected.tensors)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("denoiser", [ConvDenoiserOptions(), MLPDenoiserOptions(width=8, blocks=1)])
@pytest.mark.parametrize("kind", [{"kind": "conv"}, {"kind": "conv", "variational": True}, {"kind": "pca"}])
def test_every_kind_is_built_again_from_its_files(kind, denoiser, mixed: Collection, tmp_path: Path) -> None:
    standardizer, options = Standardizer.fit(mixed), dict(kind)
    autoencoder = resolve(AUTOENCODERS[options.pop("kind")].module)(standardizer.size, 4, **options)
    denoiser = denoiser.build(4)
    torch.manual_seed(0)
    for module in (autoencoder, denoiser):
        for tensor in module.state_dict().values():
            tensor.copy_(0.02 * torch.rand(tensor.shape) + 0.01)
    objective = Velocity(timesteps=50)
    generator = LatentDiffusion(standardizer, autoencoder, torch.randn(4), torch.rand(4), denoiser, objective)
    generator.save(tmp_path)
    expected = generator.sample(2, seed=7, sampler="ddim", sampling_steps=3)
    found = Generator.load(tmp_path).sample(2, seed=7, sampler="ddim", sampling_steps=3)
    assert list(found.tensors) == list(mixed.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == mixed.tensors[name].dtype and torch.equal(found.tensors[name], tensor)


def damage(folder: Path, how: str) -> None:
    """Damage a saved generator of either kind."""
    path, index = folder / "generator.safetensors", folder / "generator.json"
    tensors, description = read_tensors(path), json.loads(index.read_text())
    slot = description["slots"][0]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
        return
    if how == "no file":
        path.unlink()
        return
    if how.startswith("without "):
        tensors.pop(how.removeprefix("without "))
    elif how == "nan":
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = math.nan
    elif how.startswith("another shape of "):
        name = how.removeprefix("another shape of ")
        tensors[name] = tensors[name][:-1].clone()
    elif how.startswith("another number of dimensions of "):
        name = how.removeprefix("another number of dimensions of ")
        tensors[name] = tensors[name][..., None]
    elif how == "another format":
        description["format"] = 0
    elif how == "foreign":
        description = {"model": "resnet18"}
    elif how == "a list":
        description = [description]
    elif how == "unknown kind":
        description["denoiser"]["kind"] = "transformer"
    elif how == "unknown option":
        description["denoiser"]["heads"] = 8
    elif how == "a part that is a text":
        description["autoencoder"] = "pca"
    elif how == "no slots":
        del description["slots"]
    elif how == "fewer slots":
        description["slots"].pop()
    elif how == "a larger slot":
        slot["shape"] = [4, 3]
    elif how == "a slot of no type":
        slot["dtype"] = "Tensor"
    elif how == "a slot without a deviation":
        slot["std"] = 0.0
    elif how == "a slot with a text":
        slot["mean"] = "0"
    elif how == "no order":
        description["order"] = None
    elif how == "unknown generator":
        description["kind"] = "oracle"
    elif how == "no scale":
        description["scale"] = None
    else:
        raise ValueError(how)
    write_tensors(path, tensors)
    index.write_text(json.dumps(description))


HOW = ["truncated", "no file", "nan", "another format", "foreign", "a list", "no slots", "fewer slots", "a larger slot"]
HOW += ["a slot of no type", "a slot without a deviation", "a slot with a text", "no order", "unknown generator"]
HOW += ["without constant.n"]
OF_DIFFUSION = ["unknown kind", "unknown option", "a part that is a text", "another shape of autoencoder.center"]
OF_DIFFUSION += ["without latent_mean", "without denoiser.input.weight", "without autoencoder.components"]
OF_GAUSSIAN = ["no scale", "without mean", "without std", "without components", "another shape of components"]
OF_GAUSSIAN += ["another shape of std", "another number of dimensions of mean"]


def refused(generator: Generator, folder: Path, how: str) -> None:
    generator.save(folder)
    damage(folder, how)
    with pytest.raises(ValueError, match="generator") as caught:
        Generator.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [*HOW, *OF_DIFFUSION])
def test_damaged_files_of_latent_diffusion_are_refused(fitted: Generator, tmp_path: Path, how: str) -> None:
    refused(fitted, tmp_path, how)


@pytest.mark.parametrize("how", [*HOW, *OF_GAUSSIAN])
def test_damaged_files_of_a_gaussian_are_refused(tmp_path: Path, how: str) -> None:
    refused(Generator.fit(gaussian_collection(20), GaussianOptions()), tmp_path, how)


@pytest.mark.slow
def test_the_convolutional_autoencoder_learns(tmp_path: Path) -> None:
    collection = gaussian_collection(32)
    vectors = Standardizer.fit(collection).encode(collection)
    options = ConvAutoencoderOptions(latent_size=8, steps=25, learning_rate=2e-3, batch_size=32, latent_noise=0.0)
    log: list[Point] = []
    autoencoder = fit_autoencoder(vectors, options, log=log.append)
    assert autoencoder.options == {"size": 12, "latent_size": 8, "variational": False}
    assert not autoencoder.training and autoencoder.encode(vectors).shape == (32, 8)
    losses = [point.value for point in log]
    assert len(losses) == 25 and sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_loss_of_principal_components_is_the_variance_left_over() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    log: list[Point] = []
    pca = fit_autoencoder(x, PCAOptions(latent_size=5), log=log.append)
    left = torch.linalg.svdvals(x - x.mean(0))[5:].square().sum() / x.numel()
    assert pca.options == {"size": 8, "latent_size": 5}
    assert log[0].name == "autoencoder/loss" and log[0].value == pytest.approx(left.item(), rel=1e-4)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_early_stopping_restores_the_best(ema: float) -> None:
    """Four latents are soon memorised, which does not help on others."""
    g = torch.Generator().manual_seed(0)
    latents, heldout = torch.randn(4, 3, generator=g), torch.randn(50, 3, generator=g)
    options = QUICK | {"steps": 2000, "evaluate_every": 10, "schedule": "constant", "ema": ema, "patience": 3}
    log: list[Point] = []
    denoiser = fit_denoiser(latents, heldout, DiffusionOptions(**options), log=log.append)
    losses = [point.value for point in log if point.name == "diffusion/heldout_loss"]
    assert len(losses) == losses.index(min(losses)) + 1 + 3 < 200  # three evaluations after the best
    assert diffusion.heldout_loss(Flow(), denoiser, heldout) == pytest.approx(min(losses), rel=1e-5)
    assert not denoiser.training


@pytest.mark.slow
def test_the_best_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)
    g = torch.Generator().manual_seed(0)
    latents, heldout = torch.randn(4, 3, generator=g), torch.randn(50, 3, generator=g)
    options = QUICK | {"steps": 2000, "evaluate_every": 10, "schedule": "constant", "ema": 0.0, "patience": 3}

    def run(path: Path | None, stop: int = -1) -> tuple[dict[str, Tensor], list[Point]]:
        log: list[Point] = []

        def listen(point: Point) -> None:
            if point.step == stop:
                raise KeyboardInterrupt
            if point.name == "diffusion/heldout_loss":
                log.append(point)

        denoiser = fit_denoiser(latents, heldout, DiffusionOptions(**options), log=listen, path=path)
        return denoiser.state_dict(), log

    expected, log = run(None)
    stop = log[-1].step  # the evaluation that ends the training, after two others without a better loss
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.pt", stop)
    found, rest = run(tmp_path / "state.pt")
    assert rest == log[-1:]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_without_early_stopping_the_last_weights_count() -> None:
    g = torch.Generator().manual_seed(0)
    latents, heldout = torch.randn(4, 3, generator=g), torch.randn(50, 3, generator=g)
    options = DiffusionOptions(**QUICK | {"steps": 60, "evaluate_every": 10, "stop_on": "none"})
    log: list[Point] = []
    denoiser = fit_denoiser(latents, heldout, options, log=log.append)
    losses = [point.value for point in log if point.name == "diffusion/heldout_loss"]
    assert len(losses) == 6 and diffusion.heldout_loss(Flow(), denoiser, heldout) == pytest.approx(losses[-1], rel=1e-5)


class Scripted:
    """A preview that finds given nearest ratios, one after the other; the weights that it saw are kept."""

    def __init__(self, ratios: list[float]) -> None:
        self.ratios, self.seen = iter(ratios), []

    def __call__(self, denoiser: nn.Module) -> diffusion.Diagnostics:
        self.seen.append({name: t.clone() for name, t in denoiser.state_dict().items()})
        return diffusion.Diagnostics(1.0, next(self.ratios), 0.9)


def stopped_by(ratios: list[float], *, log: Log = ignore, path: Path | None = None) -> tuple[Scripted, nn.Module]:
    """Fifty-five steps on nothing held out, with an evaluation every ten, ended by `memorising`."""
    options = QUICK | {"steps": 55, "evaluate_every": 10, "stop_on": "memorising", "heldout_fraction": 0.0}
    z, preview = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), Scripted(ratios)
    denoiser = fit_denoiser(z, z[:0], DiffusionOptions(**options), log=log, path=path, preview=preview)
    return preview, denoiser


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize(("ratios", "kept"), [([0.9, 0.8, 0.4, 0.9], 1), ([0.9, 0.44], 0), ([0.1], 0)])
def test_memorising_ends_the_training_and_keeps_the_evaluation_before(ratios: list[float], kept: int) -> None:
    log: list[Point] = []
    preview, denoiser = stopped_by(ratios, log=log.append)
    found = [point.value for point in log if point.name == "diffusion/nearest_ratio"]
    assert found == ratios[: len(found)] and found[-1] < 0.45 <= min([*found[:-1], 1.0])
    assert same(denoiser.state_dict(), preview.seen[kept])


def test_without_copies_memorising_keeps_the_last_weights() -> None:
    preview, denoiser = stopped_by([0.9] * 5)
    assert len(preview.seen) == 5 and not same(denoiser.state_dict(), preview.seen[-1])  # five steps later


@pytest.mark.slow
@pytest.mark.parametrize("stop", [20, 30])
def test_what_memorising_keeps_survives_an_interruption(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)
    ratios = [0.9, 0.8, 0.4]
    _, expected = stopped_by(ratios)

    def interrupt(point: Point) -> None:
        if point == Point("diffusion/dispersion", 1.0, stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_by(ratios, log=interrupt, path=tmp_path / "state.pt")
    preview, found = stopped_by(ratios[stop // 10 - 1 :], path=tmp_path / "state.pt")
    assert len(preview.seen) == 4 - stop // 10  # the interrupted evaluation, and those after it
    assert same(found.state_dict(), expected.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_previews_do_not_change_the_training(ema: float) -> None:
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    options = QUICK | {"steps": 40, "stop_on": "none", "heldout_fraction": 0.0, "ema": ema}
    often, never = (
        fit_denoiser(z, z[:0], DiffusionOptions(**options | {"evaluate_every": every})).state_dict()
        for every in (1, 1000)
    )
    assert same(often, never)


@pytest.mark.parametrize("part", ["autoencoder", pytest.param("denoiser", marks=pytest.mark.slow)])
def test_an_interrupted_fit_ends_with_the_same_weights(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    logged: list[int] = []

    def run(path: Path | None, stop: int = -1) -> dict[str, Tensor]:
        def log(point: Point) -> None:
            logged.append(point.step)
            if point.step == stop:
                raise KeyboardInterrupt

        if part == "autoencoder":
            return fit_autoencoder(
                x, ConvAutoencoderOptions(latent_size=2, steps=6, batch_size=5), log=log, path=path
            ).state_dict()
        options = DiffusionOptions(steps=6, batch_size=5, evaluate_every=2)
        parts = {"log": log, "path": path, "denoiser": ConvDenoiserOptions()}
        return fit_denoiser(x[:12], x[12:], options, **parts).state_dict()

    expected = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.pt", stop=4)
    logged.clear()
    found = run(tmp_path / "state.pt")
    assert logged[0] == 4  # step 4 was not saved yet
    assert expected.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("kind", [pytest.param("conv", marks=pytest.mark.slow), "pca"])
def test_one_checkpoint_is_enough(kind: str) -> None:
    """All that can be learnt of one checkpoint is that checkpoint."""
    collection = gaussian_collection(1)
    conv = ConvAutoencoderOptions(latent_size=4, steps=60, learning_rate=2e-3, batch_size=8)
    kept, held = heldout_split(1, 0.1, seed=0)
    assert (kept.tolist(), held.tolist()) == ([0], [])
    options = LatentDiffusionOptions(
        autoencoder=conv if kind == "conv" else PCAOptions(latent_size=4),
        denoiser=SMALL,
        diffusion=DiffusionOptions(**QUICK | {"steps": 100}),
    )
    generator = Generator.fit(collection, options)
    vectors = generator.standardizer.encode(collection)
    sampled = generator.standardizer.encode(generator.sample(4, sampler="heun", sampling_steps=10))
    assert (sampled - vectors).square().mean().sqrt() < 0.3  # of the standard deviation within the checkpoint


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5])
def test_heldout_checkpoints_are_disjoint_and_all_are_used(fraction: float) -> None:
    for count in range(1, 60):
        for seed in range(3):
            kept, held = (part.tolist() for part in heldout_split(count, fraction, seed=seed))
            assert sorted(kept + held) == list(range(count))
            assert kept == sorted(kept) and held == sorted(held)
            assert len(held) == min(round(count * fraction), max(count - 2, 0))
    first, again, other = (heldout_split(300, 0.1, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and first.tolist() != (other.tolist() if fraction else [])


def test_latents_are_scaled_by_component() -> None:
    latents = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    mean, std = latent_scale(latents, standardize=True)
    assert mean.tolist() == [3, 5] and std.tolist() == [2, 1]  # a constant component is not divided by zero
    mean, std = latent_scale(latents, standardize=False)
    assert mean.tolist() == [0, 0] and std.tolist() == [1, 1]


def test_sampling_undoes_scale_autoencoder_and_standardisation() -> None:
    """A denoiser that always predicts one latent: the generated network is the one that this latent stands for."""

    class One(nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return torch.tensor([[1.0, -1.0]]).expand(len(z), 2)

    collection = gaussian_collection(10)
    standardizer = Standardizer.fit(collection)
    autoencoder = fit_autoencoder(standardizer.encode(collection), PCAOptions(latent_size=2))
    mean, std = torch.tensor([0.5, 0.25]), torch.tensor([2.0, 4.0])
    generator = LatentDiffusion(standardizer, autoencoder, mean, std, One(), Sample())
    (sampled,) = generator.sample(1, sampler="ddim", sampling_steps=4)
    vector = autoencoder.center + 2.5 * autoencoder.components[0] - 3.75 * autoencoder.components[1]
    a, b = standardizer.slots
    assert torch.allclose(sampled["a"].flatten(), vector[:8] * a.std + a.mean, atol=1e-3)
    assert torch.allclose(sampled["b"], vector[8:] * b.std + b.mean, atol=1e-3)


@pytest.mark.slow
def test_a_gaussian_has_the_moments_of_the_collection(tmp_path: Path) -> None:
    originals = gaussian_collection(400)
    for options in (GaussianOptions(), GaussianOptions(diagonal=True), GaussianOptions(scale=0.5)):
        generator = Generator.fit(originals, options)
        assert isinstance(generator, Gaussian)
        x = generator.standardizer.encode(originals).double()
        covariance = torch.cov(x.T) * options.scale**2
        if options.diagonal:
            covariance = covariance.diagonal().diag()
        exact = (generator.std * generator.scale).double() ** 2
        basis = torch.eye(12, dtype=torch.float64) if options.diagonal else generator.components.double()
        torch.testing.assert_close(basis.T @ exact.diag() @ basis, covariance, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(generator.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
        new = generator.standardizer.encode(generator.sample(4000, seed=1)).double()
        torch.testing.assert_close(torch.cov(new.T), covariance, rtol=0.15, atol=0.15 * covariance.abs().max().item())
        generator.save(tmp_path)
        again = Generator.load(tmp_path).sample(3, seed=5)
        for name, tensor in generator.sample(3, seed=5).tensors.items():
            assert torch.equal(tensor, again.tensors[name])


@pytest.mark.parametrize("options", [GaussianOptions(), GaussianOptions(diagonal=True)])
def test_a_gaussian_of_one_checkpoint_or_of_equal_ones_gives_it_again(options: GaussianOptions) -> None:
    first = gaussian_collection(2).select([0])
    for originals in (first, Collection.concatenate([first] * 5)):
        (new,) = Generator.fit(originals, options).sample(1)
        for name, tensor in new.items():
            torch.testing.assert_close(tensor, first[0][name])


def test_samples_are_ordinary_tensors(fitted: Generator) -> None:
    for generator in (fitted, Generator.fit(gaussian_collection(20), GaussianOptions())):
        new = generator.sample(2)
        weights, constants = new.tensors["a"], new.tensors["n"]
        weights[0], constants[0] = 0.0, 7
        assert constants[1] == generator.sample(1).tensors["n"][0] == 0  # neither another network nor the generator
        (weights.requires_grad_() * weights).sum().backward()
        assert torch.equal(weights.grad, 2 * weights)


def test_options_of_another_kind_are_no_options_of_sampling() -> None:
    with pytest.raises(TypeError, match="sampler"):
        Generator.fit(gaussian_collection(20), GaussianOptions()).sample(1, sampler="heun")


@pytest.mark.parametrize("sampler", ["heun", "euler"])
def test_a_trajectory_ends_with_the_samples(fitted: LatentDiffusion, sampler: str) -> None:
    options = {"seed": 3, "sampler": sampler, "sampling_steps": 9}
    timesteps, networks = zip(*fitted.trajectory(2, every=4, **options), strict=True)
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert timesteps[0] == 1000 and timesteps[-1] == 0  # from noise to data
    assert len(timesteps) == 4  # after 0, 4, 8 calls of the denoiser, and the samples
    for name, tensor in fitted.sample(2, **options).tensors.items():
        torch.testing.assert_close(networks[-1].tensors[name], tensor)
        assert not tensor.is_floating_point() or not torch.allclose(networks[0].tensors[name], tensor)


def test_without_a_denoiser_there_is_no_trajectory() -> None:
    generator = fit(gaussian_collection(20), steps=0)
    assert len(generator.sample(2)) == 2 and generator.denoiser is None
    with pytest.raises(ValueError, match="has no denoiser"):
        next(generator.trajectory(2, every=1))


@pytest.mark.parametrize("options", [GaussianOptions(), LatentDiffusionOptions(denoiser=SMALL)])
def test_network_k_depends_on_its_number_and_the_seed(options) -> None:
    options = options.model_copy(update={"diffusion": DiffusionOptions(**QUICK | {"steps": 20})})
    generator = Generator.fit(gaussian_collection(40), options)
    whole, part = generator.sample(5, seed=3), generator.sample(2, seed=3, first=2)
    for name, tensor in part.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name][2:4])
    other = generator.sample(5, seed=4)
    assert not torch.allclose(whole.tensors["a"], other.tensors["a"])
    with pytest.raises(ValueError, match="count >= 1 must hold, but got 0"):
        generator.sample(0)


def test_what_the_check_raises_ends_the_fit_before_the_diffusion() -> None:
    log: list[Point] = []

    def check(reconstruct) -> None:
        assert torch.allclose(reconstruct(originals).tensors["b"], originals.tensors["b"], atol=0.5)
        raise ValueError("too inaccurate")

    originals = gaussian_collection(40)
    with pytest.raises(ValueError, match="too inaccurate"):
        Generator.fit(originals, LatentDiffusionOptions(), log=log.append, check=check)
    assert not any(point.name.startswith("diffusion/") for point in log)
