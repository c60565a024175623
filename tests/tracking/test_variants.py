"""What an experiment can leave out or add: diffusion, checkpoints, test images, trajectories, data set, pretraining."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from tracked import artifacts, runs

from pdiff.cli.main import main as pdiff
from pdiff.experiment import config, stages
from pdiff.experiment.metrics import CONTROL
from pdiff.method.generators.base import Generator
from pdiff.networks.evaluators import images
from pdiff.seeds import stream

pytestmark = pytest.mark.slow


def evaluated(*words: str) -> dict[str, float]:
    """Metrics of a run of main on the tiny experiment."""
    assert pdiff(["main", "--tag", "tiny.yaml", *words]) == 0
    return runs("main")[-1].data.metrics


def table() -> pd.DataFrame:
    return pd.read_csv(artifacts(runs("evaluate")[-1]) / "evaluation.csv")


VAE = ["--diffusion.steps", "0", "--diffusion.standardize_latents", "false", "--autoencoder.kind", "conv"]
VAE += ["--autoencoder.latent_size", "4", "--autoencoder.kl_weight", "1", "--autoencoder.steps", "3"]


@pytest.mark.slow
def test_without_diffusion_latents_are_gaussian(workspace):
    metrics = evaluated(*VAE)
    assert "diffusion/loss" not in metrics and "autoencoder/loss" in metrics
    generator = Generator.load(artifacts(runs("train")[0]) / "generator")
    assert generator.denoiser is None
    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")
    seeds = [stream(0, k) for k in range(8)]
    z = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with torch.no_grad():  # decode(N(0, I)), as the VAE variant has it
        expected = generator.standardizer.decode(generator.autoencoder.decode(z))
    for name, tensor in sampled.items():
        torch.testing.assert_close(tensor, expected.tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
def test_only_the_first_checkpoints_are_used(workspace, count):
    words = ["--generator.checkpoints", str(count), "--diffusion.heldout_fraction", "0", "--diffusion.stop_on", "none"]
    evaluated(*words, "--evaluate.baselines", "auto")
    assert table().groupby("group").size()["original"] == count
    generator = Generator.load(artifacts(runs("train")[0]) / "generator")
    collected = load_file(artifacts(runs("prepare")[0]) / "checkpoints.safetensors")
    for slot in generator.standardizer.slots:
        assert slot.mean == pytest.approx(collected[slot.name][:count].mean().item(), abs=1e-6)
    assert pdiff(["train", "--tag", "tiny.yaml", "--generator.checkpoints", "21"]) == 2
    assert len(runs("prepare")) == 1, "all share the collection"


@pytest.mark.slow
def test_validation_images_alone(workspace):
    metrics = evaluated("--evaluate.test", "false")
    assert not any(name.startswith(("test_accuracy/", "similarity/")) for name in metrics)
    assert {"val_accuracy/generated_mean", "val_similarity/generated_generated"} <= metrics.keys()
    assert "test_accuracy" not in table() and table().max_similarity.notna().all()
    again = evaluated()
    shared = [name for name in again if name.startswith(("val_", "nearest_distance/"))]
    assert len(shared) > 20
    assert all(again[name] == metrics[name] for name in shared)
    assert "test_accuracy/generated_mean" in again


@pytest.mark.slow
def test_a_trajectory_ends_at_the_samples(workspace):
    evaluated("--generate.trajectory_every", "2", "--generate.trajectory_count", "3")
    folder = artifacts(runs("generate")[0])
    passed, sampled = (load_file(folder / f"{name}.safetensors") for name in ("trajectory", "generated"))
    names = [name.split() for name in json.loads((folder / "trajectory.json").read_text())["checkpoints"]]
    timesteps = sorted({float(t) for t, _ in names}, reverse=True)
    assert timesteps[0] == 1000 and timesteps[-1] == 0 and len(timesteps) == 4  # every second of 6 calls, and the end
    assert [int(k) for _, k in names] == [0, 1, 2] * 4
    for name, tensor in passed.items():
        torch.testing.assert_close(tensor[-3:], sampled[name][:3])
    path = pd.read_csv(artifacts(runs("evaluate")[0]) / "trajectory.csv")
    last, generated = path[path.timestep == 0], table().query("group == 'generated'")[:3]
    assert last.test_accuracy.tolist() == generated.test_accuracy.tolist()
    assert "trajectory" not in set(table().group)
    assert "Accuracy on the way" in (artifacts(runs("evaluate")[0]) / "report.html").read_text()


CONDITIONED = """
log_models: false
dataset: {name: digits, validation_fraction: 0.2}
network: {architecture: mlp}
prepare: {collect: {from: seeds, networks: 10, steps: 40, snapshots: 3}}
generator: {kind: neurons, condition: val_accuracy, width: 16, blocks: 1, heads: 2}
diffusion: {steps: 4, batch_size: 8, evaluate_every: 4, behaviour: 0.1}
generate: {count: 3, sampling_steps: 3, control_count: 7}
evaluate: {noise: [0.05], baselines: average, baseline_count: 2}
"""


@pytest.mark.slow
def test_networks_are_asked_for_accuracies(workspace):
    Path("asked.yaml").write_text(CONDITIONED)
    assert pdiff(["main", "--tag", "asked.yaml"]) == 0
    metrics, folder = runs("main")[-1].data.metrics, artifacts(runs("evaluate")[-1])
    assert metrics["control/slope_low"] < metrics["control/slope"] < metrics["control/slope_high"]
    control = pd.read_csv(folder / "tables" / "control.csv")
    assert len(control) == 7 and control.asked.nunique() == 5 and control.obtained.between(0, 1).all()
    slope = np.polyfit(control.asked, control.obtained, 1)[0]
    assert metrics["control/slope"] == pytest.approx(slope, abs=1e-4)
    assert "control" not in set(table().group)
    assert "Obedient?" in (folder / "verdict.md").read_text() and "Control" in (folder / "report.html").read_text()
    assert set(CONTROL) == {name for name in metrics if name.startswith("control/")}
    assert set(CONTROL) < set(stages.STAGES["evaluate"].logs(config.load("asked.yaml"))), "a sweep may look at them"
    assert pdiff(["main", "--tag", "asked.yaml", "--generate.control_count", "0"]) == 0
    assert "control/slope" not in runs("main")[-1].data.metrics


@pytest.mark.slow
def test_a_small_diffusion_of_neurons_makes_new_networks_that_work(workspace):
    """Far from chance, a tenth, and as far from the fitted networks as held-out ones are."""
    assert pdiff(["main", "--tag", "digits_neurons_quick", "--evaluate.baselines", "gaussian_diagonal"]) == 0
    metrics = runs("main")[0].data.metrics
    assert metrics["test_accuracy/generated_mean"] > 0.6
    assert metrics["test_accuracy/generated_mean"] > metrics["test_accuracy/gaussian_diagonal_mean"]
    assert 0.95 < metrics["novelty/generated_median"] < 1.25


OWN = """
prepare: {source: own}
diffusion: {steps: 20, width: 16, blocks: 1, evaluate_every: 10}
generate: {count: 3, sampling_steps: 4}
evaluate: {noise: [0.05], baselines: average, baseline_count: 4}
"""


@pytest.mark.slow
def test_networks_without_a_data_set_and_an_architecture(workspace, capsys):
    """Neither data set nor architecture: networks are sampled, and compared in weight space alone."""
    Path("own").mkdir()
    for k in range(6):
        torch.manual_seed(k)
        torch.save({"layer.weight": torch.randn(3, 4), "layer.bias": torch.randn(3)}, f"own/{k}.pth")
    Path("own.yaml").write_text(OWN)
    assert pdiff(["main", "--tag", "own.yaml"]) == 0
    metrics = runs("main")[0].data.metrics
    assert not any(name.startswith(("val_", "test_", "similarity/")) for name in metrics)
    assert metrics["nearest_distance/average_mean"] > 0
    rows = {row[0]: row for line in capsys.readouterr().out.splitlines() if (row := line.split())}
    for group in ("original", "generated", "noise_0.05", "average"):
        assert float(rows[group][-1]) == pytest.approx(metrics[f"nearest_distance/{group}_mean"], abs=0.001), group
    assert {"nearest_distance", "novelty", "outside_span"} < set(table().columns)
    assert not any("accuracy" in column for column in table())
    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")
    assert sampled["layer.weight"].shape == (3, 3, 4)


MEASURES = """
import sys
import numpy as np
from safetensors.numpy import load_file

data = np.load("digits.npz")

def predict(state):
    with open("calls", "a") as file:
        file.write("x")
    weight, bias = (np.asarray(state[name]) for name in ("layer.weight", "layer.bias"))
    return (data["images"] @ weight.T + bias).argmax(1), data["labels"]

if __name__ == "__main__":
    predicted, labels = predict(load_file(sys.argv[1]))
    print(f"Acc: {100 * (predicted == labels).mean():.4f}%")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["function: measures.py:predict", "command: 'python measures.py {checkpoint}'"])
def test_networks_that_a_function_or_a_command_of_the_user_measures(workspace, how, monkeypatch):
    """By a function, which also gives similarity, or by a command that gets files like the user's."""
    Path("own").mkdir()
    for k in range(3):
        torch.manual_seed(k)
        save_file({"layer.weight": torch.randn(10, 64), "layer.bias": torch.randn(10)}, f"own/{k}.safetensors")
    images, labels = (array[:50] for array in load_digits(return_X_y=True))
    np.savez("digits.npz", images=images.astype(np.float32), labels=labels)
    Path("measures.py").write_text(MEASURES)
    Path("own.yaml").write_text(OWN.replace("noise: [0.05]", f"noise: [], {how}"))
    words = ["main", "--tag", "own.yaml", "--diffusion.heldout_fraction", "0", "--diffusion.stop_on", "none"]
    assert pdiff(words) == 0
    calls = Path("calls").read_text()
    assert len(calls) == 3 + 3 + 1, "originals, generated networks, the average"
    monkeypatch.syspath_prepend(str(workspace))
    predict = importlib.import_module("measures").predict
    sampled = load_file(artifacts(runs("generate")[0]) / "generated.safetensors")
    for k, accuracy in enumerate(table().query("group == 'generated'").test_accuracy):
        predicted, labels = predict({name: tensor[k] for name, tensor in sampled.items()})
        assert accuracy == pytest.approx((predicted == labels).mean(), abs=1e-6)
    assert ("similarity/generated_generated" in runs("main")[0].data.metrics) == how.startswith("function")
    assert "val_accuracy" not in table()
    originals = table().query("group == 'original'")
    Path("calls").write_text("")
    assert pdiff([*words, "--generate.seed", "1"]) == 0
    assert len(Path("calls").read_text()) == 3 + 1, "the originals are known"
    assert table().query("group == 'original'").test_accuracy.equals(originals.test_accuracy)


@pytest.mark.slow
def test_pretraining_is_shared_by_what_differs_only_afterwards(workspace, capsys):
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 0
    words = ["prepare", "--tag", "tiny.yaml", "--prepare.collect.checkpoints", "5"]
    assert pdiff([*words, "--prepare.parameters", "3.*"]) == 0
    (pretrained,) = runs("pretrain")
    assert f"pretrain: reusing run {pretrained.info.run_id}" in capsys.readouterr().out
    assert "pretrain/loss" in pretrained.data.metrics
    first, second = runs("prepare")
    assert first.data.tags["pdiff.pretrain_run"] == second.data.tags["pdiff.pretrain_run"] == pretrained.info.run_id
    base, shared = (load_file(artifacts(run) / "network.safetensors") for run in (first, second))
    assert all(torch.equal(tensor, shared[name]) for name, tensor in base.items())
    whole, last = (load_file(artifacts(run) / "checkpoints.safetensors") for run in (first, second))
    assert set(last) == {"3.weight", "3.bias"} and len(last["3.bias"]) == 5 and len(whole["3.bias"]) == 18
    assert pdiff([*words, "--prepare.pretrain.epochs", "2"]) == 0  # another pretraining
    assert pdiff(["prepare", "--tag", "tiny.yaml", "--fresh"]) == 0
    assert len(runs("pretrain")) == 3
    assert all("pretrain/loss" in run.data.metrics for run in runs("pretrain"))


@pytest.mark.slow
def test_originals_are_evaluated_once(workspace, monkeypatch, capsys):
    """Whatever is generated, and whatever else it is compared with."""
    counts, run = [], images.batch_predictions

    def counted(network, groups, *arguments, **options):
        counts.append([len(group) for group in groups])
        return run(network, groups, *arguments, **options)

    monkeypatch.setattr(images, "batch_predictions", counted)
    evaluated()
    first = table()
    words = ["--autoencoder.latent_size", "3", "--generate.count", "5", "--evaluate.noise", "[0.1, 0.2]"]
    evaluated(*words)
    assert f"originals: reusing run {runs('originals')[0].info.run_id}" in capsys.readouterr().out
    assert counts == [[18, 2]] * 2 + [[8, 4, 1, 4]] * 2 + [[5, 4, 4, 1, 4]] * 2, "on validation and on test images"
    shared = table()
    columns = ["val_accuracy", "test_accuracy", "max_similarity"]
    assert shared[columns][:18].equals(first[columns][:18])
    assert pdiff(["evaluate", "--tag", "tiny.yaml", "--fresh", *words]) == 0
    assert counts[6:] == [[18, 2]] * 2 + [[5, 4, 4, 1, 4]] * 2
    assert table().equals(shared)
    evaluated("--generator.checkpoints", "7")  # other originals
    assert counts[10:] == [[7, 2]] * 2 + [[8, 4, 1, 4]] * 2


@pytest.mark.parametrize(
    ("stage", "text", "shared"),
    [
        ("prepare", "", True),
        ("prepare", "prepare: {source: own}", True),  # their alignment
        ("prepare", "prepare: {source: own, align: none}", False),
        ("train", "prepare: {source: own}", True),
        ("generate", "", False),
        ("evaluate", "", True),
        ("evaluate", "evaluate: {command: 'python test.py {checkpoint}'}", False),
        ("evaluate", "evaluate: {function: 'own.py:predict'}", False),
    ],
)
def test_processes_share_what_is_computed_here(workspace, stage, text, shared):
    Path("other.yaml").write_text(f"extends: tiny.yaml\nprocesses: 3\n{text}")
    assert stages.processes(stage, config.load("other.yaml")) == (3 if shared else 1)
    Path("unknown.yaml").write_text("processes: 3\nprepare: {source: own}")
    for name in ("prepare", "evaluate"):
        assert stages.processes(name, config.load("unknown.yaml")) == 1


TEST = """
import sys, pathlib
from safetensors.numpy import load_file
import helper
if pathlib.Path("full").exists() and "generated/00000" in sys.argv[1]:
    raise OSError("no space left")
with open("calls", "a") as file:
    file.write("x")
print("acc", 1 / (1 + load_file(sys.argv[1])["w"][0] ** 2))
"""


@pytest.fixture
def commanded(workspace):
    """Words of an experiment whose networks a command measures, which fails while there is a file `full`."""
    Path("own").mkdir()
    for k in range(4):
        save_file({"w": torch.tensor([k, 1.0, k * k])}, f"own/{k}.safetensors")
    Path("own.yaml").write_text(OWN)
    Path("test.py").write_text(TEST)
    Path("helper.py").touch()
    return ["--tag", "own.yaml", "--evaluate.command", "python test.py {checkpoint}", "--evaluate.workers", "1"]


@pytest.mark.slow
def test_a_command_that_fails_late_goes_on_where_it_was(workspace, commanded):
    Path("full").touch()
    words = ["main", *commanded]
    assert pdiff(words) == 2
    done = len(Path("calls").read_text())
    assert 4 <= done < 12
    Path("full").unlink()
    assert pdiff(words) == 0
    assert len(Path("calls").read_text()) == 4 + 3 + 4 + 1 + (done - 4), "only those after the failure are repeated"
    expected = [1 / (1 + k * k) for k in range(4)]
    assert table().query("group == 'original'").test_accuracy.tolist() == pytest.approx(expected)
    assert not list(workspace.glob(".pdiff/*/")), "nothing is left"


@pytest.mark.slow
def test_originals_are_evaluated_again_where_their_script_or_their_checkpoints_changed(workspace, commanded, capsys):
    def calls(*words):
        Path("calls").write_text("")
        assert pdiff([*words[:1], *commanded, *words[1:]]) == 0
        return len(Path("calls").read_text())

    assert calls("evaluate") == calls("evaluate", "--fresh") == 12
    assert calls("evaluate", "--generate.seed", "1") == 8
    assert f"originals: reusing run {runs('originals')[1].info.run_id}" in capsys.readouterr().out
    Path("helper.py").write_text("SCALE = 2")  # which the script imports
    assert calls("evaluate", "--generate.seed", "2") == 12
    assert calls("prepare", "--fresh") == 0
    assert calls("evaluate", "--generate.seed", "3") == 12
    assert calls("evaluate", "--generate.seed", "4") == 8


@pytest.mark.slow
def test_an_evaluation_of_originals_that_failed_late_is_completed(workspace, commanded):
    """Its results so far are kept, and no evaluation of what is generated takes them for the whole."""
    Path("test.py").write_text(TEST.replace("generated/00000", "original/00002"))
    Path("full").touch()
    assert pdiff(["evaluate", *commanded]) == 2
    assert len(Path("calls").read_text()) == 2
    assert [run.info.status for stage in ("originals", "evaluate") for run in runs(stage)] == ["FAILED", "FAILED"]
    Path("full").unlink()
    assert pdiff(["evaluate", *commanded]) == 0
    assert len(Path("calls").read_text()) == 4 + 3 + 4 + 1
    assert table().query("group == 'original'").test_accuracy.tolist() == pytest.approx([1, 1 / 2, 1 / 5, 1 / 10])


@pytest.mark.slow
def test_known_originals_are_no_reason_to_keep_an_evaluation_that_failed_at_once(workspace, commanded, capsys):
    assert pdiff(["evaluate", *commanded]) == 0
    Path("full").touch()
    assert pdiff(["evaluate", *commanded, "--generate.seed", "1"]) == 2
    assert "originals: reusing run" in capsys.readouterr().out
    assert not list(workspace.glob(".pdiff/*/"))
