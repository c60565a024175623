"""The library: what `import pdiff` offers, that its examples work, and that it needs no platform."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tracked import runs

import pdiff

SWEEP = """
objectives: {val_accuracy/generated_mean: maximize}
set: {generator.kind: gaussian}
parameters: {generator.scale: {kind: float, low: 0.5, high: 1.5}}
final: {seeds: 0}
"""
FEW = {"evaluate.baselines": ["average"], "evaluate.noise": 0.05, "evaluate.baseline_count": 4}
X, LABELS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2


def predict(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return (X @ state["weight"].T).argmax(1), LABELS


def collection(count: int, seed: int) -> pdiff.Collection:
    return pdiff.Collection({"weight": torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(seed))})


def test_the_public_names():
    functions = ["audit", "run", "runs", "sweep"]
    assert pdiff.__all__ == ["Collection", "Gaussian", "Generator", "LatentDiffusion", "UserError", *functions]
    assert [name for name in dir(pdiff) if name[0] != "_"] == pdiff.__all__
    assert all(getattr(pdiff, name).__doc__ for name in pdiff.__all__)
    with pytest.raises(AttributeError, match="module 'pdiff' has no attribute 'absent'"):
        pdiff.absent  # noqa: B018


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("pdiff.library", "pdiff.method.generators.base")]


@pytest.mark.parametrize("name", ["pdiff.method.collection", *SLOW])
def test_examples(name, workspace):
    Path("sweep.yaml").write_text(SWEEP)
    found = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed


# -- collections


def test_state_dicts_of_any_device():
    with FakeTensorMode():
        states = [{"a": torch.zeros(2, 3, device=device, requires_grad=True)} for device in ("cuda", "cpu")]
        stacked = pdiff.Collection.stack(states)
        assert stacked.tensors["a"].device.type == "cpu" and not stacked.tensors["a"].requires_grad
        moved = pdiff.Collection({"a": torch.zeros(2, 3, device="cuda")}, ["x", "y"]).cpu()
        assert moved.tensors["a"].device.type == "cpu" and moved.names == ["x", "y"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 2), "part 1: weight is (2, 3) float32, expected (2, 4) float32 as in part 0"),
        (nn.Linear(4, 2).half(), "part 1: weight is (2, 4) float16, expected (2, 4) float32 as in part 0"),
        (nn.Linear(4, 2, bias=False), "part 1 holds other tensors than part 0: they differ in bias"),
        ({"weight": torch.zeros(2, 4), "bias": [0, 0]}, "part 1: bias is a list, expected a tensor"),
    ],
)
def test_other_layouts_cannot_be_stacked(other, message):
    state = other.state_dict() if isinstance(other, nn.Module) else other
    with pytest.raises(pdiff.UserError) as caught:
        pdiff.Collection.stack([nn.Linear(4, 2).state_dict(), state])
    assert str(caught.value) == message


def test_mistakes_are_one_line(tmp_path):
    for message, call in {
        "folder: .*absent is not a folder": lambda: pdiff.Collection.from_folder(tmp_path / "absent"),
        "train: nothing to generate": lambda: pdiff.Generator.fit(pdiff.Collection({"a": torch.ones(3, 1)})),
        "count >= 1 must hold, but got 0": lambda: pdiff.Generator.fit(collection(5, 0), pdiff.Gaussian()).sample(0),
        r"generator\.json": lambda: pdiff.Generator.load(tmp_path),
        "Gaussian: generator.scale: input should be greater than or equal": lambda: pdiff.Gaussian(scale=-1),
        "autoencoder.latent_size: latent_size 'auto' needs kind pca|needs kind pca": lambda: pdiff.LatentDiffusion(
            autoencoder={"kind": "conv"}
        ),
        "unknown tag 'digits_mpl'; did you mean digits_mlp": lambda: pdiff.run("digits_mpl"),
        "overrides: diffusion.stepz: unknown key": lambda: pdiff.run("digits_mlp", overrides={"diffusion.stepz": 1}),
        "digits_mlp: has no stage audit": lambda: pdiff.run("digits_mlp", stage="audit"),
        "trials -1: expected a positive number": lambda: pdiff.sweep("digits_mlp", "layers", trials=-1),
        "unknown sweep 'layer'": lambda: pdiff.sweep("digits_mlp", "layer"),
    }.items():
        with pytest.raises(pdiff.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# -- the audit


@pytest.mark.slow
def test_the_audit_of_several_generators(tmp_path):
    originals, heldout = collection(30, 0), collection(12, 1)
    networks = {"copies": originals.select(slice(6)), "fresh": collection(20, 2)}
    found = pdiff.audit(originals, networks, evaluate=predict, heldout=heldout, overrides=FEW)
    assert "The networks of copies are copies" in found.verdict and found.verdict == str(found)
    assert found.metrics["novelty/copies_median"] < 1e-6 and found.metrics["novelty/fresh_median"] > 0.5
    frame = found.frame.set_index("group")
    assert frame["networks"].to_dict() == {
        **{"original": 30, "heldout": 12, "copies": 6, "fresh": 20},
        **{"noise_0.05": 4, "average": 1},
    }
    accuracies = [(predict(state)[0] == LABELS).double().mean().item() for state in networks["fresh"]]
    assert frame.loc["fresh", "test_accuracy_mean"] == pytest.approx(sum(accuracies) / 20)
    page = found.save(tmp_path / "kept")
    assert page.read_text() == found.report.read_text() and (tmp_path / "kept" / "tables" / "board.csv").exists()


@pytest.mark.slow
def test_the_audit_of_accuracies_and_of_weights_alone():
    originals, networks = collection(30, 0), collection(5, 1)
    measured = pdiff.audit(originals, networks, evaluate=lambda state: 0.5, overrides=FEW)
    assert measured.metrics["test_accuracy/generated_mean"] == 0.5 and "3 of the 30 originals" in measured.verdict
    alone = pdiff.audit(originals, networks, overrides=FEW)
    assert "accuracy was not measured" in alone.verdict and "test_accuracy_mean" not in alone.frame
    assert alone.metrics["novelty/generated_median"] == measured.metrics["novelty/generated_median"]


def test_what_cannot_be_audited():
    originals, networks = collection(30, 0), collection(5, 1)
    wide = pdiff.Collection({"weight": torch.zeros(3, 2, 5)})
    broken = networks.map(lambda t: t / 0)
    for message, arguments in {
        r"generated: weight is \(2, 5\), expected \(2, 4\) as in the originals": {"networks": wide},
        r"heldout: weight is \(2, 5\)": {"networks": networks, "heldout": wide},
        "generated: weight holds NaN or infinity": {"networks": broken},
        "'original' cannot name a generator": {"networks": {"original": networks}},
        "audit: evaluate.noize: unknown key": {"networks": networks, "overrides": {"evaluate.noize": 1}},
        "evaluate fails: network 0: RuntimeError: no": {"networks": networks, "evaluate": fails, "overrides": FEW},
    }.items():
        with pytest.raises(pdiff.UserError, match=message) as caught:
            pdiff.audit(originals, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(pdiff.UserError, match="the 3 originals are all the same"):
        pdiff.audit(networks.select([0, 0, 0]), networks)


def fails(state: dict[str, Tensor]) -> None:
    raise RuntimeError("no\nsuch layer")


# -- the platform


ALONE = """
import doctest, sys, pdiff
found = doctest.testmod(pdiff)
print(found.attempted, found.failed, *sorted({"mlflow", "optuna"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_the_first_example_needs_no_platform(tmp_path):
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "9 0\n", done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_from_python(workspace):
    assert pdiff.runs().empty
    done = pdiff.run("tiny.yaml", overrides={"generator.kind": "gaussian", "evaluate.noise": [0.1]})
    assert (done.folder / "report.html").is_file()
    frame = pdiff.runs(tag="tiny")
    assert frame["run"].tolist() == [done.run_id] == [run.info.run_id for run in runs("main")]
    assert frame["test_accuracy/generated_mean"].tolist() == [done.metrics["test_accuracy/generated_mean"]]
    assert pdiff.runs(tag="other").empty
    generated = pdiff.run("tiny.yaml", "generate", {"generator.kind": "gaussian"})
    assert len(pdiff.Collection.load(generated.folder / "generated.safetensors")) == 8
    assert len(runs("generate")) == 1, "it is reused"
