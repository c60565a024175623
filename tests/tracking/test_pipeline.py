"""The platform as its user meets it: commands, runs, reuse, kills, two at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tracked import STAGES, artifacts, runs, start, statuses, wait_for

from pdiff.cli.main import main as pdiff
from pdiff.experiment import stages
from pdiff.method.generators.base import Generator
from pdiff.networks import architectures


@pytest.mark.slow
def test_main_tracks_everything_and_reuses_what_is_finished(empty_workspace, capsys):
    assert pdiff(["main", "--tag", "tiny.yaml", "--log_models", "true"]) == 0
    printed = capsys.readouterr().out
    assert all(group in printed for group in ("original", "generated", "noise_0.05", "average"))

    assert sorted(statuses()) == sorted((stage, "FINISHED") for stage in ["main", *STAGES])
    (parent,) = runs("main")
    for stage in STAGES:
        (run,) = runs(stage)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {"pdiff.tag": "tiny", "pdiff.stage": stage}.items() <= run.data.tags.items()
        assert run.data.params["config.diffusion.steps"] == "60"
        assert run.data.tags["mlflow.note.content"].startswith(f"{stages.STAGES[stage].does} Experiment `tiny`.")
        assert (artifacts(run) / "config.yaml").exists()
    verdict = (artifacts(parent) / "verdict.md").read_text().strip()
    assert verdict in parent.data.tags["mlflow.note.content"]
    assert runs("train")[0].data.tags["mlflow.note.content"].endswith("Next: the stage `generate`.")
    experiment = mlflow.get_experiment(parent.info.experiment_id)
    assert experiment.name == "pdiff" and experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.pdiff"])["state"])
    there = {f"metrics.`{name}`" for name in parent.data.metrics} | {f"tags.`{name}`" for name in parent.data.tags}
    sometimes = {"tags.`pdiff.alarm`", "metrics.`seconds/gaussian`"}
    assert set(view["selectedColumns"]) - there - sometimes == {"duration"}
    assert f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=pdiff&" in printed
    written = {
        "pretrain": {"network.safetensors", "history.csv"},
        "prepare": {"checkpoints.safetensors", "heldout.safetensors", "heldout.json", "network.safetensors"},
        "train": {"generator"},
        "generate": {"generated.safetensors", "generated.json"},
        "originals": {"original.safetensors", "heldout.safetensors"},
        "evaluate": {"evaluation.csv", "similarity.safetensors", "report.html", "summary.json", "verdict.md", "tables"},
    }
    for stage, names in written.items():
        there = {path.name for path in artifacts(runs(stage)[0]).iterdir()}
        assert names <= there
        assert not any(name.startswith(".") for name in there)
    (prepared,) = runs("prepare")
    assert prepared.inputs.dataset_inputs[0].dataset.name == "digits"
    models = {model.name for model in mlflow.search_logged_models(output_format="list")}
    programs = {"autoencoder", "diffusion"} if find_spec("torch.export") else set()  # since PyTorch 2.1
    assert {"generator", *programs} <= models

    evaluation = pd.read_csv(artifacts(runs("evaluate")[0]) / "evaluation.csv")
    assert evaluation.groupby("group").size().to_dict() == {
        "original": 18,
        "heldout": 2,
        "generated": 8,
        "noise_0.05": 4,
        "average": 1,
        "gaussian": 4,
    }
    generated = evaluation[evaluation.group == "generated"]
    assert parent.data.metrics["test_accuracy/generated_mean"] == pytest.approx(generated.test_accuracy.mean())
    expected = {
        f"{part}_accuracy/{g}_{s}"
        for part in ("val", "test")
        for g in ("original", "noise_0.05", "average")
        for s in ("mean", "max", "min", "std", "median")
    }
    expected |= {
        f"similarity/{pair}"
        for pair in ("original_original", "generated_generated", "original_generated", "original_generated_max")
    }
    expected |= {"pretrain/loss", "pretrain/val_accuracy", "collect/loss", "autoencoder/loss", "diffusion/loss"}
    expected |= {
        "autoencoder/reconstruction_val_accuracy",
        "diffusion/heldout_loss",
        "seconds/diffusion",
        "memory_mb/diffusion",
    }
    assert expected <= parent.data.metrics.keys()
    assert list((empty_workspace / ".pdiff").glob("*/")) == [], "work folders are removed"
    assert pdiff(["compare"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[0] == "tiny" and float(row[5]) == pytest.approx(100 * generated.test_accuracy.mean(), abs=0.006)

    assert pdiff(["main", "--tag", "tiny.yaml", "--generate.count", "5"]) == 0
    assert capsys.readouterr().out.count("reusing run") == 4
    first, second = (run.info.run_id for run in runs("main"))
    assert pdiff(["compare", first[:8], second]) == 0
    printed = capsys.readouterr().out
    assert ["generate.count", "8", "5"] in [line.split() for line in printed.splitlines()]
    page = (artifacts(runs("compare")[0]) / "comparison.html").read_text()
    assert f"tiny {first[:8]}: generated" in page and f"tiny {second[:8]}: generated" in page
    assert pdiff(["compare", first, first[:9]]) == pdiff(["compare", first, runs("train")[0].info.run_id]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "given twice" in lines[0] and "a run of train compares no networks" in lines[1]
    counts = {"pretrain": 1, "prepare": 1, "train": 1, "generate": 2, "originals": 1, "evaluate": 2}
    assert {stage: len(runs(stage)) for stage in STAGES} == counts
    assert pdiff(["generate", "--tag", "tiny.yaml", "--fresh"]) == 0
    assert {stage: len(runs(stage)) for stage in STAGES} == counts | {"generate": 3}
    same = [load_file(artifacts(runs("generate")[k]) / "generated.safetensors") for k in (0, 1, 2)]
    for name, tensor in same[0].items():
        torch.testing.assert_close(same[1][name], tensor[:5])  # network k depends on the seed and on k alone
        assert torch.equal(same[2][name], tensor)


@pytest.mark.slow
def test_a_run_whose_artifacts_are_gone_is_not_reused(workspace):
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 0
    shutil.rmtree(artifacts(runs("prepare")[0]))
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 0
    assert [(artifacts(run) / "checkpoints.safetensors").exists() for run in runs("prepare")] == [False, True]


@pytest.mark.slow
def test_a_generator_of_an_older_collection_is_not_reused(workspace):
    assert pdiff(["train", "--tag", "tiny.yaml"]) == 0
    assert pdiff(["prepare", "--tag", "tiny.yaml", "--fresh"]) == 0
    assert pdiff(["train", "--tag", "tiny.yaml"]) == 0
    assert pdiff(["train", "--tag", "tiny.yaml"]) == 0
    read = [run.data.tags["pdiff.prepare_run"] for run in runs("train")]
    assert read == [run.info.run_id for run in runs("prepare")]


@pytest.mark.slow
def test_export_writes_what_a_network_loads(workspace):
    assert pdiff(["generate", "--tag", "tiny.yaml"]) == 0
    (run,) = runs("generate")
    for form in ("pth", "safetensors"):
        words = ["export", "--run", run.info.run_id, "--out", "exported", "--format", form, "--index", "0", "3"]
        assert pdiff(words) == 0
    paths = sorted(Path("exported").iterdir())
    assert [path.name for path in paths] == [f"generated_{k:05d}.{s}" for k in (0, 3) for s in ("pth", "safetensors")]
    network = architectures.build("mlp", pretrained=False, classes=10, channels=1, image_size=8)
    plain, safe = torch.load(paths[2], weights_only=True), load_file(paths[3])
    assert network.load_state_dict(plain, strict=False).unexpected_keys == []
    sampled = load_file(artifacts(run) / "generated.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, sampled[name][3]) and torch.equal(safe[name], sampled[name][3])
    assert pdiff(["export", "--run", run.info.run_id, "--out", "exported", "--index", "8"]) == 2
    assert pdiff(["export", "--run", "nonsense", "--out", "exported"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train"])  # random moments of all stages: test_chaos.py
def test_a_killed_run_resumes_to_the_same_result(workspace, stage, capsys, monkeypatch):
    """kill -9 in the middle of a stage; the next command goes on, and ends where an uninterrupted one does."""
    longer = {
        "pretrain": ["--prepare.pretrain.epochs", "150"],
        "train": ["--diffusion.steps", "6000", "--diffusion.stop_on", "none"],
    }
    command = {"pretrain": "prepare", "train": "train"}[stage]
    words = [command, "--tag", "tiny.yaml", *longer[stage]]
    result = {"pretrain": "checkpoints.safetensors", "train": "generator/generator.safetensors"}[stage]
    state = {"pretrain": "pretrain.pt", "train": "diffusion.pt"}[stage]
    process = start(*words, PDIFF_SAVE_SECONDS="0.2")
    wait_for(lambda: list(workspace.glob(f".pdiff/*/.state/{state}")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (killed,) = runs(stage)
    assert killed.info.status == "RUNNING"  # no process was left to close it
    saved = torch.load(next(workspace.glob(f".pdiff/*/.state/{state}")), weights_only=True)[0]["step"]
    block = {"pretrain": "seconds/pretrain", "train": "seconds/diffusion"}[stage]
    points = [pd.read_csv(path).set_index("name").time for path in workspace.glob(".pdiff/*/history.csv")]
    spent = max(times.max() - times[block] for times in points if block in times)

    assert pdiff(words) == 0
    assert "resuming" in capsys.readouterr().out
    assert [run.info.status for run in runs(stage)] == ["KILLED", "FINISHED"]
    loss = {"pretrain": "pretrain/loss", "train": "diffusion/loss"}[stage]
    history = mlflow.MlflowClient().get_metric_history(runs(stage)[1].info.run_id, loss)
    steps = sorted(point.step for point in history)
    assert steps[0] < saved < steps[-1] and len(steps) == len(set(steps)), "the curve is whole, before and after"
    assert runs(stage)[1].data.metrics[block] > spent > 0, "the seconds before the kill count"

    monkeypatch.setenv("PDIFF_WORK", str(workspace / "other"))
    mlflow.set_tracking_uri(f"sqlite:///{workspace}/other.db")
    assert pdiff(words) == 0
    resumed, uninterrupted = (load_file(path) for path in workspace.glob(f"mlruns/*/*/artifacts/{result}"))
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(tensor, uninterrupted[name]) for name, tensor in resumed.items())


@pytest.mark.slow
def test_two_at_once_on_a_fresh_database(empty_workspace):
    both = [start("main", "--tag", "tiny.yaml") for _ in range(2)]
    for process in both:
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
    expected = [("main", "FINISHED")] * 2 + [(stage, "FINISHED") for stage in STAGES]
    assert sorted(statuses()) == sorted(expected)


@pytest.mark.slow
def test_terminated_runs_are_closed(workspace):
    process = start("main", "--tag", "tiny.yaml", "--diffusion.steps", "100000", "--diffusion.stop_on", "none")
    wait_for(lambda: any(stage == "train" for stage, _ in statuses()), process)
    process.terminate()
    printed = process.communicate()[0]
    assert process.returncode == 130, printed
    assert dict(statuses()) == {"main": "KILLED", "pretrain": "FINISHED", "prepare": "FINISHED", "train": "KILLED"}


@pytest.mark.slow
def test_a_tracking_server(workspace):
    """Through a server, artifacts are up- and downloaded instead of read in place."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", "0", "--workers", "1", "--backend-store-uri"]
    command += [f"sqlite:///{workspace}/server.db", "--artifacts-destination", str(workspace / "store")]
    with (workspace / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:

        def address() -> str:
            return "".join(re.findall(r"running on (http://[\d.]+:\d+)", (workspace / "server.log").read_text()))

        wait_for(address, server)
        mlflow.set_tracking_uri(address())
        assert pdiff(["main", "--tag", "tiny.yaml", "--log_models", "true"]) == 0
        assert sorted(statuses()) == sorted((stage, "FINISHED") for stage in ["main", *STAGES])
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    assert pdiff(["main", "--tag", "tiny.yaml"]) == 1  # the server is away now


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["main", "--tag", "tyni"], "tyni"),
        (["main", "--tag", "digits_mpl"], "digits_mlp"),
        (["train", "--tag", "tiny.yaml", "--diffusion.stesp", "3"], "diffusion.steps"),
        (["train", "--tag", "tiny.yaml", "--diffusion.steps", "many"], "many"),
        (["train", "--tag", "tiny.yaml", "--diffusion.steps", "-1"], "diffusion.steps"),
        (["train", "--tag", "tiny.yaml", "--diffusion.steps"], "--diffusion.steps"),
        (["train", "--tag", "tiny.yaml", "surplus"], "surplus"),
        (["prepare", "--tag", "tiny.yaml", "--device", "cuda:99"], "cuda:99"),
        (["prepare", "--tag", "tiny.yaml", "--prepare.parameters", "[nonsense.*]"], "nonsense"),
        (["prepare", "--tag", "tiny.yaml", "--prepare.source", "absent"], "absent"),
        (["main", "--tag", "cifar100_resnet18", "--dataset.download", "false"], "cifar-100-python"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_running_run(workspace, capfd, words, hint, monkeypatch):
    monkeypatch.setenv("PDIFF_DATA", str(workspace / "data"))
    assert pdiff(words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pdiff:")]
    assert len(lines) == 1 and hint in lines[0]
    if Path("mlflow.db").exists():
        assert all(run.info.status == "FAILED" and run.data.tags["pdiff.error"] for run in runs())


@pytest.mark.slow
def test_a_full_disk_is_one_line(workspace, capfd, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "checkpoints.safetensors")

    monkeypatch.setattr("pdiff.method.collection.new_tensors", full)
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 1
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    (run,) = runs("prepare")
    assert run.info.status == "FAILED"
    assert not list(artifacts(run).glob("checkpoints*"))


@pytest.mark.slow
def test_a_server_that_refuses_the_password_is_one_line(workspace, capfd):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 401)
            self.end_headers()
            self.wfile.write(b"You are not authenticated.")

        do_POST = do_GET

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
        assert pdiff(["compare"]) == 1
        server.shutdown()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("127.0.0.1 - -")]  # its log
    assert line.startswith("pdiff: MLFLOW_TRACKING_URI http://127.0.0.1:") and "401" in line


def test_no_permission_is_one_line(workspace, capfd, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("PDIFF_WORK", str(workspace / "file" / "work"))
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 1
    assert "cannot be written" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_interrupted_sampling_resumes_with_another_batch_size(workspace, monkeypatch):
    """Interrupted in the second batch of four, resumed in batches of two: the same networks."""
    assert pdiff(["generate", "--tag", "tiny.yaml"]) == 0
    sample, calls = Generator.sample, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "sample", interrupted)
        assert pdiff(["generate", "--tag", "tiny.yaml", "--fresh", "--generate.batch_size", "4"]) == 130
    mlflow.MlflowClient().delete_run(runs("generate")[0].info.run_id)  # or it would be reused
    assert pdiff(["generate", "--tag", "tiny.yaml", "--generate.batch_size", "2"]) == 0
    first, second = (load_file(path) for path in workspace.glob("mlruns/*/*/artifacts/generated.safetensors"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor)


@pytest.mark.slow
def test_checkpoints_in_files_bring_their_frozen_layers(workspace, capfd):
    """Only the last layer is generated; the others come from the files, not from a random network."""
    network = architectures.build("mlp", pretrained=False, classes=10, channels=1, image_size=8)
    Path("own").mkdir()
    for k in range(4):
        state = {n: t + 0.01 * torch.randn(t.shape) * n.startswith("3.") for n, t in network.state_dict().items()}
        torch.save({"state_dict": state}, f"own/{k}.pth")
    words = ["prepare", "--tag", "tiny.yaml", "--prepare.source", "own", "--prepare.parameters"]
    assert pdiff([*words, "[3.*]"]) == 0
    (run,) = runs("prepare")
    base = load_file(artifacts(run) / "network.safetensors")
    assert all(torch.equal(base[name], network.state_dict()[name]) for name in ("1.weight", "1.bias"))
    assert set(load_file(artifacts(run) / "checkpoints.safetensors")) == {"3.weight", "3.bias"}
    for k in range(4):
        torch.save({n: t for n, t in network.state_dict().items() if n.startswith("3.")}, f"own/{k}.pth")
    assert pdiff([*words, "all"]) == 2
    assert "1.weight" in capfd.readouterr().err.splitlines()[-1]
