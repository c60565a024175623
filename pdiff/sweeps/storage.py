"""TODO sweeps.storage."""

from __future__ import annotations

import inspect
import os
import sqlite3
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
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
HEARTBEAT = 10  # seconds between signs of life of a running trial
GRACE = 90  # seconds without one until it is taken for dead: longer than a database may be away
PATIENCE = 300.0  # seconds to wait for a database that is away


def waiting_for_database(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a storage that tries again, less and less often, while its database does not answer."""

    @wraps(call)
    def patient(*arguments: Any, **options: Any) -> Any:
        end, pause = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                return call(*arguments, **options)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not _away(cause) or time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    return patient


def _away(error: BaseException | None) -> bool:
    """Whether an error says that the connection to a database was refused or lost; a second statement after the one
    that lost it, as Optuna tries it, is told to roll back first."""
    lasting = (DataError, IntegrityError, NotSupportedError, ProgrammingError)  # waiting does not mend these
    return isinstance(error, DBAPIError | PendingRollbackError) and not isinstance(error, lasting)


def without_password(url: str) -> str:
    """An address of a storage for people to read."""
    return make_url(url).render_as_string(hide_password=True) if "://" in url and not _journal(url) else url


def _journal(url: str) -> str | None:
    """The path of a journal file, if a storage is one."""
    if url.startswith("journal://"):
        return url.removeprefix("journal://")
    return url if url.endswith(".log") else None


def open_storage(url: str, *, patient: bool = False) -> BaseStorage:
    """The storage at an address, created where it does not exist.

    Args:
        url: `journal:///path` or a path that ends in `.log`, or an address of SQLAlchemy's. Databases record signs of
            life; a journal has none.
        patient: wait for a database that does not answer.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if path := _journal(url):
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(path))
        parsed = make_url(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.drivername.startswith("sqlite"):
            if parsed.database in (None, "", ":memory:"):
                raise UserError(f"--storage {url}: a database in memory is nobody else's, expected sqlite:///FILE")
            with sqlite3.connect(parsed.database, timeout=60) as database:
                database.execute("PRAGMA journal_mode=WAL")
            options["connect_args"] = {"timeout": 60, "isolation_level": None}
        make = waiting_for_database(RDBStorage) if patient else RDBStorage
        storage = make(url, options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except (ImportError, OSError, RuntimeError, SQLAlchemyError, sqlite3.Error) as error:
        reason = " ".join(str(getattr(error, "orig", None) or error).split())
        raise UserError(f"--storage {_readable(url)}: cannot be opened: {reason}") from None
    if parsed.drivername.startswith("sqlite"):  # knows no SELECT FOR UPDATE: two workers would take the same trial
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    for name, method in inspect.getmembers(storage, inspect.ismethod):
        if not name.startswith("__"):
            setattr(storage, name, waiting_for_database(method))
    return storage


def _readable(url: str) -> str:
    try:
        return without_password(url)
    except ArgumentError:
        return url


def default_storage() -> str:
    """The address in PDIFF_STORAGE, which no list of processes shows, else a file in the current folder."""
    return os.environ.get("PDIFF_STORAGE") or STORAGE
