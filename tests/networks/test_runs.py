"""Networks trained side by side against networks trained alone, and against themselves when interrupted."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdiff.method import training
from pdiff.method.log import ignore
from pdiff.method.training import make_optimizer, make_schedule, shuffled
from pdiff.networks import datasets, populations, runs
from pdiff.networks.architectures import build
from pdiff.networks.options import BranchesOptions, Dataset, SeedsOptions
from pdiff.seeds import stream

SMALL = {"networks": 5, "steps": 12, "batch_size": 32}


@pytest.fixture(scope="module")
def images():
    return datasets.load(Dataset(name="digits"))


def network(name: str = "mlp") -> nn.Module:
    return build(name, pretrained=False, classes=10, channels=1, image_size=8)


def collected(images, folder, settings, *, make=network, log=ignore, **options):
    names = populations.generated_names(make(), ["all"])
    options = {"seed": 3, "device": "cpu", "log": log, "folder": folder} | options
    return runs.train_all(lambda k: make().train(), images.train, settings, names, **options)


def assert_close(a, b) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(b.tensors[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """Sets how many networks are trained side by side."""
    return lambda count: monkeypatch.setattr(runs._Trainings, "_measured", lambda self: count)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "cosine"])
def test_side_by_side_as_one_network_in_a_plain_loop(images, tmp_path, together, optimizer, schedule):
    together(4)
    options = {"optimizer": optimizer, "schedule": schedule, "learning_rate": 1e-2, "weight_decay": 1e-2}
    settings = SeedsOptions(**SMALL, **options)
    found = collected(images, tmp_path, settings)
    for k, seed in ((2, stream(3, 2)), (4, stream(3, 4))):  # the last one is alone in its stack
        torch.manual_seed(stream(seed, "init"))
        alone = network().train()
        optimiser = make_optimizer(alone.parameters(), settings)
        rate = make_schedule(optimiser, settings, 12)
        x, y = (torch.cat(parts) for parts in zip(*images.train.batches(500), strict=True))
        for _, index in zip(range(12), shuffled(len(y), 32, seed=stream(seed, "batches")), strict=False):
            optimiser.zero_grad()
            F.cross_entropy(alone(x[index]), y[index]).backward()
            optimiser.step()
            rate.step()
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(found.collection[k][name], tensor, rtol=1e-3, atol=1e-4)
        assert found.columns["seed"][k] == seed


def test_a_network_depends_neither_on_the_others_nor_on_their_number(images, tmp_path, together):
    together(1)
    few = collected(images, tmp_path / "few", SeedsOptions(**SMALL | {"networks": 2}))
    together(5)
    many = collected(images, tmp_path / "many", SeedsOptions(**SMALL))
    assert_close(few.collection, many.collection.select(slice(2)))
    assert not torch.allclose(many.collection.tensors["1.weight"][0], many.collection.tensors["1.weight"][1], atol=0.01)


@pytest.mark.slow
def test_batch_normalisation_trains_each_network_alone_with_its_own_statistics(images, tmp_path):
    found = collected(images, tmp_path, SeedsOptions(**SMALL), make=lambda: network("cnn_small"))
    assert len(list(tmp_path.glob("*_*.safetensors"))) == 5
    assert found.collection.tensors["1.num_batches_tracked"].tolist() == [12] * 5
    variances = found.collection.tensors["1.running_var"]
    assert not torch.allclose(variances[0], variances[1]) and not torch.allclose(variances[0], torch.ones(8))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("where", "points"), [("between stacks", 2), ("in a stack", 17)])
def test_an_interrupted_collection_resumes_to_the_same_bits(
    images, tmp_path, together, monkeypatch, count, where, points
):
    together(count)
    settings = SeedsOptions(**SMALL | {"snapshots": 3})
    whole = collected(images, tmp_path / "whole", settings)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)
    seen, write = [], training.write_state

    def count_down(*_) -> None:
        seen.append(None)
        if len(seen) == points:
            raise KeyboardInterrupt

    def state(*written) -> None:
        write(*written)
        if where == "in a stack":
            count_down()

    monkeypatch.setattr(training, "write_state", state)
    with pytest.raises(KeyboardInterrupt):
        log = count_down if where == "between stacks" else ignore
        collected(images, tmp_path / "cut", settings, log=log)
    monkeypatch.setattr(training, "write_state", write)
    resumed = collected(images, tmp_path / "cut", settings)
    for name, tensor in whole.collection.tensors.items():
        assert torch.equal(resumed.collection.tensors[name], tensor)
    assert resumed.collection.names == whole.collection.names and not list(tmp_path.rglob("*.pt"))


def test_snapshots_are_of_one_training(images, tmp_path, together):
    together(3)
    snapshots = collected(images, tmp_path / "three", SeedsOptions(**SMALL | {"snapshots": 3}))
    last = collected(images, tmp_path / "one", SeedsOptions(**SMALL))
    assert snapshots.columns["step"] == [4, 8, 12] * 5 and snapshots.columns["network"][:4] == [0, 0, 0, 1]
    assert snapshots.collection.names[:2] == ["00000_00004", "00000_00008"]
    assert_close(last.collection, snapshots.collection.select(slice(2, None, 3)))


def test_divergence_is_told(images, tmp_path):
    with pytest.raises(ValueError, match="collect/loss is nan: training diverged; a lower learning_rate may help"):
        collected(images, tmp_path, SeedsOptions(**SMALL, optimizer="sgd", learning_rate=1e20, schedule="constant"))


def test_branches_leave_what_is_not_generated_as_the_trunk_has_it(images, tmp_path):
    torch.manual_seed(0)
    trunk = network()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    names, options = ["3.weight"], {"seed": 0, "device": "cpu", "log": ignore, "folder": tmp_path}
    make = populations.branches(trunk, names)
    found = runs.train_all(make, images.train, BranchesOptions(**SMALL), names, **options)
    assert found.collection.tensors.keys() == {"3.weight"} and len(found.collection) == 5
    rows = found.collection.tensors["3.weight"]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], before["3.weight"])
    step = (rows - before["3.weight"]).flatten(1).norm(dim=1)
    assert step.max() < before["3.weight"].norm()
    assert all(torch.equal(trunk.state_dict()[name], tensor) for name, tensor in before.items())
