"""Kills at random moments: the same command then ends with the same numbers, and leaves nothing behind.

`make chaos` kills oftener (PDIFF_CHAOS times), and writes a record with a line for each kill.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import optuna
import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from tracked import TINY, artifacts, runs

from pdiff.files import append_line

KILLS = int(os.environ.get("PDIFF_CHAOS", "10"))  # of `main`; from 20 on a fifth of them of a sweep
PER_FOLDER = {"main": 10, "sweep": 4}
EXPERIMENT = yaml.safe_load(TINY) | {"log_models": KILLS >= 20}  # which doubles the time
SWEEP = {
    "objectives": {"val_accuracy/generated_mean": "maximize"},
    "parameters": {"autoencoder.latent_size": {"kind": "categorical", "choices": [2, 4]}},
    "sampler": {"kind": "grid"},
}
COMMANDS = {
    "main": ["main", "--tag", "tiny.yaml"],
    "sweep": [*("sweep", "--tag", "tiny.yaml", "--sweep", "grid.yaml"), "--workers", "2", "--log_models", "false"],
}
VARYING = ("seconds/", "memory_mb/", "system/")  # the beginnings of metrics that are no results

pytestmark = pytest.mark.slow


def begin(folder: Path, command: str) -> subprocess.Popen:
    """Start a command in a folder, with its children in a process group of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (folder / "grid.yaml").write_text(yaml.safe_dump(SWEEP))
    unset = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "PDIFF_WORK", "PDIFF_STORAGE")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {"PDIFF_SAVE_SECONDS": "0.02", "OMP_NUM_THREADS": "1"}
    output = (folder / "output.txt").open("w")
    words = [sys.executable, "-m", "pdiff", *COMMANDS[command]]
    return subprocess.Popen(
        words, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def results(folder: Path, command: str) -> dict:
    """What a finished command has found, without what differs between two runs."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    try:
        statuses = {run.info.status for run in runs()}
        assert "RUNNING" not in statuses and "SCHEDULED" not in statuses
        if command == "main":
            *_, parent = [run for run in runs("main") if run.info.status == "FINISHED"]
            generated = load_file(artifacts(runs("generate")[-1]) / "generated.safetensors")
            found = {name: value for name, value in parent.data.metrics.items() if not name.startswith(VARYING)}
            return found | {name: tensor.tolist() for name, tensor in generated.items()}
    finally:
        mlflow.set_tracking_uri(None)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/optuna.db")
    trials = study.get_trials(deepcopy=False)
    assert all(trial.state.is_finished() for trial in trials)
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    found = {str(sorted(trial.params.items())): trial.value for trial in complete}
    assert len(found) == len(complete), "no trial was done twice"
    return found


def left(folder: Path) -> set[str]:
    """What stands in a folder that a finished command should not have left there; locks must be free."""
    expected = {"tiny.yaml", "grid.yaml", "output.txt", ".pdiff", "mlruns", "mlflow.db", "optuna.db"}
    beside = {f"{name}.db{end}" for name in ("mlflow", "optuna") for end in ("-wal", "-shm")}
    names = {path.name for path in folder.iterdir()} - expected - beside
    for path in (folder / ".pdiff").rglob("*"):
        if path.name in ("store.lock", "stages.lock"):
            with FileLock(path, timeout=1):
                pass
        elif "sweeps" not in path.parts or path.name.startswith("."):  # where a sweep keeps its report and logs
            names.add(str(path.relative_to(folder)))
    return names


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """A command, when it began to write and when it ended, in seconds, and what it finds when nothing disturbs it."""
    folder, start = tmp_path_factory.mktemp("reference"), time.monotonic()
    process = begin(folder, request.param)
    while not (folder / ".pdiff").exists() and not list(folder.glob(".mlflow.db.*")) and process.poll() is None:
        time.sleep(0.01)
    begun = time.monotonic() - start
    assert process.wait() == 0, (folder / "output.txt").read_text()
    seconds = time.monotonic() - start
    assert not left(folder)
    return request.param, begun, seconds, results(folder, request.param)


@pytest.mark.parametrize(
    ("reference", "number"),
    [("main", k) for k in range(KILLS // 10)] + [("sweep", k) for k in range(KILLS // 20)],
    indirect=["reference"],
)
def test_kills_change_nothing(reference, tmp_path, number):
    command, begun, seconds, expected = reference
    chance, folder, kills = random.Random(f"{command} {number}"), tmp_path / "0", 0

    def finish() -> None:
        process = begin(folder, command)
        assert process.wait() == 0, (folder / "output.txt").read_text()
        assert results(folder, command) == expected
        assert not left(folder)

    while kills < PER_FOLDER[command]:
        first = not folder.exists() and number % 2 == 0  # within the first second, where databases are made
        moment = begun + chance.uniform(-0.1, 1.2 if first else 0.7 * (seconds - begun))
        process = begin(folder, command)
        time.sleep(max(0.0, moment))
        ended, files = process.poll(), sorted(path.name for path in folder.iterdir())
        if record := os.environ.get("PDIFF_CHAOS_RECORD"):
            append_line(Path(record), f"{command},{number},{kills},{moment:.2f},{ended},{' '.join(files)}")
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # nothing is left to kill here
            assert ended == 0, (folder / "output.txt").read_text()
            finish()
            folder = tmp_path / str(kills)
    finish()
