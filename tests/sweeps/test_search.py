"""Studies: every sampler and pruner, trials that are planned, and what is left of dead workers."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError, PendingRollbackError, ProgrammingError

from pdiff.errors import UserError
from pdiff.parallel.liveness import alive, this_process
from pdiff.sweeps import search
from pdiff.sweeps import storage as storages
from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.search import PRUNERS, SAMPLERS, UNFINISHED, Exhausted, Study, fail_dead, requeue
from pdiff.sweeps.storage import open_storage

PARAMETERS = {
    "x": {"kind": "float", "low": -1, "high": 1, "step": 0.125},
    "n": {"kind": "int", "low": 1, "high": 3},
}


def made(storage, *, sampler="random", pruner=None, objectives=("value",), name="s", **options) -> Study:
    sweep = Sweep.model_validate(
        {
            "objectives": dict.fromkeys(objectives, "minimize"),
            "parameters": PARAMETERS,
            "sampler": {"kind": sampler, "options": options},
            "pruner": pruner or {},
        }
    )
    directions = ["minimize"] * len(objectives)
    study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
    study.set_metric_names(list(objectives))
    grid = sweep.grid({}) if sampler == "grid" else {}
    return Study(name, storage, sweep, grid)


def objective(study):
    """(x - 0.5)^2 + n, and x beside it where there are two objectives."""

    def value(trial):
        chosen = {key: float(text) for key, text in study.sweep.suggest(trial, {}).items()}
        values = ((chosen["x"] - 0.5) ** 2 + chosen["n"], chosen["x"])
        return values[: len(study.directions)]

    return value


def exhaust(study):
    with contextlib.suppress(Exhausted):
        study.optimize(objective(study))
    assert "WAITING" not in states(study)


def states(study):
    return [trial.state.name for trial in study.get_trials()]


@pytest.fixture(params=["sqlite", "journal"])
def storage(request, tmp_path):
    url = f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else f"journal://{tmp_path}/some/s.journal"
    return open_storage(url)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("objectives", [("value",), ("value", "x")])
def test_every_sampler(kind, objectives):
    if kind == "cmaes" and len(objectives) > 1:
        with pytest.raises(ValueError, match="one objective only"):
            made(optuna.storages.InMemoryStorage(), sampler=kind, objectives=objectives)
        return
    study = made(optuna.storages.InMemoryStorage(), sampler=kind, objectives=objectives)
    size = 17 * 3 if kind == "grid" else 15
    study.plan(size)
    exhaust(study)
    trials = study.get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * size
    drawn = [(trial.params["x"], trial.params["n"]) for trial in trials]
    assert all(-1 <= x <= 1 and n in (1, 2, 3) for x, n in drawn)
    assert len(set(drawn)) == size if kind == "grid" else len(set(drawn)) > 5
    found = search.best(study, 3)
    assert len(found) <= 3 if len(objectives) > 1 else found == [study.best_trial]
    if kind == "grid":
        assert found[0].values[0] == 1


@pytest.mark.parametrize("kind", ["random", "tpe", "grid", "qmc"])
def test_no_two_workers_draw_the_same(kind, tmp_path):
    """Two objects of one study take turns; with the same seed in each, they would draw everything twice."""
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    pair = [made(storage, sampler=kind), made(storage, sampler=kind)]
    pair[0].plan(12)
    for k in range(12):
        pair[k % 2].optimize(objective(pair[k % 2]), n_trials=1)
    drawn = [tuple(trial.params.items()) for trial in pair[0].get_trials()]
    assert len(set(drawn)) > 8
    again = made(optuna.storages.InMemoryStorage(), sampler=kind)
    again.plan(12)
    exhaust(again)
    assert [tuple(trial.params.items()) for trial in again.get_trials()] == drawn


@pytest.mark.parametrize("kind", PRUNERS)
def test_every_pruner(kind):
    options = {"percentile": {"percentile": 50.0}, "patient": {"patience": 1}, "threshold": {"upper": 10}}.get(kind, {})
    pruner = {"kind": kind, "metric": "diffusion/heldout_loss", "options": options}
    study = made(optuna.storages.InMemoryStorage(), pruner=pruner)
    study.plan(20)

    def worse_and_worse(trial):
        for step in range(1, 30):
            trial.report(trial.number * step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return trial.number

    with pytest.raises(Exhausted):
        study.optimize(worse_and_worse)
    assert ("PRUNED" in states(study)) == (kind != "none")
    assert states(study)[0] == "COMPLETE" or kind in ("patient",)


def test_options_are_those_of_optuna():
    study = made(optuna.storages.InMemoryStorage(), sampler="tpe", n_startup_trials=3, multivariate=True)
    assert study.sampler._n_startup_trials == 3
    for options, hint in (({"n_startup_trial": 3}, "did you mean n_startup_trials"), ({"seed": 1}, "unknown option")):
        with pytest.raises(UserError, match=hint):
            made(optuna.storages.InMemoryStorage(), sampler="tpe", **options)
    with pytest.raises(UserError, match=r"pruner.options.*percentile"):
        made(optuna.storages.InMemoryStorage(), pruner={"kind": "percentile", "metric": "m"})
    with pytest.raises(UserError, match="population_size"):
        made(optuna.storages.InMemoryStorage(), sampler="nsga2", population_size=1)


def test_a_plan_is_kept_by_any_number_of_workers(storage):
    study = made(storage)
    study.plan(20)
    study.plan(20)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(exhaust, [made(storage) for _ in range(4)]))
    assert states(study) == ["COMPLETE"] * 20
    assert [trial.number for trial in study.get_trials()] == list(range(20))
    study.plan(22)
    exhaust(study)
    assert states(study) == ["COMPLETE"] * 22


def dead_process():
    """The name of a process that is no more."""
    code = "from pdiff.parallel.liveness import this_process; print(this_process())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def begun(study, process):
    """Begin a trial, as a worker that was killed in it did."""
    trial = study.ask()
    study.sweep.suggest(trial, {})
    trial.set_user_attr("process", process)
    return trial


def test_trials_of_dead_workers_are_begun_again_with_the_same_parameters(storage):
    assert alive(this_process()) and not alive(dead_process()) and alive("another-host:1:1")
    study = made(storage)
    study.plan(3)
    lost, mine, far = begun(study, dead_process()), begun(study, this_process()), begun(study, "another-host:1:1")
    fail_dead(study)
    assert states(study) == ["FAIL", "RUNNING", "RUNNING"]
    for _ in range(2):
        requeue(study)
        assert states(study) == ["FAIL", "RUNNING", "RUNNING", "WAITING"]
    study.plan(3)
    assert len(states(study)) == 4, "the one that is begun again counts once"
    again = study.ask()
    asked = study.sweep.suggest(again, {})
    assert again.number == 3 and again.params == lost.params
    assert asked == {key: str(value) for key, value in lost.params.items()}
    fail_dead(study)
    assert states(study) == ["FAIL", "RUNNING", "RUNNING", "RUNNING"], "it is no longer the dead worker's"
    assert {mine.number, far.number} == {1, 2}


def test_a_trial_that_kills_its_workers_is_given_up(storage):
    study, dead = made(storage), dead_process()
    study.plan(1)
    for _ in range(10):
        if "WAITING" not in states(study):
            break
        begun(study, dead)
        fail_dead(study)
        requeue(study)
    assert states(study) == ["FAIL"] * (1 + search.RETRIES)
    study.plan(1)
    assert "WAITING" not in states(study)
    assert search.table(study).reason.tolist() == ["its worker died"] * (1 + search.RETRIES)


def test_failures_of_their_own_are_final_and_interruptions_are_not(storage):
    study = made(storage)
    study.plan(2)

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
        requeue(study)
        assert states(study) == ["FAIL"] * (1 + count) + ["WAITING"]
    exhaust(study)
    assert states(study)[-1] == "COMPLETE"
    reasons = search.table(study).reason.tolist()
    assert reasons[0] == "out of memory" and set(reasons[1:-1]) == {"interrupted"} and reasons[-1] == ""


def test_a_missing_heartbeat_is_a_dead_worker_on_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "HEARTBEAT", 1)
    monkeypatch.setattr(storages, "GRACE", 2)
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    study = made(storage)
    study.plan(2)
    for heard in ("2000-01-01 00:00:00", "2999-01-01 00:00:00"):
        trial = begun(study, "another-host:1:1")
        storage.record_heartbeat(trial._trial_id)
        with sqlite3.connect(tmp_path / "s.db") as database:
            change = "UPDATE trial_heartbeats SET heartbeat = ? WHERE trial_id = ?"
            database.execute(change, (heard, trial._trial_id))
        database.close()
    fail_dead(study)
    assert states(study) == ["FAIL", "RUNNING"]


def test_a_worker_that_died_before_it_gave_its_name(storage, monkeypatch):
    study = made(storage)
    study.add_trial(create_trial(state=TrialState.WAITING))
    (trial,) = study.get_trials()
    study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    fail_dead(study)
    assert states(study) == ["RUNNING"]

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=storage.GRACE + 1)

    monkeypatch.setattr(search, "datetime", Later)
    fail_dead(study)
    assert states(study) == ["FAIL"]


def test_a_database_that_is_away_is_waited_for_and_a_wrong_statement_is_not(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    refused, closed = (OperationalError("select", {}, OSError(reason)) for reason in ("refused", "closed"))
    errors = [refused, *(optuna.exceptions.StorageInternalError() for _ in range(2))]
    errors[1].__cause__, errors[2].__cause__ = closed, PendingRollbackError("after a connection was lost")

    def call(value, *, then):
        if errors:
            raise errors.pop(0)
        return value, then

    assert storages.waiting_for_database(call)(1, then=2) == (1, 2)
    assert len(slept) == 3 and slept == sorted(set(slept))

    def wrong():
        raise ProgrammingError("selct", {}, SyntaxError("selct"))

    with pytest.raises(ProgrammingError):
        storages.waiting_for_database(wrong)()
    monkeypatch.setattr(storages, "PATIENCE", 0)
    errors.append(OperationalError("select", {}, OSError("refused")))
    with pytest.raises(OperationalError):
        storages.waiting_for_database(call)(1, then=2)
    assert len(slept) == 3


@pytest.mark.parametrize(
    ("url", "hints"),
    [
        ("sqlite:////absent/folder/s.db", ["absent"]),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/x", ["127.0.0.1", "***"]),
        ("nonsense://x", ["nonsense"]),
        ("nonsense", ["nonsense"]),
        ("sqlite://", ["memory", "sqlite:///FILE"]),
        ("sqlite:///:memory:", ["memory", "sqlite:///FILE"]),
    ],
)
def test_storages_that_cannot_be_opened_are_one_line_without_password(url, hints):
    with pytest.raises(UserError) as caught:
        open_storage(url)
    told = str(caught.value)
    assert "--storage" in told and all(hint in told for hint in hints)
    assert "secret" not in told and "\n" not in told


def test_sqlite_lets_readers_read_while_somebody_writes(tmp_path):
    open_storage(f"sqlite:///{tmp_path}/s.db")
    with sqlite3.connect(tmp_path / "s.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_studies_are_listed(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    assert search.listed(url).empty
    storage = open_storage(url)
    finished, waits = made(storage, name="a"), made(storage, name="b", objectives=("value", "x"))
    finished.plan(5)
    exhaust(finished)
    waits.plan(2)
    waits.optimize(objective(waits), n_trials=1)
    table = search.listed(url).set_index("study")
    assert table.state.to_dict() == {"a": "finished", "b": "unfinished"}
    assert table.complete.to_dict() == {"a": 5, "b": 1} and table.waiting["b"] == 1
    assert table.best["a"] == f"value {finished.best_value:.4g}"
    assert "value" in table.best["b"] and "x" in table.best["b"]


@pytest.mark.parametrize(("said", "state"), [("interrupted", "unfinished"), ("error", "finished")])
def test_a_study_is_finished_when_no_trial_will_be_begun_again(tmp_path, said, state):
    url = f"sqlite:///{tmp_path}/s.db"
    study = made(open_storage(url), name="a")
    study.plan(1)
    trial = study.ask()
    trial.set_user_attr(said, "x")
    study.tell(trial, state=TrialState.FAIL)
    assert search.listed(url).state.tolist() == [state]


def test_the_default_storage_may_be_hidden_in_the_environment(monkeypatch):
    monkeypatch.delenv("PDIFF_STORAGE", raising=False)
    assert storages.default_storage() == "sqlite:///optuna.db"
    monkeypatch.setenv("PDIFF_STORAGE", "journal:///j")
    assert storages.default_storage() == "journal:///j"
    assert storages.without_password("mysql://u:p@h/d") == "mysql://u:***@h/d"
    assert storages.without_password("some/j.log") == "some/j.log"


def test_unfinished_states():
    assert set(UNFINISHED) == {state for state in TrialState if not state.is_finished()}
    assert os.getpid() == int(this_process().split(":")[1])
