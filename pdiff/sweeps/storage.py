"""Where studies are stored: SQLite, a database server, or a journal file."""

from __future__ import annotations

import copy
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Container
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from pdiff.errors import UserError

STORAGE = "sqlite:///optuna.db"
MAX_WAIT = 300.0  # seconds to wait for a database that does not answer
PERMANENT = (DataError, IntegrityError, NotSupportedError, ProgrammingError)  # errors that waiting does not resolve


class QueueEmpty(Exception):
    """No planned trial is waiting."""


def retrying(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called again, at growing intervals, for as long as its database does not answer."""

    @wraps(call)
    def retried(*arguments: Any, **options: Any) -> Any:
        end, pause = time.monotonic() + MAX_WAIT, 0.2
        while True:
            try:
                return call(*arguments, **options)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not is_disconnect(cause) or time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return retried


def is_disconnect(error: BaseException | None) -> bool:
    """Whether an error says that the connection to a database was refused or lost.

    `PendingRollbackError` is what a second statement raises after the one that lost the connection.
    """
    return isinstance(error, DBAPIError | PendingRollbackError) and not isinstance(error, PERMANENT)


def _delegated(name: str) -> Callable[..., Any]:
    """A method that calls the backend's method of this name, and waits for its database."""

    def method(self: Storage, *arguments: Any, **options: Any) -> Any:
        return retrying(getattr(self.backend, name))(*arguments, **options)

    method.__name__ = name
    return method


class Storage(BaseStorage):
    """A storage of Optuna's, with what the workers of a sweep need beside it.

    - A database that does not answer is waited for.
    - A trial is created only by `Study.add_trial`: `Study.ask` takes a waiting one, and never creates another.
    - A finished trial, which never changes again, is read only once.
    """

    def __init__(self, backend: BaseStorage) -> None:
        self.backend = backend
        self.finished: dict[int, dict[int, FrozenTrial]] = {}  # study id -> number of the trial -> trial

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial.

        Raises:
            QueueEmpty: there is no template, since `Study.ask` found no waiting trial.
        """
        if template_trial is None:
            raise QueueEmpty
        return retrying(self.backend.create_new_trial)(study_id, template_trial)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials, or those in some states, by number; only those not yet known to be finished are read."""
        finished, read = self.finished.setdefault(study_id, {}), retrying(self.backend.get_all_trials)
        unfinished = (TrialState.WAITING, TrialState.RUNNING) if finished else None
        trials = finished | {trial.number: trial for trial in read(study_id, deepcopy=False, states=unfinished)}
        for number in itertools.count():
            if number not in trials:  # it has finished since, or is the first one that does not exist
                try:
                    trial_id = self.get_trial_id_from_study_id_trial_number(study_id, number)
                except KeyError:
                    break
                trials[number] = self.get_trial(trial_id)
        finished.update({number: trial for number, trial in trials.items() if trial.state.is_finished()})
        found = [trials[number] for number in sorted(trials) if states is None or trials[number].state in states]
        return copy.deepcopy(found) if deepcopy else found

    def delete_study(self, study_id: int) -> None:
        """Delete a study; its id may be given to another one."""
        self.finished.pop(study_id, None)
        retrying(self.backend.delete_study)(study_id)

    create_new_study = _delegated("create_new_study")
    set_study_user_attr = _delegated("set_study_user_attr")
    set_study_system_attr = _delegated("set_study_system_attr")
    get_study_id_from_name = _delegated("get_study_id_from_name")
    get_study_name_from_id = _delegated("get_study_name_from_id")
    get_study_directions = _delegated("get_study_directions")
    get_study_user_attrs = _delegated("get_study_user_attrs")
    get_study_system_attrs = _delegated("get_study_system_attrs")
    get_all_studies = _delegated("get_all_studies")
    set_trial_param = _delegated("set_trial_param")
    set_trial_state_values = _delegated("set_trial_state_values")
    set_trial_intermediate_value = _delegated("set_trial_intermediate_value")
    set_trial_user_attr = _delegated("set_trial_user_attr")
    set_trial_system_attr = _delegated("set_trial_system_attr")
    get_trial = _delegated("get_trial")
    get_trial_id_from_study_id_trial_number = _delegated("get_trial_id_from_study_id_trial_number")
    remove_session = _delegated("remove_session")


def open_storage(url: str, *, wait: bool = False) -> Storage:
    """The storage at an address, created where it does not exist.

    Args:
        url: `journal:///path` or a path that ends in `.log`, or an address as SQLAlchemy reads it.
        wait: wait for a database that does not answer when it is opened; later calls always do.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if path := _journal(url):
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            return Storage(JournalStorage(JournalFileBackend(path)))
        return Storage((retrying(_database) if wait else _database)(url))
    except (ImportError, OSError, RuntimeError, SQLAlchemyError, sqlite3.Error) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise UserError(f"--storage {_readable(url)}: cannot be opened: {reason}") from None


def _database(url: str) -> RDBStorage:
    """A database. SQLite has no SELECT FOR UPDATE: there, every transaction takes the lock for writing at its
    beginning, so that no two workers find the same trial waiting."""
    parsed = make_url(url)
    if not parsed.drivername.startswith("sqlite"):
        return RDBStorage(url, {"pool_pre_ping": True})
    if parsed.database in (None, "", ":memory:"):
        raise UserError(f"--storage {url}: other processes cannot open a database in memory, expected sqlite:///FILE")
    with closing(sqlite3.connect(parsed.database, timeout=60)) as database:
        database.execute("PRAGMA journal_mode=WAL")
    storage = RDBStorage(url, {"pool_pre_ping": True, "connect_args": {"timeout": 60, "isolation_level": None}})
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _journal(url: str) -> str | None:
    """The path of a journal file, if an address is one."""
    if url.startswith("journal://"):
        return url.removeprefix("journal://")
    return url if url.endswith(".log") else None


def without_password(url: str) -> str:
    """The address of a storage as it may be shown."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url and not _journal(url) else url


def _readable(url: str) -> str:
    try:
        return without_password(url)
    except ArgumentError:
        return url


def default_storage() -> str:
    """The address in PDIFF_STORAGE, which no list of processes shows, else a file in the current folder."""
    return os.environ.get("PDIFF_STORAGE") or STORAGE
