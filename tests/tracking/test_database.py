"""A local database that appears whole or not at all, and servers that do not answer."""

import http.server
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import mlflow
import pytest
from tracked import runs, start, statuses

from pdiff.cli.main import main as pdiff
from pdiff.errors import Failure, UserError
from pdiff.tracking import database, store


def sql(path, statement):
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def files(folder):
    """The database and what belongs to it, but for the two files beside one that is open."""
    return {path.name for path in folder.iterdir() if "mlflow.db" in path.name} - {"mlflow.db-wal", "mlflow.db-shm"}


def older(path):
    """Migrated from a version whose name MLflow does not know as its latest."""
    sql(path, "UPDATE alembic_version SET version_num = '451aebb31d03'")


def without_table(path):
    sql(path, "DROP TABLE experiment_tags")


@pytest.mark.slow
@pytest.mark.parametrize("damage", [older, without_table])
def test_a_half_made_database_is_put_aside(workspace, capsys, damage):
    damage(workspace / "mlflow.db")
    with pytest.raises(Exception, match=r"(?i)database|table"):
        mlflow.MlflowClient(f"sqlite:///{workspace}/./mlflow.db").search_experiments()
    shown = (workspace / "mlflow.db").read_bytes()
    with store.connected():
        assert runs() == []
    assert "warning: " in (printed := capsys.readouterr().out) and "mlflow.db.damaged-1" in printed
    assert files(workspace) == {"mlflow.db", "mlflow.db.damaged-1"}
    assert len((workspace / "mlflow.db.damaged-1").read_bytes()) == len(shown)
    with store.connected():
        pass
    assert files(workspace) == {"mlflow.db", "mlflow.db.damaged-1"} and not capsys.readouterr().out


def test_nothing_that_has_runs_is_put_aside(workspace):
    with store.connected(), mlflow.start_run():
        pass
    older(workspace / "mlflow.db")
    mlflow.set_tracking_uri(
        f"sqlite:///{workspace}/../{workspace.name}/mlflow.db"
    )  # one that MLflow has not opened yet
    with pytest.raises(Failure, match="schema"), store.connected():
        pass
    assert files(workspace) == {"mlflow.db"} and len(sql(workspace / "mlflow.db", "SELECT * FROM runs")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0"])
def test_an_empty_file_becomes_a_database(empty_workspace, content):
    (empty_workspace / "mlflow.db").write_bytes(b"")
    with store.connected():
        assert runs() == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 0.2), (signal.SIGTERM, 0.5), (signal.SIGTERM, 1.2)])
def test_a_kill_while_the_database_is_created(empty_workspace, number, seconds):
    process = start("prepare", "--tag", "tiny.yaml")
    while not files(empty_workspace):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    printed = process.communicate()[0]
    assert process.returncode in (-number, 130, 0) and "Traceback" not in printed
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 0
    assert files(empty_workspace) == {"mlflow.db"}
    assert "RUNNING" not in {status for _, status in statuses()}


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.8])
def test_a_kill_of_mlflow_itself(empty_workspace, seconds):
    code = f"import mlflow; mlflow.MlflowClient('sqlite:///{empty_workspace}/mlflow.db').search_experiments()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not files(empty_workspace):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert pdiff(["prepare", "--tag", "tiny.yaml"]) == 0
    assert statuses()[-1][1] == "FINISHED"


@pytest.mark.parametrize(
    "address", ["postgresql+psycopg://me:secret@127.0.0.1:{}/x", "postgresql://me:secret@127.0.0.1:{}/x"]
)
def test_a_database_server_that_is_away(workspace, closed_port, capfd, address):
    mlflow.set_tracking_uri(address.format(closed_port))
    begin = time.monotonic()
    assert pdiff(["compare"]) in (1, 2)  # 2 where the driver is not installed
    assert time.monotonic() - begin < 10
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pdiff: MLFLOW_TRACKING_URI {address.split(':')[0]}://me:***@127.0.0.1:{closed_port}/x: ")
    assert "secret" not in line


def test_a_driver_that_is_not_installed(workspace, monkeypatch):
    mlflow.set_tracking_uri("mysql+pymysql_that_is_absent://me:secret@127.0.0.1/x")
    with pytest.raises((UserError, Failure), match=r"me:\*\*\*@"):
        database.reach()


class Page(http.server.BaseHTTPRequestHandler):
    """Answers every question with a page."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_an_address_where_something_else_answers(workspace, capfd):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
    assert pdiff(["compare"]) == 1
    server.shutdown()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pdiff: MLFLOW_TRACKING_URI http://127.0.0.1:{server.server_port}: ") and len(line) < 700
