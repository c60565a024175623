"""Where runs are kept: a local database that appears whole or not at all, or a server, which must answer soon."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from pdiff.errors import Failure, UserError
from pdiff.files import SQLITE_SECONDS, make_database, use_write_ahead_log

TIMEOUT = 5  # seconds in which a server must answer
SERVERS = {"postgresql": {"connect_timeout": TIMEOUT}, "mysql": {"connect_timeout": TIMEOUT}, "mssql": {}}
"""Database -> what its drivers take for a timeout."""


def place() -> str:
    """Where runs are kept, as a message names it, without a password."""
    uri = shown = mlflow.get_tracking_uri()
    with suppress(ArgumentError):
        shown = make_url(uri).render_as_string(hide_password=True)
    return f"MLFLOW_TRACKING_URI {shown}" if "MLFLOW_TRACKING_URI" in os.environ else f"the tracking store {shown}"


def reach() -> None:
    """Check that there is a tracking store; a local one is created.

    MLflow itself would wait for a server for minutes, and would leave a database half-made where it is killed.

    Raises:
        UserError: the driver of a database is not installed.
        Failure: a server that does not answer; a file that is no database.
    """
    uri = mlflow.get_tracking_uri()
    kind = uri.partition(":")[0].partition("+")[0]
    try:
        if kind in ("http", "https"):  # with the certificates and passwords of MLflow's settings
            http_request(get_default_host_creds(uri), "/health", "GET", timeout=TIMEOUT, max_retries=0)
        elif kind in SERVERS:
            with closing(create_engine(uri, connect_args=SERVERS[kind]).connect()):
                pass
        elif kind == "sqlite" and (path := make_url(uri).database):
            create(Path(path).absolute())
    except mlflow.MlflowException as error:
        raise Failure(f"{place()}: no answer ({type(error.__context__ or error).__name__})") from None
    except ImportError as error:
        raise UserError(f"{place()}: {error}, expected an installed driver, as in postgresql+psycopg://...") from None
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise Failure(f"{place()}: {' '.join(str(getattr(error, 'orig', error)).split())}") from None


def create(path: Path) -> None:
    """Create MLflow's database in a file, and set it up for several processes that write at once.

    MLflow takes a second to create its tables, step by step, and cannot go on from the middle. So they are created in
    another file, which then gets its name; and what another program left half-made is put aside, if it has no runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    make_database(path, _make, _is_complete)
    use_write_ahead_log(path)


def _make(path: Path) -> None:
    """Make a database without runs; a copy of one, since MLflow keeps open what it has opened."""
    with TemporaryDirectory() as scratch:
        if not _opens(Path(scratch, "new.db")):
            raise Failure(f"{place()}: MLflow cannot create its tables")
        _copy(Path(scratch, "new.db"), path)


def _is_complete(path: Path) -> bool:
    """Whether there is a database that MLflow can work with; one that has runs is never replaced.

    Raises:
        sqlite3.DatabaseError: the file is no database.
    """
    if not path.exists():
        return False
    if _has_runs(path):
        return True
    with TemporaryDirectory() as scratch:
        _copy(path, Path(scratch, "found.db"))
        return _opens(Path(scratch, "found.db"))


def _has_runs(path: Path) -> bool:
    """Whether a database has runs."""
    with closing(sqlite3.connect(path, timeout=SQLITE_SECONDS)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return "runs" in tables and database.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None


def _copy(source: Path, target: Path) -> None:
    """Copy a database that may be in use."""
    reading = sqlite3.connect(source, timeout=SQLITE_SECONDS)
    with closing(reading), closing(sqlite3.connect(target)) as writing:
        reading.backup(writing)


def _opens(path: Path) -> bool:
    """Whether MLflow can work with a database; creates its tables where there are none."""
    try:
        return bool(mlflow.MlflowClient(f"sqlite:///{path}").search_experiments())
    except (mlflow.MlflowException, SQLAlchemyError):
        return False
