"""The command `sweep`: the first one of a study leads it, others lend it workers."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import optuna
import pandas as pd
from tqdm.auto import tqdm

from pdiff.errors import Failure
from pdiff.experiment.metrics import COMPARED
from pdiff.files import write_text
from pdiff.parallel.liveness import alive, this_process
from pdiff.sweeps import trials
from pdiff.sweeps.command import Checked, Command, check, refuse_other_settings, searched
from pdiff.sweeps.launchers import Job, Task, launcher
from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.storage import open_storage, without_password
from pdiff.sweeps.workers import POLL, STOP_SECONDS, Workers, last_line, pause, supervise
from pdiff.tracking import runs, store

LEASE = 60.0  # seconds for which a leader of another host is taken to be alive
SETTLE = 0.5  # seconds after which the last of several commands that claim a study leads it


class Result(NamedTuple):
    """What a sweep found: its run, its study, the page of its figures, and the metrics of the best trials on test
    images (columns metric, mean, std, trial); a command that only lends workers has neither page nor metrics."""

    run_id: str
    study: optuna.Study
    sweep: Sweep
    report: Path | None
    final: pd.DataFrame

    def best_text(self) -> str:
        """The best trials, one line each."""
        found = trials.best(self.study, self.sweep.final.trials)
        values = [trials.values_text(self.study, trial.values) for trial in found]
        lines = [f"trial {trial.number}: {text} with {trial.params}" for trial, text in zip(found, values, strict=True)]
        return "\n           ".join(lines) or "no trial completed"

    def final_text(self) -> str:
        """What the best trials reach on test images: mean and standard deviation over new seeds."""
        shown = self.final[self.final.metric.isin(COMPARED.values())]
        text = shown.apply(lambda row: f"{row['mean']:.4f} ± {row['std']:.4f}", axis=1)
        return shown.assign(text=text).pivot(index="metric", columns="trial", values="text").to_string()


def run(command: Command) -> Result:
    """Lead a study to its end, or, where another command leads it, lend it workers until then.

    Raises:
        UserError: a sweep, a tag, or a storage that cannot be used; a study that was begun with other settings; trials
            that failed, every one of them.
    """
    checked = check(command)
    study, folder, pinned = _study(command, checked), command.folder, checked.experiment.device == "auto"
    start = launcher(command.launcher, command.workers, folder, command.options, pinned=pinned)
    workers = Workers(partial(start, _task(command, "trials")), command.workers)
    while not _claimed(study):
        if "run" in study.user_attrs and study.get_trials(deepcopy=False):
            tqdm.write(f"study {command.name}: another command leads it; {command.workers} workers join")
            supervise(study, workers)
            return Result(study.user_attrs["run"], study, checked.sweep, None, pd.DataFrame())
        time.sleep(POLL)
    note = f"Study {command.name} in {without_password(command.storage)}."
    tags = {"pdiff.study": command.name, "mlflow.note.content": note}
    with (
        _leading(study),
        runs.around("sweep", checked.experiment, label=f"sweep {command.name}", tags=tags) as run_id,
    ):
        _begin(study, command, checked, run_id)
        try:
            supervise(study, workers, run_id=run_id)
        finally:
            page = _report(study, folder / "report", run_id)
        if failed := trials.failure(study):
            raise Failure(f"study {command.name}: {failed}")
        final = _final(study, checked.sweep, partial(start, _task(command, "final")), folder / "final.csv", run_id)
    return Result(run_id, study, checked.sweep, page, final)


def _study(command: Command, checked: Checked) -> optuna.Study:
    """The study, created where there is none.

    Raises:
        UserError: there is one of this name that searches something else.
    """
    sweep, storage = checked.sweep, open_storage(command.storage)
    directions = [objective.direction for objective in sweep.objectives.values()]
    study = optuna.create_study(study_name=command.name, storage=storage, directions=directions, load_if_exists=True)
    refuse_other_settings(command, checked, study)
    study.set_user_attr("searched", searched(checked))
    study.set_metric_names(list(sweep.objectives))
    return study


def _task(command: Command, role: str) -> Task:
    """What a worker does. The storage, which may hold a password, is in its environment."""

    def call() -> None:
        from pdiff.sweeps import objective  # imports torch

        objective.ROLES[role](command.name, command.storage)

    words = [sys.executable, "-m", "pdiff", "work", "--study", command.name, "--role", role]
    variables = {"PDIFF_STORAGE": command.storage, "MLFLOW_TRACKING_URI": store.address()}
    return Task(words, variables, call)


def _claimed(study: optuna.Study) -> bool:
    """Become the leader of a study, unless it has one that lives."""
    process, until = study.user_attrs.get("leader", ["", 0])
    if process and alive(process) and time.time() < until:
        return False
    _lease(study)
    time.sleep(SETTLE)
    return study.user_attrs["leader"][0] == this_process()


def _lease(study: optuna.Study) -> None:
    study.set_user_attr("leader", [this_process(), time.time() + LEASE])


@contextmanager
def _leading(study: optuna.Study) -> Iterator[None]:
    """Remain the leader of a study for a block."""
    try:
        with trials.repeating(partial(_lease, study), LEASE / 4):
            yield
    finally:
        study.set_user_attr("leader", ["", 0])


def _begin(study: optuna.Study, command: Command, checked: Checked, run_id: str) -> None:
    """Plan the trials, and move those of earlier commands to this one's run."""
    sweep = checked.sweep
    job = {"tag": command.tag, "overrides": command.overrides, "sweep": sweep.model_dump(mode="json")}
    deadline = time.time() + sweep.timeout if sweep.timeout else None
    for key, value in {"job": job, "run": run_id, "stopped": "", "deadline": deadline}.items():
        study.set_user_attr(key, value)
    trials.StaleTrials().fail(study)
    store.disown(trials.retry(study))
    count = command.trials or sweep.trials
    size = math.prod(len(values) for values in checked.grid.values())
    trials.plan(study, min(count, size) if checked.grid else count)
    earlier = [trial.user_attrs["run"] for trial in study.get_trials(deepcopy=False) if "run" in trial.user_attrs]
    store.move(earlier, run_id)


def _report(study: optuna.Study, folder: Path, run_id: str) -> Path:
    """Record the best trial, the figures and the table of a study in its run; the path of the page."""
    from pdiff.sweeps import report  # imports plotly and scikit-learn

    store.close_dead_runs()
    page = report.write(study, folder)
    metrics, parameters = trials.best_found(study)
    files = dict.fromkeys(sorted(folder.iterdir()), "")
    runs.record(run_id, metrics=metrics, parameters=parameters, files=files)
    return page


def _final(study: optuna.Study, sweep: Sweep, start: Callable[[int], Job], path: Path, run_id: str) -> pd.DataFrame:
    """Let a worker run the best trials again on test images; their metrics over the new seeds, one row each.

    Raises:
        Failure: it found no metrics.
    """
    if not sweep.final.seeds or not trials.best(study):
        return pd.DataFrame()
    study.set_user_attr("final", None)
    tqdm.write(f"the best on test images, with {sweep.final.seeds} new seeds each:")
    job = start(0)
    try:
        while job.running():
            pause([job], POLL)
    except BaseException:
        job.stop()
        job.wait(STOP_SECONDS)
        raise
    finally:
        store.close_dead_runs()
    if not study.user_attrs["final"]:
        reason = f"last line of {job.log}: {last_line(job.log)}"
        raise Failure(f"the best trials could not be run again; {reason}")
    frame = pd.DataFrame(study.user_attrs["final"])
    write_text(path, frame.to_csv(index=False))
    first = frame[frame.trial == frame.trial.iloc[0]].set_index("metric")
    metrics = {f"final/{name}": row["mean"] for name, row in first.iterrows()}
    metrics |= {f"final_std/{name}": row["std"] for name, row in first.iterrows()}
    runs.record(run_id, metrics=metrics, files={path: ""})
    return frame
