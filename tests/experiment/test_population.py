"""Populations of several networks: described, held out as wholes, aligned, evaluated."""

from pathlib import Path

import pytest
import torch
import yaml
from tracked import artifacts, runs, start, wait_for

from pdiff.cli.main import main as pdiff
from pdiff.errors import Damaged, UserError
from pdiff.experiment import config, prepare, prepared, stages
from pdiff.experiment.evaluate import aligned
from pdiff.experiment.population import Population
from pdiff.files import read_json, read_tensors
from pdiff.method.alignment.groups import permute
from pdiff.method.collection import Collection, heldout_split
from pdiff.networks import populations
from pdiff.networks.architectures import build
from pdiff.networks.options import TrajectoryOptions
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_heldout_networks_have_no_part_in_the_reference(seeds, tmp_path, monkeypatch):
    """Poison in their place changes nothing that is fitted or aligned to."""
    experiment, clean = seeds
    held = Population.load(clean).heldout
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
    assert (read_tensors(tmp_path / "heldout.safetensors")["1.weight"] > 1e5).all() and of_reference


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


def test_runs_of_any_length_are_held_out_as_wholes_and_one_of_few():
    runs = [0] * 7 + [5] * 20 + [2] * 13
    for seed in range(5):
        fitted, heldout = heldout_split(40, 0.1, seed=seed, groups=runs)
        assert len({runs[index] for index in heldout.tolist()}) == 1 and len(fitted) + len(heldout) == 40
        assert not {runs[index] for index in heldout.tolist()} & {runs[index] for index in fitted.tolist()}
    assert not len(heldout_split(40, 0.0, seed=0, groups=runs)[1])


def test_equal_checkpoints_are_held_out_together():
    equal = [*range(30), *range(30)]  # every one has a copy
    fitted, heldout = (part.tolist() for part in heldout_split(60, 0.1, seed=0, equal=equal))
    assert heldout and not {equal[index] for index in fitted} & {equal[index] for index in heldout}
    assert not len(heldout_split(4, 0.5, seed=0, equal=[0, 1, 0, 1])[1])  # no two different ones would be left


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


@pytest.mark.slow
def test_killed_again_and_again_a_collection_from_seeds_ends_with_the_same_networks(workspace):
    """kill -9 when there is a new file of finished networks or of a training; then once more, from the start."""
    experiment = yaml.safe_load(SEEDS) | {"network": {"architecture": "cnn_small"}}  # one after the other: BatchNorm
    (workspace / "seeds.yaml").write_text(yaml.safe_dump(experiment))
    state, seen, kills = workspace / ".pdiff", set(), 0

    def new_files() -> set[str]:
        return {path.name for path in state.glob("*/.state/collect/*_*") if path.name[0] != "."} - seen

    while kills < 3:
        process = start("prepare", "--tag", "seeds.yaml", PDIFF_SAVE_SECONDS="0.02")
        wait_for(new_files, process)
        seen |= new_files()
        process.kill()
        process.wait()
        kills += 1
    assert any(name.endswith(".safetensors") for name in seen)
    for options in ([], ["--fresh"]):
        process = start("prepare", "--tag", "seeds.yaml", *options)
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        assert ("resuming" in printed) == (not options)
    resumed, undisturbed = [artifacts(run) for run in runs("prepare") if run.info.status == "FINISHED"]
    for name in ("checkpoints", "heldout"):
        found, expected = (read_tensors(folder / f"{name}.safetensors") for folder in (resumed, undisturbed))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_json(resumed / "population.json") == read_json(undisturbed / "population.json")
    assert not list(state.glob("*/.state/collect/*"))


def files(collection: Collection, folder: Path) -> Path:
    """A folder with a file for each network."""
    folder.mkdir()
    for k, state in enumerate(collection):
        torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / f"{k:03d}.pth")
    return folder


@pytest.fixture
def prepare_files(tmp_path):
    """Prepares the files of a folder, and reads the description of the population."""

    def prepared_(source: Path, **options) -> Population:
        keys = {f"prepare.{key}": value for key, value in ({"source": str(source)} | options).items()}
        (tmp_path / "files.yaml").write_text("{dataset: {name: digits}, network: {architecture: mlp}}")
        out = tmp_path / "_".join(["prepare", *options.values()])
        out.mkdir()
        stages.run("prepare", config.load(str(tmp_path / "files.yaml"), keys), out, log=lambda point: None)
        return Population.load(out)

    return prepared_


@pytest.mark.slow
def test_files_of_independent_seeds_are_recognised_held_out_as_wholes_and_aligned(seeds, tmp_path, prepare_files):
    _, folder = seeds
    originals = Collection.load(folder / "checkpoints.safetensors")  # 11 networks of 2 snapshots each
    source = files(Collection.concatenate([originals, originals.select([5])]), tmp_path / "files")
    population = prepare_files(source)
    assert population.kind == "seeds" and population.recipe == {} and population.measured["origins"] == 11
    assert population.columns["network"] == [k for k in range(11) for _ in range(2)] + [2]
    assert population.describe() == "11 networks from independent seeds, 2 to 3 checkpoints of each, 1 of them copies"
    assert len(population.heldout) in (2, 3)
    assert not set(population.column("network")) & set(population.column("network", heldout=True))
    assert not set(population.column("digest")) & set(population.column("digest", heldout=True))
    assert (tmp_path / "prepare" / "alignment.safetensors").exists()
    with pytest.raises(
        UserError, match=r"prepare\.population branches: the files in .* look like seeds: 22 different networks"
    ):
        prepare_files(source, population="branches")


@pytest.mark.slow
def test_files_of_one_training_are_recognised_unless_they_are_held_to_be_something_else(
    tmp_path, prepare_files, digits
):
    torch.manual_seed(0)
    network = build("mlp", pretrained=False, classes=10, channels=1, image_size=8)
    names, settings = list(network.state_dict()), TrajectoryOptions(checkpoints=12, every_steps=3)
    steps = populations.collect(network, digits, settings, names, seed=0, log=lambda point: None)
    source = files(steps, tmp_path / "files")
    population = prepare_files(source)
    assert population.kind == "trajectory" and "network" not in population.columns
    assert population.describe() == "12 checkpoints on the way of one training"
    assert not (tmp_path / "prepare" / "alignment.safetensors").exists()
    message = (
        r"population seeds: .* look like trajectory: 12 different networks of one initialisation, .* \(1 if their order"
    )
    with pytest.raises(UserError, match=message):
        prepare_files(source, population="seeds")


def test_only_files_are_held_to_be_something(tmp_path):
    (tmp_path / "seeds.yaml").write_text(SEEDS)
    with pytest.raises(UserError, match=r"prepare\.population: needs prepare\.source"):
        config.load(str(tmp_path / "seeds.yaml"), {"prepare.population": "seeds"})
