"""Kills at random moments: the same command then ends with the same numbers, and leaves nothing behind.

`make chaos` kills oftener (PDIFF_CHAOS times), and writes a record with a line for each kill.
"""

import functools
import os
import random
import time
from pathlib import Path

import mlflow
import optuna
import pytest
import yaml
from filelock import FileLock
from forked import Command
from safetensors.torch import load_file
from tracked import NAMES, TINY, artifacts, runs

from pdiff.files import append_line

KILLS = int(os.environ.get("PDIFF_CHAOS", "20"))  # of `main`; of a sweep a tenth as many
PER_FOLDER = {"main": 20, "sweep": 2}
FOLDERS = {command: max(1, KILLS // 20) for command in PER_FOLDER}
EXPERIMENT = yaml.safe_load(TINY)
SWEEP = {
    "objectives": {"val_accuracy/generated_mean": "maximize"},
    "parameters": {"autoencoder.latent_size": {"kind": "categorical", "choices": [2, 3]}},
    "sampler": {"kind": "grid"},
    "final": {"seeds": 1, "trials": 1},
}
if KILLS < 200:  # the fewest images, checkpoints and steps with which every stage still saves states
    EXPERIMENT["dataset"]["validation_fraction"] = 0.9
    EXPERIMENT["prepare"] = {"pretrain": {"epochs": 2, "batch_size": 64}, "collect": {"checkpoints": 5}}
    EXPERIMENT["diffusion"] |= {"steps": 20, "width": 8, "evaluate_every": 10}
    EXPERIMENT["generate"] = {"count": 3, "sampling_steps": 3}
    EXPERIMENT["evaluate"] = {"noise": [], "baselines": ["average"], "baseline_count": 2}
    SWEEP["final"]["seeds"] = 0
else:
    EXPERIMENT["log_models"] = True  # which doubles the time
COMMANDS = {
    "main": ["main", "--tag", "tiny.yaml"],
    "sweep": [*("sweep", "--tag", "tiny.yaml", "--sweep", "grid.yaml"), "--workers", "2", "--log_models", "false"],
}
VARYING = ("seconds/", "memory_mb/", "system/")  # the beginnings of metrics that are no results

pytestmark = pytest.mark.slow


def begin(folder: Path, command: str) -> Command:
    """Start a command in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (folder / "grid.yaml").write_text(yaml.safe_dump(SWEEP))
    variables = {name: value for name, value in os.environ.items() if name not in NAMES}
    return Command(folder, COMMANDS[command], variables | {"PDIFF_SAVE_SECONDS": "0.02", "OMP_NUM_THREADS": "1"})


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
    expected = {"tiny.yaml", "grid.yaml", ".pdiff", "mlruns", "mlflow.db", "optuna.db"}
    beside = {f"{name}.db{end}" for name in ("mlflow", "optuna") for end in ("-wal", "-shm")}
    names = {path.name for path in folder.iterdir()} - expected - beside
    for path in (folder / ".pdiff").rglob("*"):
        if path.name in ("store.lock", "stages.lock"):
            with FileLock(path, timeout=1):
                pass
        elif "sweeps" not in path.parts or path.name.startswith("."):  # where a sweep keeps its report and logs
            names.add(str(path.relative_to(folder)))
    return names


def check(folder: Path, command: str, process: Command) -> dict:
    """What a command that has ended finds; it must have succeeded, and left nothing behind."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    found = results(folder, command)
    assert not left(folder)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Of a command, how many seconds it takes, and what it finds when nothing disturbs it; each runs once."""

    @functools.cache
    def undisturbed(command: str) -> tuple[float, dict]:
        Command(Path.cwd(), ["--version"], os.environ).wait()  # the libraries are imported
        folder, start = tmp_path_factory.mktemp("reference"), time.monotonic()
        process = begin(folder, command)
        process.wait()
        seconds = time.monotonic() - start
        return seconds, check(folder, command, process)

    return undisturbed


@pytest.mark.parametrize(
    ("command", "number"), [(command, number) for command, count in FOLDERS.items() for number in range(count)]
)
def test_kills_change_nothing(reference, tmp_path, command, number):
    """Killed at uniformly random moments of the undisturbed run, the first second included; where a command ends before
    its moment, or after the last kill, it is compared, and the next one begins in an empty folder."""
    seconds, expected = reference(command)
    chance, kills, folder = random.Random(f"{command} {number}"), 0, tmp_path / "0"
    while kills < PER_FOLDER[command] or folder.exists():
        moment = chance.uniform(0, seconds) if kills < PER_FOLDER[command] else None
        process = begin(folder, command)
        killed = process.wait(moment) is None and process.kill_group()
        files = " ".join(sorted(path.name for path in folder.iterdir()))
        line = f"{command},{number},{kills},{'' if moment is None else f'{moment:.3f}'},{process.returncode},{files}"
        print(line)  # shown where the test fails
        if record := os.environ.get("PDIFF_CHAOS_RECORD"):
            append_line(Path(record), line)
        kills += killed
        if not killed:
            assert check(folder, command, process) == expected
            folder = tmp_path / str(int(folder.name) + 1)
