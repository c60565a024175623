"""Studies in a file of this host: an SQLite database, which is made whole or not at all, or a journal of lines."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileSymlinkLock
from sqlalchemy import inspect
from sqlalchemy.engine import URL

from pdiff.files import SQLITE_SECONDS, use_write_ahead_log

RECORD = b'{"op_code":'  # with which every line of a journal begins
REMEDY = "restore the file from a copy, or begin a new one under another name"


class Unusable(Exception):
    """A file that is damaged, or another program's."""


def is_complete(path: Path) -> bool:
    """Whether a file is a database of Optuna's that can be opened; False where there is none, and where one was begun,
    but not finished, and holds no study.

    Raises:
        Unusable: it is another program's.
        sqlite3.Error: it is no SQLite database, or damaged.
    """
    if not path.exists():
        return False
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=SQLITE_SECONDS)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        tables = {name for (name,) in names}

        def has_rows(table: str) -> bool:
            return table in tables and database.execute(f"SELECT 1 FROM {table}").fetchone() is not None

        studies, finished = has_rows("studies"), has_rows("alembic_version")  # in which Optuna writes last
    if finished and {"studies", "trials", "version_info"} <= tables:
        return True
    foreign = tables - set(inspect(RDBStorage("sqlite://").engine).get_table_names())
    if foreign or tables == {"alembic_version"}:
        raise Unusable(f"it is another program's, with a table {min(foreign or tables)}; expected a new file")
    return studies


def make(path: Path) -> None:
    """Make a database of Optuna's, without studies."""
    RDBStorage(as_template(URL.create("sqlite", database=str(path)))).engine.dispose()
    use_write_ahead_log(path)


def as_template(url: URL) -> str:
    """An address as `RDBStorage` takes it, which reads text in braces as the name of a variable."""
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")


def is_journal(path: Path) -> bool:
    """True; a last line that a killed worker did not finish may be in a journal, too.

    Raises:
        Unusable: it is none, or damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line.startswith(RECORD) or RECORD.startswith(line)):
                break
            try:
                is_record = {"op_code", "worker_id"} <= json.loads(line).keys()
            except (ValueError, AttributeError):
                is_record = False
            if not is_record:
                raise Unusable(f"line {number} is no record of a journal; {REMEDY}")
    return True


class WholeLines(JournalFileSymlinkLock):
    """The lock with which a process writes to a journal. It cuts off a last line that a killed one did not finish, so
    that the next line does not continue it."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def acquire(self) -> bool:
        """Wait until no other process writes."""
        acquired = super().acquire()
        with self.path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return acquired
