"""Diffusion of neurons on networks whose units come from a known distribution, in random order."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.files import read_tensors, write_tensors
from pdiff.method import training
from pdiff.method.alignment.groups import Groups, balance
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection
from pdiff.method.denoisers import GraphDenoiserOptions
from pdiff.method.generators import Behaviour, NeuronsOptions, NeuronsTraining, Tokenization
from pdiff.method.generators.base import Generator
from pdiff.method.generators.conditions import Conditions, Guided
from pdiff.method.generators.neurons import Neurons
from pdiff.method.log import Point, ignore

UNITS = 4
SMALL = GraphDenoiserOptions(width=32, blocks=2, heads=2, edge_width=8)
QUICK = {"steps": 4, "batch_size": 16, "evaluate_every": 2}


def groups() -> Groups:
    network = nn.Sequential(nn.Linear(2, UNITS), nn.ReLU(), nn.Linear(UNITS, 2))
    return permutation_groups(network, torch.zeros(1, 2))


def two_kinds(count: int) -> tuple[Collection, Tensor]:
    """Networks whose units are of two kinds, two of each in random order, and how large the output bias is.

    The incoming weights of a unit are near (2, 2) or (-2, -2), its outgoing ones near (1, -1) or (-1, 1).
    """
    g = torch.Generator().manual_seed(0)
    sign = torch.stack([torch.tensor([1.0, 1, -1, -1])[torch.randperm(UNITS, generator=g)] for _ in range(count)])
    level = torch.randn(count, 1, generator=g)

    def noise(*shape: int) -> Tensor:
        return 0.1 * torch.randn(count, *shape, generator=g)

    outgoing = torch.tensor([1.0, -1.0])[:, None] * sign[:, None]
    tensors = {"0.weight": 2 * sign[:, :, None] + noise(UNITS, 2), "0.bias": 1 + noise(UNITS)}
    tensors |= {"2.weight": outgoing + noise(2, UNITS), "2.bias": level + noise(2)}
    return Collection(tensors), level


def fit(collection: Collection, *, log=ignore, state: Path | None = None, conditions=None, **options) -> Neurons:
    columns = ("level",) if conditions is not None else ()
    known = {"groups": groups()} | ({} if conditions is None else {"conditions": conditions})
    balanced = options.pop("balance", False)
    chosen = NeuronsOptions(
        tokens=Tokenization(balance=balanced, condition=columns),
        denoiser=SMALL,
        diffusion=NeuronsTraining(**QUICK | options),
    )
    return Generator.fit(collection, chosen, log=log, state=state, **known)


@pytest.fixture(scope="module")
def fitted() -> Neurons:
    return fit(two_kinds(40)[0])


@pytest.mark.slow
def test_generated_units_are_of_two_kinds_two_of_each_in_any_order() -> None:
    generator = fit(two_kinds(1000)[0], steps=500, batch_size=64, learning_rate=5e-3, evaluate_every=500)
    sampled = generator.sample(200, sampling_steps=40).tensors
    kind = sampled["0.weight"].mean(2).sign()
    assert (kind.sum(1) == 0).float().mean() > 0.9  # two of each: units know of each other
    assert abs(kind.mean(0)).max() < 0.25  # in any order
    assert ((sampled["0.weight"] - 2 * kind[:, :, None]).abs() < 1).float().mean() > 0.95
    assert (sampled["2.weight"][:, 0].sign() == kind).float().mean() > 0.95
    difference = sampled["2.bias"][:, 0] - sampled["2.bias"][:, 1]
    assert difference.std() < 0.5 * sampled["2.bias"].std()


@pytest.mark.slow
def test_networks_are_as_they_are_asked_to_be(tmp_path: Path) -> None:
    collection, level = two_kinds(1000)
    options = {"steps": 400, "batch_size": 64, "learning_rate": 5e-3, "evaluate_every": 400}
    fit(collection, conditions=level, **options).save(tmp_path)
    generator = Generator.load(tmp_path)
    for asked in (-1.0, 0.0, 1.0):
        found = generator.sample(64, condition={"level": asked}).tensors["2.bias"].mean().item()
        assert found == pytest.approx(asked, abs=0.35)
    top = generator.conditions.values[2].item()
    assert top == pytest.approx(level.flatten().quantile(0.95).item(), abs=0.1)
    asked, default = (generator.sample(8, condition=c).tensors["2.bias"] for c in ({"level": top}, {}))
    torch.testing.assert_close(asked, default)
    free = generator.sample(200, guidance=0.0).tensors["2.bias"]
    assert abs(free.mean()) < 0.4 and 0.6 < free.std() < 1.4
    with pytest.raises(ValueError, match="condition width: the generator is conditioned on level"):
        generator.sample(1, condition={"width": 1.0})


def test_conditions_are_measured_where_they_are_known() -> None:
    column = torch.tensor([[1.0], [3.0], [torch.nan], [5.0]])
    conditions = Conditions.fit(("a",), column)
    assert conditions.values.flatten().tolist() == pytest.approx([3, math.sqrt(8 / 3), 3])
    assert conditions.encode(column).isnan().flatten().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="condition a: no network has a value"):
        Conditions.fit(("a",), column[2:3])
    with pytest.raises(ValueError, match="expected 2 conditions of every network, but got 1"):
        Conditions.fit(("a", "b"), column)


def test_guidance_extrapolates() -> None:
    def denoiser(z: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return z if condition is None else z + condition

    z, asked = torch.randn(3, 1), torch.tensor([[2.0]])
    for guidance in (0.0, 1.0, 2.5):
        module = Guided(nn.Identity(), asked, guidance)
        del module.denoiser
        module.denoiser = denoiser
        torch.testing.assert_close(module(z, torch.zeros(3)), z + 2 * guidance)


@pytest.mark.slow
def test_balanced_networks_are_fitted_and_their_predictions_stay() -> None:
    collection, _ = two_kinds(30)
    scaled = dict(collection.tensors)
    factor = torch.rand(30, UNITS, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled["0.weight"] = scaled["0.weight"] * factor[:, :, None]
    scaled["0.bias"], scaled["2.weight"] = scaled["0.bias"] * factor, scaled["2.weight"] / factor[:, None]
    a, b = (fit(c, balance=True).tokens for c in (collection, Collection(scaled)))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.std, b.std, rtol=1e-3, atol=1e-4)
    whole = fit(balance(collection, groups())[0]).tokens
    torch.testing.assert_close(a.std, whole.std, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_loaded_generator_samples_the_same_and_network_k_depends_on_its_number(
    fitted: Neurons, tmp_path: Path
) -> None:
    fitted.save(tmp_path)
    loaded = Generator.load(tmp_path)
    options = {"seed": 3, "sampler": "euler", "sampling_steps": 4}
    whole, part = fitted.sample(5, **options), loaded.sample(2, first=2, **options)
    assert list(whole.tensors) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, tensor in part.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name][2:4])
    assert not torch.allclose(whole.tensors["0.bias"], fitted.sample(5, seed=4).tensors["0.bias"])
    assert loaded.sizes() == {"latent_size": 22} and not loaded.compresses and list(loaded.modules()) == ["diffusion"]
    assert loaded.modules()["diffusion"][0](torch.zeros(2, 23)).shape == (2, 22)
    *_, (t, last) = loaded.trajectory(2, every=2, **options)
    assert t == 0
    torch.testing.assert_close(last.tensors["0.bias"], whole.tensors["0.bias"][:2])


@pytest.mark.slow
def test_an_interrupted_fit_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)
    collection, level = two_kinds(40)
    expected = fit(collection, conditions=level).tensors()

    def interrupt(point: Point) -> None:
        if point == ("diffusion/loss", point.value, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(collection, conditions=level, log=interrupt, state=tmp_path)
    found = fit(collection, conditions=level, state=tmp_path).tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_behaviour_compares_denoised_networks_with_the_true_ones() -> None:
    """Outputs that ask for a larger bias than the true one shift the bias of denoised networks, and nothing else."""
    collection, _ = two_kinds(200)
    seen = []

    def outputs(found: dict[str, Tensor], true: dict[str, Tensor]) -> Tensor:
        seen.append({name: (tensor.shape, true[name].shape, true[name]) for name, tensor in found.items()})
        return (found["2.bias"] - true["2.bias"] - 1).square().mean(dim=1)

    def denoised(weight: float) -> dict[str, Tensor]:
        options = NeuronsOptions(
            tokens=Tokenization(balance=False),
            denoiser=SMALL,
            diffusion=NeuronsTraining(**QUICK | {"steps": 100, "ema": 0.0}),
            behaviour=Behaviour(behaviour=weight),
        )
        made = Generator.fit(collection, options, groups=groups(), **({"outputs": outputs} if weight else {}))
        z = made.tokens.encode(made.standardizer.encode(collection))
        torch.manual_seed(1)
        z_t, t, _ = made.objective.add_noise(z, torch.randn_like(z), torch.full((200,), 0.5))
        with torch.no_grad():
            z_0 = made.objective.denoised(z_t, t, made.denoiser(z_t, t))
        return {name: tensor.mean() for name, tensor in made.standardizer.tensors(made.decode(z_0)).items()}

    plain, shifted = denoised(0.0), denoised(100.0)
    assert 0.5 < shifted.pop("2.bias") - plain["2.bias"] < 1.5
    assert all(abs(value - plain[name]) < 0.2 for name, value in shifted.items())
    for name, (shape, same, true) in seen[0].items():
        assert shape == same == (16, *collection.tensors[name].shape[1:])
        differences = true.flatten(1)[:, None] - collection.tensors[name].flatten(1)
        assert differences.abs().amax(dim=2).min(dim=1).values.max() < 1e-5  # each is a network of the collection


@pytest.mark.parametrize("count", [1, 3])
def test_few_networks_are_enough(count: int) -> None:
    assert len(fit(two_kinds(count)[0]).sample(2)) == 2


def test_what_cannot_be_fitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    collection, _ = two_kinds(10)
    with pytest.raises(ValueError, match="NeuronsOptions: fit needs groups, but got none"):
        Generator.fit(collection, NeuronsOptions())
    with pytest.raises(ValueError, match="no interchangeable units"):
        Generator.fit(Collection({"0.bias": collection.tensors["0.bias"]}), NeuronsOptions(), groups=groups())
    options = NeuronsOptions(tokens=Tokenization(condition=("level",)))
    with pytest.raises(ValueError, match="fit needs conditions, but got none"):
        Generator.fit(collection, options, groups=groups())
    options = NeuronsOptions(behaviour=Behaviour(behaviour=0.1))
    with pytest.raises(ValueError, match="fit needs outputs, but got none"):
        Generator.fit(collection, options, groups=groups())


def test_edges_that_need_too_much_memory_are_refused() -> None:
    network = nn.Sequential(nn.Linear(2, 400), nn.ReLU(), nn.Linear(400, 500), nn.ReLU(), nn.Linear(500, 2))
    collection = Collection.stack([network.state_dict()])
    options = NeuronsOptions(diffusion=NeuronsTraining(batch_size=10**6))
    with pytest.raises(UserError, match=r"the 200000 pairs of units need at least 8.19e\+05 GB of memory"):
        Generator.fit(collection, options, groups=permutation_groups(network, torch.zeros(1, 2)))


HOW = ["without order", "no permutation", "a deviation of 0", "other tokens", "other conditions", "an unknown option"]


@pytest.mark.parametrize("how", HOW)
def test_damaged_files_are_refused(fitted: Neurons, tmp_path: Path, how: str) -> None:
    fitted.save(tmp_path)
    path, index = tmp_path / "generator.safetensors", tmp_path / "generator.json"
    tensors, description = read_tensors(path), json.loads(index.read_text())
    if how == "without order":
        del tensors["order"]
    elif how == "no permutation":
        tensors["order"][0] = tensors["order"][1]
    elif how == "a deviation of 0":
        tensors["std"][0] = 0.0
    elif how == "other tokens":
        description["denoiser"]["layout"]["nodes"] = [[4, 6]]
    elif how == "other conditions":
        description["conditions"] = ["level"]
    else:
        description["denoiser"]["depth"] = 3
    write_tensors(path, tensors)
    index.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="generator"):
        Generator.load(tmp_path)
