"""The training loop: interrupted against uninterrupted, and against loops written out."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pdiff import compat
from pdiff.method import training
from pdiff.method.log import Point
from pdiff.method.options import Optimization
from pdiff.method.training import Best, Trainer, follow, resolve_device, resumable, shuffled

STEPS = 9
DATA = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def batches(start: int) -> Iterator[Tensor]:
    """Endless batches of 4 rows."""
    return (DATA[i] for i in shuffled(len(DATA), 4, seed=1, start=start))


def trainer(ema: float = 0.0, steps: int = STEPS, dropout: float = 0.5, **settings: object) -> Trainer:
    """A trainer of a small network with dropout and normalisation, always the same one."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 6))
    options = Optimization(**{"learning_rate": 0.05, "weight_decay": 0.1, "schedule": "constant"} | settings)

    def loss(x: Tensor) -> Tensor:
        return (module(x + 0.1 * torch.randn_like(x)) - x).square().mean()

    return Trainer(module, loss, batches, options, steps=steps, seed=3, ema=ema)


def equal(a: object, b: object) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


every_setting = pytest.mark.parametrize(
    ("optimizer", "schedule", "ema"),
    list(itertools.product(["adamw", "adam", "sgd"], ["constant", "cosine", "one_cycle"], [0.0, 0.9])),
)


@every_setting
def test_a_loaded_state_goes_on_as_if_never_interrupted(optimizer: str, schedule: str, ema: float) -> None:
    whole = trainer(ema, optimizer=optimizer, schedule=schedule)
    losses = [step.loss.item() for step in whole]
    first = trainer(ema, optimizer=optimizer, schedule=schedule)
    before = [step.loss.item() for step in itertools.islice(first, 4)]
    second = trainer(ema, optimizer=optimizer, schedule=schedule)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.manual_seed(99)  # randomness outside of the loop does not matter
    after = [step.loss.item() for step in second]
    assert len(before) == 4 and before + after == losses
    assert equal(second.state_dict(), whole.state_dict())


@every_setting
def test_an_interrupted_run_resumes_from_its_file(
    optimizer: str, schedule: str, ema: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", math.inf)  # save after every step
    path, best, whole = tmp_path / "state.pt", Best(), trainer(ema, optimizer=optimizer, schedule=schedule)
    for step in whole:
        best.update(-step.loss.item(), whole.averaged)
    seen = []
    for stop in (3, 6, STEPS):
        part, beside = trainer(ema, optimizer=optimizer, schedule=schedule), Best()
        for step in resumable(part, path, beside):
            beside.update(-step.loss.item(), part.averaged)
            seen.append(step.number)
            if step.number == stop:
                break
    assert seen == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]  # what was not saved is done again
    assert equal(part.state_dict(), whole.state_dict()) and equal(beside.state_dict(), best.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = trainer()
    assert len(list(resumable(whole, tmp_path / "state.pt"))) == STEPS
    again = trainer()
    assert list(resumable(again, tmp_path / "state.pt")) == []
    assert equal(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize("how", ["truncated", "of another module", "beside another object"])
def test_a_state_that_cannot_be_resumed_is_one_line(how: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert len(list(resumable(trainer(), path))) == STEPS
    taken, beside = trainer(), ()
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "of another module":
        taken = Trainer(nn.Linear(6, 2), lambda x: x, batches, Optimization(), steps=1, seed=0)
    else:
        beside = (Best(),)
    with pytest.raises(ValueError, match=r"state\.pt: not a state that this training can resume from") as caught:
        list(resumable(taken, path, *beside))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_steps_are_those_of_a_plain_loop(optimizer: str) -> None:
    """The optimisers of torch, with the cosine schedule in closed form."""
    taken = trainer(dropout=0.0, optimizer=optimizer, schedule="cosine", final_learning_rate=0.01, momentum=0.8)
    plain = copy.deepcopy(taken.module)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    momentum = {"momentum": 0.8} if optimizer == "sgd" else {}
    # the same kernels: the bias before a normalisation has no gradient but rounding, which Adam scales to whole steps
    rule = kinds[optimizer](plain.parameters(), lr=0.05, weight_decay=0.1, **momentum, **compat.fused("cpu"))
    stream = batches(0)
    for step in taken:
        k = step.number - 1
        rule.param_groups[0]["lr"] = 0.01 + (0.05 - 0.01) * (1 + math.cos(math.pi * k / STEPS)) / 2
        x = next(stream)
        torch.manual_seed(training.stream(3, k))
        loss = (plain(x + 0.1 * torch.randn_like(x)) - x).square().mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
        assert step.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    for a, b in zip(taken.module.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        ("constant", lambda k: 0.05),
        ("cosine", lambda k: 0.05 * (1 + math.cos(math.pi * k / STEPS)) / 2),
        # up to the peak in 30 % of the steps from a 25th of it, down to a 10 000th of the start
        ("one_cycle", lambda k: None),
    ],
)
def test_learning_rates(schedule: str, rate: Callable[[int], float | None]) -> None:
    taken = trainer(schedule=schedule)
    rates = [taken.optimizer.param_groups[0]["lr"]]
    rates += [taken.optimizer.param_groups[0]["lr"] for _ in taken]
    if schedule == "one_cycle":
        assert rates[0] == pytest.approx(0.05 / 25) and max(rates) == pytest.approx(0.05, rel=0.1)
        assert rates[-1] == pytest.approx(0.05 / 25 / 1e4) and rates.index(max(rates)) in (2, 3)
    else:
        assert rates == pytest.approx([rate(k) for k in range(STEPS + 1)], abs=1e-9)


def test_the_moving_average_against_a_loop() -> None:
    taken, expected = trainer(ema=0.7), {}
    for step in taken:
        now = {n: t.clone() for n, t in taken.module.state_dict().items() if t.is_floating_point()}
        expected = now if step.number == 1 else {n: 0.7 * expected[n] + 0.3 * now[n] for n in now}
    state = taken.averaged.state_dict()
    assert taken.averaged is not taken.module and "1.running_mean" in expected
    assert all(torch.allclose(state[n], t, atol=1e-6) for n, t in expected.items())
    assert not torch.allclose(state["0.weight"], taken.module.state_dict()["0.weight"])


def test_without_a_moving_average_the_module_itself_counts() -> None:
    taken = trainer()
    assert taken.averaged is taken.module


def test_frozen_parameters_stay() -> None:
    frozen = nn.Linear(6, 6)
    frozen.weight.requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    options = Optimization(weight_decay=1.0)
    for _ in Trainer(frozen, lambda x: frozen(x).square().mean(), batches, options, steps=2, seed=0):
        pass
    assert torch.equal(frozen.weight, before["weight"]) and not torch.equal(frozen.bias, before["bias"])


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (5, 5), (7, 1)])
def test_every_index_once_an_epoch(count: int, size: int) -> None:
    per_epoch = count // size
    epochs = []
    stream = shuffled(count, size, seed=5)
    for _ in range(4):
        taken = list(itertools.islice(stream, per_epoch))
        assert [len(batch) for batch in taken] == [size] * per_epoch
        epochs.append(torch.cat(taken).tolist())
    for indices in epochs:
        assert len(set(indices)) == per_epoch * size and set(indices) <= set(range(count))
    assert len({tuple(indices) for indices in epochs}) > 1


@pytest.mark.parametrize(("count", "size"), [(3, 8), (1, 50), (10, 50), (4, 6)])
def test_few_indices_fill_a_batch_by_whole_shuffles(count: int, size: int) -> None:
    for batch in itertools.islice(shuffled(count, size, seed=5), 6):
        assert len(batch) == size
        whole = size - size % count
        for shuffle in batch[:whole].split(count):
            assert sorted(shuffle.tolist()) == list(range(count))
        assert len(set(batch[whole:].tolist())) == size % count
    assert count == 1 or not torch.equal(*itertools.islice(shuffled(count, size, seed=5), 2))


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 20])
def test_batches_from_a_later_start_are_the_same(start: int) -> None:
    for size in (3, 25):
        all_batches = list(itertools.islice(shuffled(10, size, seed=5), 26))
        later = list(itertools.islice(shuffled(10, size, seed=5, start=start), 6))
        assert all(map(torch.equal, all_batches[start:], later))
        other = list(itertools.islice(shuffled(10, size, seed=6, start=start), 6))
        assert not all(map(torch.equal, later, other))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(value: float) -> None:
    taken, log = trainer(steps=5), []
    loss = taken.loss
    taken.loss = lambda x: loss(x) * (value if taken.step == 2 else 1)
    with pytest.raises(ValueError, match=r"part/loss is (nan|inf) at step 3.*learning_rate"):
        for _ in follow(taken, "part/loss", log.append):
            pass
    assert [point.step for point in log] == [1, 2]


def test_losses_are_logged() -> None:
    log: list[Point] = []
    losses = [step.loss.item() for step in follow(trainer(), "part/loss", log.append)]
    assert log == [Point("part/loss", loss, k + 1) for k, loss in enumerate(losses)]


def test_long_runs_log_a_bounded_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOGGED_POINTS", 4)
    log: list[Point] = []
    assert len(list(follow(trainer(), "part/loss", log.append))) == STEPS
    assert [point.step for point in log] == [2, 4, 6, 8, 9]  # the last one always


def test_best_keeps_and_restores() -> None:
    module, best = nn.Linear(1, 1), Best()
    before = copy.deepcopy(module.state_dict())
    best.restore(module)
    assert equal(dict(module.state_dict()), dict(before))  # there was none
    better = []
    for k, score in enumerate([0.1, 0.5, 0.5, math.nan, 0.2]):
        nn.init.constant_(module.weight, k)
        better.append(best.update(score, module))
    assert better == [True, True, False, False, False] and best.score == 0.5 and best.since_best == 3
    best.restore(module)
    assert module.weight.item() == 1
    assert best.update(0.6, module) and best.since_best == 0


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="'cuda:99' is not on this machine"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match="'xpu' is not on this machine"):
        resolve_device("xpu")
