"""Storages: addresses, databases that are away, and trials that are planned."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError, PendingRollbackError, ProgrammingError
from studies import exhaust, made, objective, states

from pdiff.errors import UserError
from pdiff.sweeps import storage as storages
from pdiff.sweeps import trials
from pdiff.sweeps.storage import QueueEmpty, open_storage


@pytest.fixture(params=["sqlite", "journal"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/s.db" if request.param == "sqlite" else f"journal://{tmp_path}/some/s.journal"


@pytest.mark.slow
def test_a_plan_is_kept_by_any_number_of_workers(url):
    storage = open_storage(url)
    study = made(storage)
    trials.plan(study, 20)
    trials.plan(study, 20)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(exhaust, [made(open_storage(url)) for _ in range(3)] + [made(storage)]))
    assert states(study) == ["COMPLETE"] * 20
    assert [trial.number for trial in study.get_trials()] == list(range(20))
    trials.plan(study, 22)
    exhaust(study)
    assert states(study) == ["COMPLETE"] * 22


@pytest.mark.slow
def test_no_trial_is_made_that_was_not_planned(url):
    study = made(open_storage(url))
    with pytest.raises(QueueEmpty):
        study.ask()
    trials.plan(study, 1)
    assert study.ask().number == 0
    with pytest.raises(QueueEmpty):
        study.ask()
    assert states(study) == ["RUNNING"]


@pytest.mark.slow
def test_trials_are_read_as_the_backend_has_them(url):
    """Trials that finish are kept; each view must equal what the storage of Optuna reads without them."""
    study, watched = made(open_storage(url)), made(open_storage(url))
    plain = optuna.load_study(study_name="s", storage=open_storage(url).backend)
    for state in ([], [TrialState.WAITING], [TrialState.COMPLETE, TrialState.RUNNING], None):
        trials.plan(study, len(states(study)) + 3)
        study.optimize(objective(study), n_trials=1)
        study.ask()
        study.add_trial(create_trial(state=TrialState.FAIL))
        assert watched.get_trials(states=state) == plain.get_trials(states=state)
        assert watched.get_trials(deepcopy=False) == plain.get_trials(deepcopy=False)
        assert watched.best_trial == plain.best_trial
    assert states(watched).count("COMPLETE") == 4 and states(watched).count("FAIL") == 4


@pytest.mark.slow
def test_a_deleted_study_leaves_no_trials_to_the_next_of_its_number(url):
    storage = open_storage(url)
    for count in (3, 2):
        study = made(storage)
        trials.plan(study, count)
        exhaust(study)
        assert states(study) == ["COMPLETE"] * count
        optuna.delete_study(study_name="s", storage=storage)


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

    assert storages.retrying(call)(1, then=2) == (1, 2)
    assert len(slept) == 3 and slept == sorted(set(slept))

    def wrong():
        raise ProgrammingError("selct", {}, SyntaxError("selct"))

    with pytest.raises(ProgrammingError):
        storages.retrying(wrong)()
    monkeypatch.setattr(storages, "MAX_WAIT", 0)
    errors.append(OperationalError("select", {}, OSError("refused")))
    with pytest.raises(OperationalError):
        storages.retrying(call)(1, then=2)
    assert len(slept) == 3


def test_every_call_of_a_storage_waits_for_its_database(monkeypatch):
    """Whatever Optuna calls, the first answer is an error, and the second one counts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    class Unreliable:
        """A backend whose methods raise an error first, and answer then."""

        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            failures = [OperationalError("select", {}, OSError("refused"))]

            def call(*arguments, **options):
                if failures:
                    raise failures.pop()
                return getattr(self.backend, name)(*arguments, **options)

            return call

    study = made(
        storages.Storage(Unreliable(optuna.storages.InMemoryStorage())),
        pruner={"kind": "median", "metric": "diffusion/loss"},
    )
    trials.plan(study, 2)

    def reports(trial):
        trial.report(1.0, 1)
        trial.set_user_attr("run", "x")
        assert not trial.should_prune()
        return objective(study)(trial)[0]

    study.optimize(reports, n_trials=1)
    exhaust(study)
    assert states(study) == ["COMPLETE"] * 2 and study.best_trial.number in (0, 1)
    assert len(trials.table(study)) == 2


@pytest.mark.parametrize(
    ("url", "hints"),
    [
        ("sqlite:////absent/folder/s.db", ["absent"]),
        ("postgresql+psycopg://user:secret@127.0.0.1:{port}/x", ["127.0.0.1", "***"]),
        ("nonsense://x", ["nonsense"]),
        ("nonsense", ["nonsense"]),
        ("sqlite://", ["memory", "sqlite:///FILE"]),
        ("sqlite:///:memory:", ["memory", "sqlite:///FILE"]),
    ],
)
def test_storages_that_cannot_be_opened_are_one_line_without_password(url, hints, closed_port):
    with pytest.raises(UserError) as caught:
        open_storage(url.format(port=closed_port))
    message = str(caught.value)
    assert "--storage" in message and all(hint in message for hint in hints)
    assert "secret" not in message and "\n" not in message


@pytest.mark.slow
def test_sqlite_lets_readers_read_while_another_process_writes(tmp_path):
    open_storage(f"sqlite:///{tmp_path}/s.db")
    with sqlite3.connect(tmp_path / "s.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_the_default_storage_may_be_hidden_in_the_environment(monkeypatch):
    monkeypatch.delenv("PDIFF_STORAGE", raising=False)
    assert storages.default_storage() == "sqlite:///optuna.db"
    monkeypatch.setenv("PDIFF_STORAGE", "journal:///j")
    assert storages.default_storage() == "journal:///j"
    assert storages.without_password("mysql://u:p@h/d") == "mysql://u:***@h/d"
    assert storages.without_password("some/j.log") == "some/j.log"
