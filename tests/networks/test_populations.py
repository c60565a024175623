"""Pretraining and collecting against plain loops of PyTorch, and against themselves when interrupted."""

import copy
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pdiff.errors import UserError
from pdiff.method import training
from pdiff.networks import datasets
from pdiff.networks.architectures import build
from pdiff.networks.options import Dataset, Pretrain, TrajectoryOptions
from pdiff.networks.populations import collect, generated_names, pretrain

LAST_NORM = ["5.weight", "5.bias"]  # of cnn_small


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return build("cnn_small", pretrained=False, classes=10, channels=1, image_size=8)


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def ignore(point: object) -> None:
    pass


class Interrupted(Exception):
    pass


def interrupted_after(points: int):
    """A log that gives up after some points."""
    seen = []

    def log(point: object) -> None:
        seen.append(point)
        if len(seen) == points:
            raise Interrupted

    return log


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are saved after every step."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)


# -- which tensors


def test_patterns_select_in_the_order_of_the_state_dict():
    network = cnn()
    assert generated_names(network, ["all"]) == list(network.state_dict())
    assert generated_names(network, ["9.bias", "5.*"]) == [
        *("5.weight", "5.bias", "5.running_mean", "5.running_var", "5.num_batches_tracked", "9.bias")
    ]
    assert generated_names(network, ["?.weight"]) == [f"{k}.weight" for k in (0, 1, 4, 5, 9)]


def test_a_pattern_without_match():
    with pytest.raises(UserError, match=r"prepare\.parameters: 'layer4\.\*' matches none of .* 16 tensors.*9\.bias"):
        generated_names(cnn(), ["5.*", "layer4.*"])


# -- collect


def collected(images, names=LAST_NORM, *, network=None, log=ignore, path=None, **settings):
    options = {"checkpoints": 5, "batch_size": 16, "learning_rate": 0.01} | settings
    return collect(network or cnn(), images, TrajectoryOptions(**options), names, seed=3, log=log, path=path)


def test_collect_is_a_plain_loop_over_the_generated_parameters(digits):
    network = cnn()
    before = state(network)
    collection = collected(digits, network=network)
    assert len(collection) == 5

    oracle = cnn().eval()
    generated = [oracle[5].weight, oracle[5].bias]
    optimizer = torch.optim.AdamW(generated, lr=0.01, weight_decay=5e-4)
    for k, (x, y) in enumerate(islice(digits.train.stream(16, seed=3), 5)):
        loss = F.cross_entropy(oracle(x), y)
        for parameter, gradient in zip(generated, torch.autograd.grad(loss, generated), strict=True):
            parameter.grad = gradient
        optimizer.step()
        for name, parameter in zip(LAST_NORM, generated, strict=True):
            torch.testing.assert_close(collection[k][name], parameter.detach())
    after = state(network)
    assert_same(collection[4], {name: after[name] for name in LAST_NORM})
    assert not torch.equal(collection[0]["5.weight"], collection[4]["5.weight"])
    frozen = before.keys() - set(LAST_NORM)
    assert_same({name: before[name] for name in frozen}, {name: after[name] for name in frozen})


def test_every_second_step(digits):
    every, second = collected(digits, checkpoints=6), collected(digits, checkpoints=3, every_steps=2)
    assert torch.equal(second.tensors["5.bias"], every.tensors["5.bias"][1::2])


@pytest.mark.parametrize(("checkpoints", "every"), [(3, 2), (4, 1), (50, 1)])
def test_automatic_steps_spread_checkpoints_over_one_epoch(digits, checkpoints, every):
    assert len(digits.train) // 16 == 7  # batches of one epoch
    found, expected = (collected(digits, checkpoints=checkpoints, every_steps=n) for n in ("auto", every))
    assert torch.equal(found.tensors["5.bias"], expected.tensors["5.bias"])


def test_statistics_move_where_they_are_generated_alone(digits):
    network = cnn()
    names = generated_names(network, ["5.*"])
    before = state(network)
    collection = collected(digits, names, network=network)
    assert collection.tensors["5.num_batches_tracked"].tolist() == [1, 2, 3, 4, 5]
    (x, _), *_ = islice(digits.train.stream(16, seed=3), 1)
    with torch.no_grad():
        measured = cnn().eval()[:5](x).mean(dim=(0, 2, 3))
    torch.testing.assert_close(collection[0]["5.running_mean"], 0.1 * measured)  # momentum 0.1, from 0
    frozen = before.keys() - set(names)
    after = state(network)
    assert_same({name: before[name] for name in frozen}, {name: after[name] for name in frozen})


def test_buffers_alone_cannot_be_fine_tuned(digits):
    with pytest.raises(UserError, match=r"prepare\.parameters 5\.running_mean: buffers alone"):
        collected(digits, ["5.running_mean"])


@pytest.mark.parametrize("points", [2, 4])
@pytest.mark.parametrize("names", [LAST_NORM, ["all"]])
def test_an_interrupted_collection_is_the_same(digits, tmp_path, save_always, names, points):
    names = generated_names(cnn(), names)
    expected = collected(digits, names)
    path = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        collected(digits, names, log=interrupted_after(points), path=path)
    log = []
    found = collected(digits, names, log=log.append, path=path)
    assert [point.step for point in log] == list(range(points, 6))
    assert_same(found.tensors, expected.tensors)
    assert_same(collected(digits, names, path=path).tensors, expected.tensors)  # finished already


# -- pretrain


def test_the_best_epoch_is_kept(digits):
    network, scores, seen, log = cnn(), iter([0.1, 0.9, 0.3]), [], []

    def accuracy(network: nn.Module) -> float:
        seen.append(state(network))
        return next(scores)

    settings = Pretrain(epochs=3, batch_size=40)
    pretrain(network, digits, settings, seed=0, accuracy=accuracy, log=log.append)
    assert_same(state(network), seen[1])
    assert not torch.equal(seen[1]["9.weight"], seen[2]["9.weight"])
    values = {(p.step, p.value) for p in log if p.name == "pretrain/val_accuracy"}
    assert values == {(3, 0.1), (6, 0.9), (9, 0.3)}  # 120 images, 3 steps an epoch


def test_no_epochs_leave_the_network_alone(digits):
    network = cnn()
    pretrain(network, digits, Pretrain(epochs=0), seed=0, accuracy=lambda network: 0.0, log=ignore)
    assert_same(state(network), state(cnn()))


@pytest.mark.slow
@pytest.mark.parametrize("points", [3, 4, 6, 8])  # in the middle of an epoch, at its loss, and at its accuracy
def test_an_interrupted_pretraining_is_the_same(tmp_path, save_always, points):
    images = datasets.load(Dataset(name="digits", validation_fraction=0.9, augment=True))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10))

    def run(log=ignore, path=None) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(network)
        scores = lambda n: -n[1].weight.abs().sum().item()  # noqa: E731
        pretrain(own, images, Pretrain(epochs=3, batch_size=40), seed=1, accuracy=scores, log=log, path=path)
        return state(own)

    expected = run()
    with pytest.raises(Interrupted):
        run(interrupted_after(points), tmp_path / "state.pt")
    assert_same(run(path=tmp_path / "state.pt"), expected)
