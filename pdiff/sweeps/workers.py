"""The workers of one command, and what it shows of their study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import TrialState
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.sweeps.launchers import Job
from pdiff.sweeps.search import best, reason, values_text

STOP_SECONDS = 60.0  # that workers get to end cleanly
STARTS = 5  # workers in a row that may die before their first trial


class Crew:
    """The workers of this command: as many as there is work for; those that die are replaced."""

    def __init__(self, start: Callable[..., Job], what: tuple[list[str], dict[str, str]], size: int) -> None:
        self.start, self.what, self.jobs, self.size = start, what, {}, size
        self.deaths, self.finished, self.last = 0, 0, Path()

    def keep(self, waiting: int, finished: int) -> None:
        """Start workers for what waits.

        Raises:
            UserError: they die before they begin a trial.
        """
        ended = [slot for slot, job in self.jobs.items() if not job.running()]
        self.deaths = 0 if finished > self.finished else self.deaths + len(ended)
        self.finished = finished
        if self.deaths > STARTS + self.size and waiting:
            log = self.jobs[ended[0]].log if ended else self.last
            raise UserError(f"the workers end before their first trial; the last words of {log}: {last_line(log)}")
        for slot in ended:
            self.last = self.jobs.pop(slot).log
        for slot in [slot for slot in range(self.size) if slot not in self.jobs][:waiting]:
            self.jobs[slot] = self.start(*self.what, slot)

    def stop(self) -> None:
        """End all of them cleanly, and wait for it."""
        for job in self.jobs.values():
            job.stop()
        self.wait()

    def wait(self) -> None:
        """Wait until all have ended."""
        for job in self.jobs.values():
            job.wait(STOP_SECONDS)


def last_line(path: Path) -> str:
    """The last line of a log, or "nothing"."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "nothing"


class Display:
    """One bar: trials that ended, the best value, those that run; and a line for each that ends."""

    def __init__(self, study: optuna.Study) -> None:
        self.study, self.told, self.best, self.improved = study, set(), None, False

    def __enter__(self) -> Display:
        trials = self.study.get_trials(deepcopy=False)
        self.told = {trial.number for trial in trials if trial.state.is_finished()}
        self.bar = tqdm(total=len(trials), initial=len(self.told), desc="trials", unit="trial", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self) -> tuple[int, int, int]:
        """Show the present state; numbers of trials that wait, run, and have ended."""
        trials = self.study.get_trials(deepcopy=False)
        states = [trial.state for trial in trials]
        waiting, running = states.count(TrialState.WAITING), states.count(TrialState.RUNNING)
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.told:
                self.told.add(trial.number)
                complete = trial.state == TrialState.COMPLETE
                text = values_text(self.study, trial.values) if complete else reason(trial)
                tqdm.write(f"trial {trial.number}: {trial.state.name.lower()}, {text}")
        found = best(self.study)
        self.improved = bool(found) and found[0].number != self.best
        self.best = found[0].number if found else None
        shown = f"{found[0].values[0]:.4g} (trial {self.best})" if found else "none"
        self.bar.total, self.bar.n = len(trials), len(self.told)
        self.bar.set_postfix_str(f"best {shown}, running {running}")
        return waiting, running, len(self.told)
