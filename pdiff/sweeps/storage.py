"""Where studies are stored: SQLite, a database server, or a journal file."""

from __future__ import annotations

import copy
import itertools
import os
import re
import sqlite3
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    NotSupportedError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from pdiff.errors import Failure, UserError
from pdiff.files import SQLITE_SECONDS, make_database, use_write_ahead_log
from pdiff.sweeps import local

STORAGE = "sqlite:///optuna.db"
EXPECTED = "sqlite:///FILE, journal:///FILE or such as postgresql+psycopg://USER:PASSWORD@HOST/NAME"
MAX_WAIT = 300.0  # seconds to wait for a database that does not answer
CONNECT_TIMEOUT = 4  # seconds, for drivers that would wait for minutes
WITH_CONNECT_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")  # drivers with this option
SHOWN = 200  # characters of an address, or of an error, in a message
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
            except (SQLAlchemyError, StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not is_disconnect(cause) or time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return retried


def is_disconnect(error: BaseException | None) -> bool:
    """Whether an error says that the connection to a database was refused or lost.

    `PendingRollbackError` is what a second statement raises after the one that lost the connection. Of what SQLite
    raises, only the lock of another process goes by.
    """
    if isinstance(getattr(error, "orig", None), sqlite3.Error):
        return "locked" in str(error)
    return isinstance(error, DBAPIError | PendingRollbackError) and not isinstance(error, PERMANENT)


def _delegated(name: str) -> Callable[..., Any]:
    """A method that calls the backend's method of this name."""

    def method(self: Storage, *arguments: Any, **options: Any) -> Any:
        return self.call(name, *arguments, **options)

    method.__name__ = name
    return method


class Storage(BaseStorage):
    """A storage of Optuna's, with what the workers of a sweep need beside it.

    - A database that does not answer is waited for; what else fails in it is a Failure, which names its address.
    - A trial is created only by `Study.add_trial`: `Study.ask` takes a waiting one, and never creates another.
    - A finished trial, which never changes again, is read only once.
    """

    def __init__(self, backend: BaseStorage, url: str = "") -> None:
        self.backend, self.url = backend, url
        self.finished: dict[int, dict[int, FrozenTrial]] = {}  # study id -> number of the trial -> trial

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the backend's method of a name, and wait for its database."""
        with readable_errors(self.url, "used"):
            return retrying(getattr(self.backend, name))(*arguments, **options)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial.

        Raises:
            QueueEmpty: there is no template, since `Study.ask` found no waiting trial.
        """
        if template_trial is None:
            raise QueueEmpty
        return self.call("create_new_trial", study_id, template_trial)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials, or those in some states, by number; only those not yet known to be finished are read."""
        finished = self.finished.setdefault(study_id, {})
        unfinished = (TrialState.WAITING, TrialState.RUNNING) if finished else None
        read = self.call("get_all_trials", study_id, deepcopy=False, states=unfinished)
        trials = finished | {trial.number: trial for trial in read}
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
        self.call("delete_study", study_id)

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
    there, path = exists(url), file_of(url)
    with readable_errors(url):
        if path and _is_journal(url):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            return Storage(_journal(path), url)
        if path and not there:
            make_database(path, local.make, local.is_complete)
        return Storage((retrying(_database) if wait else _database)(url, path), url)


def exists(url: str) -> bool:
    """Whether a storage is there, which is created otherwise; a database server always is. Nothing is written.

    Raises:
        UserError: it can be neither opened nor created.
    """
    path = file_of(url)
    if path is None:
        return True
    with readable_errors(url):
        if path.is_file():
            return local.is_journal(path) if _is_journal(url) else local.is_complete(path)
        if path.exists():
            raise UserError(f"{named(url)}: {path} is no file")
        folders = path.absolute().parents
        folder = next(filter(Path.exists, folders)) if _is_journal(url) else folders[0]
        if not folder.is_dir():
            raise UserError(f"{named(url)}: there is no folder {folder}")
        if not os.access(folder, os.W_OK):
            raise Failure(f"{named(url)}: no permission to write to {folder}")
    return False


def _database(url: str, path: Path | None) -> RDBStorage:
    """A database. SQLite has no SELECT FOR UPDATE: there, every transaction takes the lock for writing at its
    beginning, so that no two workers find the same trial waiting."""
    parsed = _parsed(url)
    options: dict[str, Any] = {"timeout": SQLITE_SECONDS, "isolation_level": None} if path else {}
    if parsed.get_dialect().driver in WITH_CONNECT_TIMEOUT and "connect_timeout" not in parsed.query:
        options["connect_timeout"] = CONNECT_TIMEOUT
    if path:
        use_write_ahead_log(path)
    try:
        storage = RDBStorage(local.as_template(parsed), {"pool_pre_ping": True, "connect_args": options})
    except RuntimeError as error:  # another version of Optuna made it
        raise local.Unusable(error) from None
    if path:
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _journal(path: Path) -> JournalStorage:
    """A journal.

    Raises:
        Unusable: its lines are records, but not those of studies and their trials.
    """
    try:
        return JournalStorage(JournalFileBackend(str(path), local.WholeLines(path)))
    except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:  # as Optuna meets what is missing
        raise local.Unusable(f"its records do not fit together ({type(error).__name__}); {local.REMEDY}") from error


# -- addresses


def _is_journal(url: str) -> bool:
    return url.startswith("journal://") or (url.endswith(".log") and "://" not in url)


def file_of(url: str) -> Path | None:
    """The file of a journal or an SQLite database; None for a database server.

    Raises:
        UserError: no address of a storage.
    """
    if _is_journal(url):
        place = url.removeprefix("journal://")
    elif not (parsed := _parsed(url)).drivername.startswith("sqlite"):
        return None
    else:
        place = "" if parsed.query else parsed.database or ""
    if place in ("", ":memory:"):
        rule = "no file that others can open, as one in memory is not, or options behind it"
        raise UserError(f"{named(url)}: {rule}; expected {EXPECTED}")
    return Path(place)


def _parsed(url: str) -> URL:
    """An address as SQLAlchemy reads it, of a kind of database that it knows.

    Raises:
        UserError: it is none.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(f"{named(url)}: no address of a storage, expected {EXPECTED}") from None
    if "@" in (parsed.host or ""):
        raise UserError(f"{named(url)}: an @ in a name or a password is written as %40")
    try:
        parsed.get_dialect().import_dbapi()
    except NoSuchModuleError:
        raise UserError(f"{named(url)}: unknown database {parsed.drivername!r}, expected {EXPECTED}") from None
    except ImportError as error:
        reason = f"the driver is not installed ({error}); `pip install 'pdiff[team]'` has that of postgresql+psycopg://"
        raise UserError(f"{named(url)}: {reason}") from None
    return parsed


def named(url: str) -> str:
    """An address as messages show it: after the option or the variable that holds it, and without its password."""
    option = "PDIFF_STORAGE" if url == os.environ.get("PDIFF_STORAGE") else "--storage"
    return f"{option} {without_password(url)[:SHOWN]}"


def without_password(url: str) -> str:
    """The address of a storage as it may be shown; what is no address of one may hold a password, too."""
    hidden = re.sub(r":(?!//).*@", ":***@", url)
    return re.sub(r"(passw(?:or)?d=)[^&]*", r"\1***", " ".join(hidden.split()))


@contextmanager
def readable_errors(url: str, done: str = "opened") -> Iterator[None]:
    """Turn what fails while a storage is opened, or used, into one line, without its password.

    Raises:
        Failure: a database that does not answer or cannot be written to; a file that is damaged.
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error, OSError, local.Unusable) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        reason = " ".join(str(getattr(cause, "orig", None) or cause).split()).replace(url, "...")
        raise Failure(f"{named(url)}: cannot be {done}: {reason[:SHOWN]}") from None


def default_storage() -> str:
    """The address in PDIFF_STORAGE, which no list of processes shows, else a file in the current folder."""
    return os.environ.get("PDIFF_STORAGE") or STORAGE
