"""Trials: what becomes of those whose worker died, was interrupted, or failed; and the list of studies."""

import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState
from studies import exhaust, in_memory, made, objective, states, suggest

from pdiff.parallel.liveness import alive, this_process
from pdiff.sweeps import trials
from pdiff.sweeps.storage import open_storage
from pdiff.sweeps.trials import StaleTrials, plan, retry


@pytest.fixture(params=["sqlite", "journal"])
def storage(request, tmp_path):
    url = f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else f"journal://{tmp_path}/some/s.journal"
    return open_storage(url)


def dead_process():
    """The name of a process that has ended."""
    code = "from pdiff.parallel.liveness import this_process; print(this_process())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def begun(study, process):
    """Begin a trial, as a worker that was killed in it did."""
    trial = study.ask()
    suggest(trial)
    trial.set_user_attr("process", process)
    return trial


@pytest.mark.slow
def test_trials_of_dead_workers_are_retried_with_the_same_parameters(storage):
    assert alive(this_process()) and not alive(dead_process()) and alive("another-host:1:1")
    study, stale = made(storage), StaleTrials()
    plan(study, 3)
    first, mine, far = begun(study, dead_process()), begun(study, this_process()), begun(study, "another-host:1:1")
    stale.fail(study)
    assert states(study) == ["FAIL", "RUNNING", "RUNNING"]
    for _ in range(2):
        retry(study)
        assert states(study) == ["FAIL", "RUNNING", "RUNNING", "WAITING"]
    plan(study, 3)
    assert len(states(study)) == 4, "a trial and its retry count once"
    again = study.ask()
    chosen = suggest(again)
    assert again.number == 3 and again.params == first.params
    assert chosen == {key: str(value) for key, value in first.params.items()}
    stale.fail(study)
    assert states(study) == ["FAIL", "RUNNING", "RUNNING", "RUNNING"], "the retry is not the dead worker's"
    assert {mine.number, far.number} == {1, 2}


def test_a_trial_of_a_grid_keeps_its_point_when_it_is_retried():
    study = made(in_memory(), sampler="grid")
    plan(study, 51)
    trial = study.ask()  # its worker dies before it knows the parameters
    trial.set_user_attr("process", dead_process())
    StaleTrials().fail(study)
    retry(study)
    exhaust(study)
    complete = [trial.params for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    assert len({tuple(params.items()) for params in complete}) == len(complete) == 51


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_is_given_up(storage):
    study, dead = made(storage), dead_process()
    plan(study, 1)
    for _ in range(10):
        if "WAITING" not in states(study):
            break
        begun(study, dead)
        StaleTrials().fail(study)
        retry(study)
    assert states(study) == ["FAIL"] * (1 + trials.RETRIES)
    plan(study, 1)
    assert "WAITING" not in states(study)
    assert trials.table(study).reason.tolist() == ["its worker died"] * (1 + trials.RETRIES)


@pytest.mark.slow
def test_errors_are_final_and_interruptions_are_not(storage):
    study = made(storage)
    plan(study, 2)

    def fails(trial):
        trial.set_user_attr("error", "out of memory")
        raise RuntimeError

    def interrupted(trial):
        trial.set_user_attr("interrupted", True)
        raise KeyboardInterrupt

    study.optimize(fails, n_trials=1, catch=(Exception,))
    for count in range(1, 7):
        with pytest.raises(KeyboardInterrupt):
            study.optimize(interrupted)
        retry(study)
        assert states(study) == ["FAIL"] * (1 + count) + ["WAITING"]
    exhaust(study)
    assert states(study)[-1] == "COMPLETE"
    reasons = trials.table(study).reason.tolist()
    assert reasons[0] == "out of memory" and set(reasons[1:-1]) == {"interrupted"} and reasons[-1] == ""


@pytest.mark.slow
def test_missing_heartbeats_are_a_dead_worker_on_another_host(storage, monkeypatch):
    """Of three trials one is alive, one stops to send signs of life, one never gave the name of its process.

    The watching process's clock moves on only when the living trial has sent another one, however slow the machine is.
    """
    monkeypatch.setattr(trials, "GRACE", 0.1)
    monkeypatch.setattr(trials, "HEARTBEAT", 0.01)
    monkeypatch.setattr(trials, "this_process", lambda: "another-host:1:1")
    clock = itertools.count(step=0.009)  # less than HEARTBEAT between two looks, as when the storage answers
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    study, stale = made(storage), StaleTrials()
    plan(study, 3)
    living, dead, _ = study.ask(), study.ask(), study.ask()

    def beat():
        return study.get_trials()[living.number].user_attrs["heartbeat"]

    def watch(count):
        """Look so many times, each time after another sign of life of the living trial."""
        for _ in range(count):
            last, end = beat(), time.monotonic() + 60
            while beat() == last:
                assert time.monotonic() < end, "no heartbeat"
                time.sleep(0.002)
            stale.fail(study)

    with trials.heartbeats(living):
        with trials.heartbeats(dead):
            watch(1)
            assert states(study) == ["RUNNING"] * 3
        watch(11)  # 0.099 s: not yet
        assert states(study) == ["RUNNING"] * 3
        watch(3)
        assert states(study) == ["RUNNING", "FAIL", "FAIL"]
    for _ in range(14):
        stale.fail(study)
    assert states(study) == ["FAIL"] * 3


def test_a_storage_that_was_away_makes_no_trial_stale(storage, monkeypatch):
    """While it did not answer, no worker could send a sign of life."""
    study, stale = made(storage), StaleTrials()
    plan(study, 1)
    begun(study, "another-host:1:1")
    stale.fail(study)
    clock = time.monotonic
    monkeypatch.setattr("time.monotonic", lambda: clock() + 2 * trials.GRACE)
    stale.fail(study)
    assert states(study) == ["RUNNING"]


@pytest.mark.slow
def test_studies_are_listed(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    assert trials.studies(url).empty
    storage = open_storage(url)
    finished, waits = made(storage, name="a"), made(storage, name="b", objectives=("value", "x"))
    plan(finished, 5)
    exhaust(finished)
    plan(waits, 2)
    waits.optimize(objective(waits), n_trials=1)
    table = trials.studies(url).set_index("study")
    assert table.state.to_dict() == {"a": "finished", "b": "unfinished"}
    assert table.complete.to_dict() == {"a": 5, "b": 1} and table.waiting["b"] == 1
    assert table.best["a"] == f"value {finished.best_value:.4g}"
    assert "value" in table.best["b"] and "x" in table.best["b"]


@pytest.mark.slow
@pytest.mark.parametrize(("attribute", "state"), [("interrupted", "unfinished"), ("error", "finished")])
def test_a_study_is_finished_when_no_trial_will_be_retried(tmp_path, attribute, state):
    url = f"sqlite:///{tmp_path}/s.db"
    study = made(open_storage(url), name="a")
    plan(study, 1)
    trial = study.ask()
    trial.set_user_attr(attribute, "x")
    study.tell(trial, state=TrialState.FAIL)
    assert trials.studies(url).state.tolist() == [state]
