"""Populations of several networks: described, held out as wholes, aligned, evaluated."""

import pytest
import torch

from pdiff.cli.main import main as pdiff
from pdiff.errors import Damaged, UserError
from pdiff.experiment import config, prepare, prepared, stages
from pdiff.experiment.evaluate import aligned
from pdiff.experiment.population import Population
from pdiff.files import read_json, read_tensors
from pdiff.method.alignment.groups import permute
from pdiff.method.collection import Collection, heldout_split
from pdiff.networks.predict import predictions

SEEDS = """
dataset: {name: digits}
network: {architecture: mlp}
prepare:
  collect: {from: seeds, networks: 12, steps: 60, snapshots: 2}
diffusion: {steps: 20, evaluate_every: 10}
generate: {count: 4}
evaluate: {baselines: [midpoint, average], baseline_count: 3}
"""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """An experiment on networks from independent seeds, and the folder of its prepared collection."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "seeds.yaml").write_text(SEEDS)
    experiment = config.load(str(folder / "seeds.yaml"))
    (folder / "prepare").mkdir()
    sizes = stages.run("prepare", experiment, folder / "prepare", log=lambda point: None)
    assert sizes["checkpoints"] == 22 and sizes["heldout_checkpoints"] == 2
    return experiment, folder / "prepare"


def test_nothing_is_pretrained_for_independent_seeds(seeds):
    experiment, _ = seeds
    assert stages.needed("evaluate", experiment) == ["prepare", "train", "generate", "originals", "evaluate"]


def test_the_manifest_says_where_every_checkpoint_comes_from(seeds):
    _, folder = seeds
    population = Population.load(folder)
    assert population.kind == "seeds" and population.recipe["networks"] == 12
    assert population.trained_on == {"dataset": "digits", "images": read_json(folder / "dataset.json")["train"]}
    assert population.describe() == "12 networks from independent seeds, 2 checkpoints of each"
    assert population.column("step") == [30, 60] * 11 and population.column("step", heldout=True) == [30, 60]
    fitted, heldout = (read_json(folder / f"{name}.json")["checkpoints"] for name in ("checkpoints", "heldout"))
    assert population.column("name") == fitted and population.column("name", heldout=True) == heldout
    assert not set(population.column("network")) & set(population.column("network", heldout=True))
    accuracies = population.column("val_accuracy")
    assert all(0.1 < accuracy <= 1 for accuracy in accuracies) and accuracies[0] < accuracies[1]
    with pytest.raises(UserError, match="no column depth, expected one of name, network, seed, step, val_accuracy"):
        population.column("depth")


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "population.json").write_text('{"kinds": 1}')
    with pytest.raises(Damaged, match=r"population\.json"):
        Population.load(tmp_path)


def test_stored_networks_are_aligned_and_can_be_given_back(seeds):
    experiment, folder = seeds
    reference = prepared.reference(experiment, folder)
    for part in ("checkpoints", "heldout"):
        stored = Collection.load(folder / f"{part}.safetensors")
        aligned, _ = reference.align(stored)
        for name, tensor in aligned.tensors.items():
            torch.testing.assert_close(tensor, stored.tensors[name], rtol=1e-4, atol=1e-5)
    assert {name.partition("/")[0] for name in read_tensors(folder / "alignment.safetensors")} == {
        *("reference", "permutation", "scale")
    }


def test_generated_networks_predict_what_they_did_once_they_are_aligned(seeds):
    """Noisy copies of originals in another order of units; aligned, they lie where the originals do."""
    experiment, folder = seeds
    originals = prepared.original_networks(experiment, folder)
    groups, images = prepared.unit_groups(experiment, folder), prepared.load_images(experiment)
    generator = torch.Generator().manual_seed(0)
    noisy = originals.map(lambda t: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator))
    orders = {g.name: torch.stack([torch.randperm(g.size, generator=generator) for _ in noisy]) for g in groups}
    shuffled = permute(noisy, groups, orders)
    found = aligned(prepared.reference(experiment, folder), {"generated": shuffled})["generated"]
    network = prepared.base_network(experiment, images, folder)
    before, after = (predictions(network, networks, images.validation) for networks in (shuffled, found))
    assert (before == after).float().mean() > 0.999
    near, far = (
        sum((networks.tensors[name] - tensor).square().sum() for name, tensor in originals.tensors.items())
        for networks in (found, shuffled)
    )
    assert near < 0.1 * far


def test_heldout_networks_have_no_part_in_the_reference(seeds, tmp_path, monkeypatch):
    """Poison in their place changes nothing that is fitted or aligned to."""
    experiment, clean = seeds
    held = [int(name) for name in read_json(clean / "heldout.json")["checkpoints"]]
    collected = prepare._collected

    def poisoned(*args):
        collection, known = collected(*args)
        for tensor in collection.tensors.values():
            tensor[held] = 1e6
        return collection, known

    monkeypatch.setattr(prepare, "_collected", poisoned)
    stages.run("prepare", experiment, tmp_path, log=lambda point: None)
    for name, tensor in read_tensors(clean / "checkpoints.safetensors").items():
        assert torch.equal(read_tensors(tmp_path / "checkpoints.safetensors")[name], tensor), name
    of_reference = {
        n: t for n, t in read_tensors(clean / "alignment.safetensors").items() if n.startswith("reference/")
    }
    for name, tensor in of_reference.items():
        assert torch.equal(read_tensors(tmp_path / "alignment.safetensors")[name], tensor), name
    assert (read_tensors(tmp_path / "heldout.safetensors")["1.weight"] == 1e6).any() and of_reference


@pytest.mark.parametrize("per_run", [1, 3])
def test_whole_runs_are_held_out(per_run):
    groups = [f"run {index // per_run}" for index in range(20 * per_run)]
    fitted, heldout = heldout_split(20 * per_run, 0.2, seed=0, groups=groups)
    assert len(heldout) == 4 * per_run and sorted([*fitted.tolist(), *heldout.tolist()]) == list(range(20 * per_run))
    assert len({index // per_run for index in heldout.tolist()}) == 4
    assert heldout.tolist() != heldout_split(20 * per_run, 0.2, seed=1, groups=groups)[1].tolist()


def test_runs_of_any_length_and_order_are_held_out_whole():
    groups = [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, *range(4, 10)]
    fitted, heldout = heldout_split(len(groups), 0.5, seed=3, groups=groups)
    held = {groups[k] for k in heldout.tolist()}
    assert len(held) == 5 and not held & {groups[k] for k in fitted.tolist()}


def test_of_one_run_blocks_are_held_out():
    assert heldout_split(40, 0.2, seed=0, groups=["a"] * 40)[1].tolist() == heldout_split(40, 0.2, seed=0)[1].tolist()


@pytest.mark.parametrize(("count", "per_run", "left"), [(2, 1, 2), (3, 1, 2), (4, 2, 2), (2, 2, 2)])
def test_two_checkpoints_are_left_to_fit_on(count, per_run, left):
    groups = [index // per_run for index in range(count)]
    assert len(heldout_split(count, 0.5, seed=0, groups=groups)[0]) == left


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prepare.collect.checkpoints", "5", "prepare.collect.checkpoints"),
        ("prepare.pretrain.epochs", "5", "prepare.pretrain: belongs to prepare.collect.from trajectory or branches"),
        ("prepare.collect.from", "moon", "prepare.collect.from"),
        ("prepare.parameters", "3.weight", "prepare.parameters must be all where prepare.collect.from is seeds"),
        ("prepare.collect.snapshots", "61", r"snapshots <= steps must hold, but got \(61, 60\)"),
        ("generator.checkpoints", "25", "generator.checkpoints <= prepare.collect.networks"),
    ],
)
def test_what_cannot_be_is_refused(seeds, tmp_path, key, value, message):
    (tmp_path / "seeds.yaml").write_text(SEEDS)
    with pytest.raises(UserError, match=message):
        config.load(str(tmp_path / "seeds.yaml"), {key: value})


@pytest.mark.slow
def test_main_from_independent_seeds_and_from_branches(workspace, capsys):
    (workspace / "seeds.yaml").write_text(SEEDS)
    assert pdiff(["main", "--tag", "seeds.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "midpoint" in printed and "generated" in printed
    branches = ["--prepare.collect.from", "branches", "--prepare.collect.steps", "5", "--prepare.pretrain.epochs", "1"]
    assert pdiff(["main", "--tag", "seeds.yaml", *branches]) == 0
