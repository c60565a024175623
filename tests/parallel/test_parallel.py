"""Two processes against one: the same random numbers, statistics, checkpoints, generators; and how they end."""

from __future__ import annotations

import signal
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from failing import fail
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from pdiff.errors import ProcessError, Pruned, UserError
from pdiff.experiment import prepare, pretrain, schema, train
from pdiff.files import append_line, read_tensors, write_tensors
from pdiff.method.alignment.copies import Originals
from pdiff.method.alignment.matching import align
from pdiff.method.alignment.reference import Reference
from pdiff.method.alignment.symmetries import permutation_groups
from pdiff.method.collection import Collection
from pdiff.method.log import Point
from pdiff.method.options import Optimization
from pdiff.method.standardize import Standardizer
from pdiff.method.training import Trainer, shuffled
from pdiff.networks import datasets
from pdiff.networks.architectures import build
from pdiff.networks.images import Part
from pdiff.networks.options import Dataset
from pdiff.networks.predict import batch_predictions, network_accuracy, predictions
from pdiff.parallel import ranks
from pdiff.parallel.launch import launch
from pdiff.parallel.ranks import gathered, rank, rows, summed, world
from pdiff.parallel.training import global_batch_norm, global_random, shared

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SGD = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant"}  # Adam would blow rounding errors up
GENTLY = SGD | {"learning_rate": 1e-3}
PREPARE = {
    "pretrain": {**SGD, "epochs": 2, "batch_size": 31},
    "collect": {**SGD, "checkpoints": 8, "every_steps": 2, "batch_size": 16},
}
CONV = {"kind": "conv", "latent_size": 8, "steps": 3, "batch_size": 5, **GENTLY}
EXPERIMENTS = {
    "mlp": {
        "dataset": {"name": "digits", "validation_fraction": 0.9},
        "network": {"architecture": "mlp"},
        "prepare": PREPARE,
        "autoencoder": {"latent_size": 4},
        "diffusion": {
            **{"steps": 12, "width": 16, "blocks": 1, "evaluate_every": 2, "patience": 3, "batch_size": 5},
            **SGD,
        },
    },
    "cnn": {  # normalisation layers in all of the networks
        "dataset": {"name": "digits", "validation_fraction": 0.9, "augment": True},
        "network": {"architecture": "cnn_small"},
        "prepare": PREPARE,
        "autoencoder": CONV | {"kl_weight": 0.1},
        "diffusion": {
            **{"denoiser": "conv", "prediction": "epsilon", "steps": 5, "stop_on": "none", "batch_size": 7},
            **GENTLY,
        },
    },
}
DATA = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


class Odd(nn.Module):
    """A layer of timm's that normalises on its own account, parameters that nothing reads, and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Flatten(), nn.Linear(16, 2))
        self.unread, self.frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.frozen


def train_odd(folder: Path) -> None:
    """Seven rows a batch; four for the first of two processes, three for the other."""
    module, settings = Odd(), Optimization(batch_size=7, weight_decay=0.1, **SGD)
    trainer = Trainer(
        module,
        lambda x: module(x).square().mean(),
        lambda start: (DATA[i[rows()]] for i in shuffled(len(DATA), 7, seed=1, start=start)),
        settings,
        steps=5,
        seed=0,
        ema=0.9,
    )
    losses = [ranks.mean(step.loss.item()) for step in trainer]
    state = {f"{k}.{n}": t.clone() for k in ("module", "averaged") for n, t in getattr(trainer, k).state_dict().items()}
    write_tensors(folder / "odd.safetensors", state | {"losses": torch.tensor(losses)})


def scores_of(network: nn.Module, groups: dict[str, Collection], images: Part) -> dict[str, Tensor]:
    """Name of a value -> what groups of networks and their votes say of the first batch."""
    found = next(batch_predictions(network, list(groups.values()), images, batch_size=50))
    return {
        f"{name}.{what}.{value}": tensor
        for name, predicted in zip(groups, found, strict=True)
        for what, scores in predicted._asdict().items()
        for value, tensor in scores._asdict().items()
    }


def predict(folder: Path) -> None:
    """Predictions of five networks, and of one: fewer than processes; of 10 classes, and of 300."""
    images = datasets.load(Dataset(name="digits")).validation
    for classes in (10, 300):
        network = build("mlp", pretrained=False, classes=classes, channels=1, image_size=8)
        g = torch.Generator().manual_seed(0)
        random = {n: torch.randn(5, *t.shape, generator=g) for n, t in network.state_dict().items()}
        network.load_state_dict({name: tensor[0] for name, tensor in random.items()})
        collection = Collection(random)
        write_tensors(
            folder / f"predictions_{classes}.safetensors",
            {
                "five": predictions(network, collection, images),
                "one": predictions(network, collection.select([2]), images),
                **scores_of(network, {"five": collection, "one": collection.select([2])}, images),
                "accuracy": torch.tensor(network_accuracy(network, images, batch_size=len(images) - 1, device=CPU)),
            },
        )


def match(folder: Path) -> None:
    """Align five networks to a sixth, match them to three, and one: fewer than processes."""
    states = [build("mlp", pretrained=False, classes=10, channels=1, image_size=8).state_dict() for _ in range(6)]
    g = torch.Generator().manual_seed(0)
    states = [{n: torch.randn(t.shape, generator=g) for n, t in state.items()} for state in states]
    network = build("mlp", pretrained=False, classes=10, channels=1, image_size=8)
    groups, collection = permutation_groups(network, torch.zeros(1, 1, 8, 8)), Collection.stack(states[1:])
    for name, networks in {"five": collection, "one": collection.select([2])}.items():
        aligned, _ = align(networks, states[0], groups)
        fitted, reference = collection.select([0, 1, 3]), Reference(states[0], groups, balance=False, seed=0)
        matched = Originals(fitted, reference, Standardizer.fit(fitted)).distances(aligned)
        write_tensors(folder / f"aligned_{name}.safetensors", aligned.tensors | {"matched": matched})


def compute(folder: Path, prepared: Path, *, log) -> dict[str, float]:
    """Everything that is compared, in every process."""
    train_odd(folder)
    predict(folder)
    match(folder)
    metrics = {}
    for name, tree in EXPERIMENTS.items():
        experiment = schema.experiment(tree)
        pretrain.pretrain(experiment, folder / name / "pretrain", log)
        pretrained = prepared / name / "pretrain"
        metrics |= prepare.prepare(experiment, folder / name / "prepare", log, pretrain=pretrained)
        metrics |= train.train(experiment, folder / name / "train", log, prepare=prepared / name / "prepare")
    if world() > 1:
        check_helpers(folder)
    return metrics


def check_helpers(folder: Path) -> None:
    """What a process knows of the others; an assertion that fails ends all."""
    assert world() == 2 and list(range(7))[rows()] == [[0, 2, 4, 6], [1, 3, 5]][rank()]
    assert summed(rank() + 1.0) == 3 and ranks.mean(rank() + 1.0) == 1.5
    append_line(folder / "lines.txt", str(rank()))
    with ranks.rank_zero_first(), (folder / "order.txt").open("a") as file:
        file.write(f"{rank()}\n")
    torch.manual_seed(3)
    expected = torch.randn(7, 2)[rows()]
    torch.manual_seed(3)
    assert torch.equal(global_random(torch.randn, expected, count=7), expected)
    torch.manual_seed(3)
    double = torch.randn(7, 2, dtype=torch.float64)[rows()]
    torch.manual_seed(3)
    assert torch.equal(global_random(torch.randn, expected, count=7, dtype=torch.float64), double)
    with pytest.raises(ValueError, match=r"expected . rows, those of this process"):
        global_random(torch.randn, torch.zeros(7, 2), count=7)
    for kind in (torch.float32, torch.uint8, torch.int16, torch.bool):
        for shape in ((7, 3), (7,), (2, 0)):
            whole = (torch.arange(torch.Size(shape).numel()).reshape(shape) * 37 % 251).to(kind)
            assert torch.equal(gathered(whole[rows()], len(whole)), whole)
    with pytest.raises(UserError, match="processes 2: a batch has only 1 rows"):
        shared(nn.Linear(1, 1), lambda batch: batch, 1)
    for shape in ((7, 3), (7, 3, 5), (7, 3, 4, 2)):
        check_batch_norm(shape, affine=True)
    check_batch_norm((5, 3, 2), affine=False)


def check_batch_norm(shape: tuple[int, ...], *, affine: bool) -> None:
    """Outputs, gradients and running statistics against plain normalisation of the whole batch."""
    torch.manual_seed(1)
    x, coefficients = 5 + 2 * torch.randn(shape), torch.randn(shape)
    results = []
    for function, mine in ((F.batch_norm, slice(None)), (global_batch_norm, rows())):
        part = x[mine].clone().requires_grad_()
        weight, bias = ((torch.rand(3) + k).requires_grad_() if affine else None for k in (1, 0))
        torch.manual_seed(2)
        for parameter in (weight, bias) if affine else ():
            nn.init.uniform_(parameter)
        running = [torch.zeros(3), torch.ones(3)]
        y = function(part, *running, weight=weight, bias=bias, training=True, momentum=0.3)
        (y**2 * coefficients[mine]).sum().backward()
        gradients = [weight.grad, bias.grad] if affine else []
        results.append((mine, y.detach(), part.grad, *running, *gradients))
    (_, *whole), (mine, *own_part) = results
    for k, (a, b) in enumerate(zip(whole, own_part, strict=True)):
        if k >= 4:  # of parameters: those of both processes together
            b = b.clone()
            torch.distributed.all_reduce(b)
        torch.testing.assert_close(b, a[mine] if k < 2 else a, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory):
    """Folders, points and metrics of one process and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    points: dict[Path, list[Point]] = {one: [], two: []}
    metrics = {
        one: compute(one, one, log=points[one].append),
        two: launch(compute, two, one, log=points[two].append, processes=2, device=CPU),
    }
    return one, two, points, metrics


@pytest.mark.parametrize(
    "path",
    [
        *("odd.safetensors", "aligned_five.safetensors", "aligned_one.safetensors"),
        *(f"{name}/prepare/{file}.safetensors" for name in EXPERIMENTS for file in ("network", "checkpoints")),
        *(f"{name}/train/generator/generator.safetensors" for name in EXPERIMENTS),
    ],
)
def test_two_processes_compute_what_one_does(computed, path: str) -> None:
    one, two, *_ = computed
    assert_close(read_tensors(two / path), read_tensors(one / path))


@pytest.mark.parametrize("classes", [10, 300])
def test_predictions_are_the_same(computed, classes: int) -> None:
    one, two = (read_tensors(folder / f"predictions_{classes}.safetensors") for folder in computed[:2])
    assert one["five"].shape[0] == 5 and one["five"].dtype == (torch.uint8 if classes == 10 else torch.int16)
    assert one["five.votes.nll"].shape == (8 + 5, 50) and one["one.votes.nll"].shape == (0, 50)
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        assert tensor.is_floating_point() or torch.equal(two[name], tensor)


def test_the_first_process_alone_logs_and_writes(computed) -> None:
    one, two, points, metrics = computed
    assert metrics[one] == pytest.approx(metrics[two], rel=1e-3)
    assert [(p.name, p.step) for p in points[one]] == [(p.name, p.step) for p in points[two]]
    for a, b in zip(points[one], points[two], strict=True):
        if not a.name.startswith(("seconds/", "memory_mb/")):
            assert b.value == pytest.approx(a.value, rel=1e-3), a.name
    assert (two / "lines.txt").read_text() == "0\n" and (two / "order.txt").read_text() == "0\n1\n"
    histories = [pd.read_csv(folder / "cnn" / "train" / "history.csv") for folder in (one, two)]
    assert histories[0][["name", "step"]].equals(histories[1][["name", "step"]])


def test_files_are_read_by_one_process_and_aligned_by_two(tmp_path: Path) -> None:
    for seed in range(7):
        torch.manual_seed(seed)
        (tmp_path / "files").mkdir(exist_ok=True)
        network = build("mlp", pretrained=False, classes=10, channels=1, image_size=8)
        torch.save(network.state_dict(), tmp_path / "files" / f"{seed}.pth")
    settings = EXPERIMENTS["mlp"] | {"prepare": {"source": str(tmp_path / "files"), "align": "weights"}}
    experiment = schema.experiment(settings)
    for count in (1, 2):
        options = {"log": print, "processes": count, "device": CPU}
        launch(prepare.prepare, experiment, tmp_path / str(count), **options)
    for name in ("checkpoints.safetensors", "heldout.safetensors", "alignment.safetensors", "population.json"):
        one, two = ((tmp_path / str(count) / name).read_bytes() for count in (1, 2))
        assert one == two, name
    moved = read_tensors(tmp_path / "2" / "alignment.safetensors")
    orders = [tensor for key, tensor in moved.items() if key.startswith("permutation/")]
    assert orders and any((order != torch.arange(order.shape[1])).any() for order in orders)


@pytest.mark.parametrize(
    ("how", "processes", "error", "message"),
    [("mistake", 2, UserError, "^one line$"), ("killed", 1, ProcessError, "process 0 of 1 was ended by SIGKILL")],
)
def test_a_failure_of_one_ends_all(how: str, processes: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        launch(fail, how, log=print, processes=processes, device=CPU)
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def count_for_ever(*, log) -> None:
    while True:
        log(Point("count", 1.0))


def test_what_the_log_raises_ends_all() -> None:
    points: list[Point] = []

    def log(point: Point) -> None:
        points.append(point)
        if len(points) == 3:
            raise Pruned("enough")

    with pytest.raises(Pruned, match=r"^enough$"):
        launch(count_for_ever, log=log, processes=1, device=CPU)
    assert len(points) == 3


def test_devices_that_cannot_be_shared() -> None:
    for name, message in {"mps": "'mps'", "cuda:0": "'cuda:0'", "cuda": "has 0 GPUs"}.items():
        if name != "cuda" or not torch.cuda.is_available():
            with pytest.raises(UserError, match=f"^processes 2.*{message}"):
                launch(fail, "mistake", log=print, processes=2, device=torch.device(name))
    with pytest.raises(ValueError, match=r"processes <= prepare.pretrain.batch_size .*\(99, 31\)"):
        schema.experiment(EXPERIMENTS["mlp"] | {"processes": 99})
