"""The workers of one command, the progress of their study, and the loop that keeps the workers busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import TrialState
from tqdm.auto import tqdm

from pdiff.errors import Failure, UserError
from pdiff.sweeps.launchers import Job
from pdiff.sweeps.trials import StaleTrials, best, best_found, is_late, reason, retry, values_text
from pdiff.tracking import runs, store

POLL = 1.0  # seconds between looks at a study
STOP_SECONDS = 60.0  # that workers get to end cleanly
STARTS = 5  # workers in a row that may end before their first trial


class Workers:
    """As many workers as there is work for; those that die are replaced.

    Args:
        start: starts the worker of a slot.
        size: how many run at once, at most.
    """

    def __init__(self, start: Callable[[int], Job], size: int) -> None:
        self.start, self.size, self.jobs = start, size, {}
        self.deaths, self.finished, self.log = 0, 0, Path()

    def keep(self, waiting: int, finished: int) -> None:
        """Start workers for the trials that wait.

        Args:
            waiting: number of trials that wait.
            finished: number of trials that have ended; once it grows, workers are known to start.

        Raises:
            UserError: workers end before they begin a trial.
        """
        ended = [slot for slot, job in self.jobs.items() if not job.running()]
        self.deaths = 0 if finished > self.finished else self.deaths + len(ended)
        self.finished = finished
        for slot in ended:
            self.log = self.jobs.pop(slot).log
        if self.deaths > STARTS + self.size and waiting:
            raise Failure(f"workers exited before starting a trial; last line of {self.log}: {last_line(self.log)}")
        for slot in [slot for slot in range(self.size) if slot not in self.jobs][:waiting]:
            self.jobs[slot] = self.start(slot)

    def pause(self, seconds: float) -> None:
        """Wait until one of them has ended, or so many seconds."""
        pause(self.jobs.values(), seconds)

    def stop(self) -> None:
        """End all of them cleanly, and wait for it."""
        for job in self.jobs.values():
            job.stop()
        self.wait()

    def wait(self) -> None:
        """Wait until all have ended."""
        for job in self.jobs.values():
            job.wait(STOP_SECONDS)


def pause(jobs: Iterable[Job], seconds: float) -> None:
    """Wait until one of some jobs has ended, or so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(job.running() for job in jobs):
        time.sleep(0.1)


def last_line(path: Path) -> str:
    """The last line of a log, or "nothing"."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "nothing"


class Progress(NamedTuple):
    """Numbers of trials that wait, run, and have ended; whether another trial is now the best."""

    waiting: int
    running: int
    finished: int
    improved: bool


class Display:
    """A progress bar: trials that have ended, the best value, those that run; and a line for each that ends."""

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.shown, self.best = study, set(), None

    def __enter__(self) -> Display:
        trials = self.study.get_trials(deepcopy=False)
        self.shown = {trial.number for trial in trials if trial.state.is_finished()}
        self.bar = tqdm(total=len(trials), initial=len(self.shown), desc="trials", unit="trial", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self) -> Progress:
        """Show the present state."""
        trials = self.study.get_trials(deepcopy=False)
        states = [trial.state for trial in trials]
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.shown:
                self.shown.add(trial.number)
                complete = trial.state == TrialState.COMPLETE
                text = values_text(self.study, trial.values) if complete else reason(trial)
                tqdm.write(f"trial {trial.number}: {trial.state.name.lower()}, {text}")
        found = best(self.study)
        before, self.best = self.best, found[0].number if found else None
        value = f"{found[0].values[0]:.4g} (trial {self.best})" if found else "none"
        waiting, running = states.count(TrialState.WAITING), states.count(TrialState.RUNNING)
        self.bar.total, self.bar.n = len(trials), len(self.shown)
        self.bar.set_postfix_str(f"best {value}, running {running}")
        return Progress(waiting, running, len(self.shown), improved=self.best not in (None, before))


def supervise(study: optuna.Study, workers: Workers, *, run_id: str = "") -> None:
    """Keep workers busy and show progress until every planned trial has ended, or the time is up.

    Args:
        study: its planned trials wait.
        workers: those of this command.
        run_id: the run of the sweep. The command that has it leads the study: it also retries lost trials, and records
            the best one.

    Raises:
        UserError: a trial found a mistake that all others would meet; workers cannot be started.
    """
    stale = StaleTrials()
    try:
        with Display(study) as display:
            while True:
                stale.fail(study)
                if run_id:
                    store.disown(retry(study))
                if stopped := study.user_attrs["stopped"]:
                    raise UserError(stopped)
                progress = display.update()
                if run_id and progress.improved:
                    runs.record(run_id, metrics=best_found(study)[0])
                waiting = 0 if is_late(study) else progress.waiting
                if not waiting and not progress.running:
                    break
                workers.keep(waiting, progress.finished)
                workers.pause(POLL)
            workers.wait()
    except BaseException:
        workers.stop()
        stale.fail(study)
        raise
