"""Hostile tries at sweeps and at the storages of their studies: each ends with one line, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import optuna
import pytest
from hostile import Try, answered
from studies import made

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.sweeps import local, storage, trials
from pdiff.sweeps.command import Command
from pdiff.sweeps.leader import _task
from pdiff.sweeps.storage import open_storage

SWEEP = "sweep --tag digits_mlp --sweep s.yaml"
STEPS = {"kind": "int", "low": 1, "high": 9}
SEEDS = {"kind": "int", "low": 1, "high": 1000}
WIDTH = {"kind": "categorical", "choices": [16, 32]}
ONE_OF_TWO = {"kind": "categorical", "choices": [1, 2]}
GOOD = {"objectives": {"val_accuracy/generated_mean": "maximize"}, "parameters": {"diffusion.steps": STEPS}}
MINIMIZE = {"direction": "minimize"}


def with_sweep(**more):
    """A sweep's file, with other values than those of a good one."""
    return lambda folder: (folder / "s.yaml").write_text(json.dumps(GOOD | more))


def refused(*says: str, **more) -> Try:
    """A sweep that is refused for what it says in `s.yaml`."""
    return Try(SWEEP, 2, ("s.yaml", *says), with_sweep(**more))


def parameter(*says: str, name="diffusion.steps", **more) -> Try:
    """A sweep with one more parameter, that cannot be searched."""
    parameters = {"diffusion.width": WIDTH, name: {**STEPS, **more}}
    return refused(*says, parameters=parameters)


CHAIN = {
    "a": {**ONE_OF_TWO, "keys": "seed"},
    "b": {**ONE_OF_TWO, "keys": "generate.seed", "when": {"a": 1}},
    "diffusion.steps": {**STEPS, "when": {"b": 2, "a": 2}},
}
CIRCLE = {
    "diffusion.steps": {**STEPS, "when": {"diffusion.width": 16}},
    "diffusion.batch_size": {**STEPS, "when": {"diffusion.steps": 3}},
    "diffusion.width": {**WIDTH, "when": {"diffusion.batch_size": 5}},
}
REFUSED = {
    "objective": refused("generatd_mean", "did you mean", objectives={"val_accuracy/generatd_mean": "maximize"}),
    "left out": refused("no stage of a trial logs", objectives={"val_accuracy/average_mean": "maximize"}),
    "no such part": refused("diffusion/nearest", objectives={"diffusion/nearest": "minimize"}),
    "in a sum": refused("objectives.a", "seconds/x", objectives={"a": {"sum": ["seconds/x"], **MINIMIZE}}),
    "twice in a sum": refused(
        "diffusion/loss stands twice", objectives={"a": {"sum": ["diffusion/loss"] * 2, **MINIMIZE}}
    ),
    "objective twice": refused(
        "objective twice", objectives={"diffusion/loss": "minimize", "a": {"sum": ["diffusion/loss"], **MINIMIZE}}
    ),
    "no batch": refused("first_batch > 0", objectives={"first_batch/val_accuracy/generated_mean": "maximize"}),
    "pruner": refused("pruner.metric", "heldout_loss", pruner={"kind": "median", "metric": "diffusion/held"}),
    "pruner at the end": refused(
        "pruner.metric",
        "prune_if",
        pruner={"kind": "median", "metric": "first_batch/val_accuracy/generated_mean"},
        first_batch=2,
    ),
    "threshold": refused("prune_if.0.metric", "no stage", prune_if=[{"metric": "loss", "below": 1}]),
    "no parameters": refused("parameters", "at least 1", parameters={}),
    "low = high": parameter("low < high", "low=9, high=9", low=9),
    "low > high": parameter("low < high", "low=10", low=10),
    "log from 0": parameter("log needs low > 0", "low=0", low=0, log=True),
    "step": parameter("step <= high - low", "step=10", step=10),
    "empty choices": refused("needs choices", parameters={"diffusion.steps": {"kind": "categorical", "choices": []}}),
    "doubled choices": refused(
        "choices: 3 stands twice", parameters={"diffusion.steps": {"kind": "categorical", "choices": [3, 4, 3]}}
    ),
    "doubled labels": refused(
        "choices: 3 stands twice",
        parameters={"diffusion.steps": {"kind": "categorical", "choices": {"a": 3, "b": 3}}},
    ),
    "log of choices": refused("nor log", parameters={"diffusion.width": {**WIDTH, "log": True}}),
    "when itself": parameter("when.diffusion.steps", "itself", when={"diffusion.steps": 3}),
    "when its key": parameter("when.seed", "itself", name="s", keys="seed", when={"seed": 3}),
    "when unknown": parameter("when.diffusion.widht", "diffusion.width", when={"diffusion.widht": 16}),
    "when below": refused(
        "when.diffusion.width",
        "below",
        parameters={"diffusion.steps": {**STEPS, "when": {"diffusion.width": 16}}, "diffusion.width": WIDTH},
    ),
    "when in a circle": refused("when.diffusion.width", "circle", parameters=CIRCLE),
    "when never": parameter("17 is none of the values of diffusion.width", when={"diffusion.width": 17}),
    "when no kind": parameter("when.autoencoder.kind", "'cnov'", when={"autoencoder.kind": "cnov"}),
    "when nothing": parameter("when.autoencoder.kind", "at least 1", when={"autoencoder.kind": []}),
    "when two exclude each other": refused("diffusion.steps.when: never met", parameters=CHAIN),
    "cmaes of categories": refused(
        "cmaes", "categorical", parameters={"diffusion.width": WIDTH}, sampler={"kind": "cmaes"}
    ),
    "option": refused("sampler.options.seed", "unknown option", sampler={"kind": "gp", "options": {"seed": 1}}),
    "option's type": refused("n_startup_trials", "'x'", sampler={"options": {"n_startup_trials": "x"}}),
    "option's value": refused("n_ei_candidates", "-3", sampler={"options": {"n_ei_candidates": -3}}),
    "population": refused("population_size", sampler={"kind": "nsga2", "options": {"population_size": 1}}),
    "pruner's option": refused(
        "pruner.options",
        "percentile=150",
        pruner={"kind": "percentile", "metric": "diffusion/loss", "options": {"percentile": 150}},
    ),
    "pruner's type": refused(
        "pruner.options",
        "'str'",
        pruner={"kind": "patient", "metric": "diffusion/loss", "options": {"patience": "soon"}},
    ),
    "endless grid": refused(
        "at most 100000",
        parameters={"diffusion.steps": {**STEPS, "high": 10**12}},
        sampler={"kind": "grid"},
    ),
    "wide grid": refused(
        "a grid of",
        parameters={"seed": SEEDS, "generate.seed": SEEDS},
        sampler={"kind": "grid"},
    ),
    "launcher": Try(f"{SWEEP} --launcher inline --workers 2", 2, ("--workers 2", "inline"), with_sweep()),
    "launcher's options": Try(f"{SWEEP} --launcher-options '{{gpus: 1}}'", 2, ("has none",), with_sweep()),
    "storage": Try(f"{SWEEP} --storage sqlite:///no/x.db", 2, ("--storage", "no folder"), with_sweep()),
    "storage away": Try(
        f"{SWEEP} --storage postgresql+psycopg://u:secret@127.0.0.1:PORT/x",
        1,
        ("***@127.0.0.1", "refused"),
        with_sweep(),
    ),
}


def at_port(tried: Try, port: int) -> Try:
    """A try with a number in the place of PORT."""
    return tried._replace(command=tried.command.replace("PORT", str(port)))


@pytest.mark.parametrize("tried", REFUSED.values(), ids=REFUSED)
def test_a_sweep_that_cannot_work_leaves_nothing(tried, empty_workspace, closed_port, capfd):
    before = {path.name for path in empty_workspace.iterdir()}
    answered(at_port(tried, closed_port), empty_workspace, capfd)
    assert {path.name for path in empty_workspace.iterdir()} == before | {"s.yaml"}


def test_good_ones_are_accepted(empty_workspace):
    """The oracle of the table: what each try changes is why it is refused."""
    from pdiff.sweeps.command import check

    with_sweep(
        parameters={
            "diffusion.width": WIDTH,
            "o": {"kind": "categorical", "choices": ["adam", "sgd"], "keys": "prepare.collect.optimizer"},
            "diffusion.steps": {
                **STEPS,
                "step": 8,
                "when": {"diffusion.width": 16, "autoencoder.kind": ["pca", "conv"]},
            },
            "seed": {**STEPS, "when": {"diffusion.steps": [1, 9], "o": "adam"}},
            "generate.seed": {**STEPS, "when": {"prepare.collect.optimizer": "adam"}},
        },
        objectives={"nearest_distance/generated_mean": "maximize"},
        pruner={"kind": "percentile", "metric": "collect/loss", "options": {"percentile": 25.0}},
        sampler={"kind": "tpe", "options": {"multivariate": True, "n_startup_trials": 5}},
        prune_if=[{"metric": "first_batch/val_accuracy/generated_mean", "below": 0.1}],
        first_batch=2,
    )(empty_workspace)
    sweep = check(Command("digits_mlp", "s.yaml")).sweep
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    chosen = [sweep.suggest(study.ask(), {"autoencoder.kind": "pca"}) for _ in range(50)]
    assert {"seed" in keys for keys in chosen} == {True, False}
    for keys in chosen:
        adam, narrow = keys["prepare.collect.optimizer"] == '"adam"', keys["diffusion.width"] == "16"
        assert ("seed" in keys, "generate.seed" in keys) == (adam and narrow, adam)


# -- storages


def foreign_database(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "x.db")) as database:
        database.execute("CREATE TABLE invoices (sum)")


def of_alembic(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "x.db")) as database:
        database.execute("CREATE TABLE alembic_version (version_num)")


def with_study(folder: Path) -> None:
    storage = open_storage(f"sqlite:///{folder}/x.db")
    made(storage)
    storage.backend.engine.dispose()


def torn_database(folder: Path) -> None:
    with_study(folder)
    path = folder / "x.db"
    path.write_bytes(path.read_bytes()[:20_000] + b"?" * 60_000)


def of_another_version(folder: Path) -> None:
    with_study(folder)
    with contextlib.closing(sqlite3.connect(folder / "x.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99'")
        database.commit()


def journal(folder: Path) -> Path:
    """The journal of a study with two trials."""
    study = made(open_storage(f"journal://{folder}/x.log"))
    trials.plan(study, 2)
    return folder / "x.log"


def journal_with(line: bytes, *, at: int):
    def write(folder: Path) -> None:
        lines = journal(folder).read_bytes().splitlines(keepends=True)
        (folder / "x.log").write_bytes(b"".join([*lines[:at], line, *lines[at:]]))

    return write


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def folder_named(name: str):
    return lambda folder: (folder / name).mkdir()


def studies(url: str, code: int, *says: str, before=lambda folder: None) -> Try:
    return Try(f"studies --storage '{url}'", code, ("--storage", *says), before)


PATTERN = "expected sqlite:///FILE, journal:///FILE"
STORAGES = [
    studies("postgresql+psycopg://u:secret@127.0.0.1:PORT/x", 1, "***", "refused"),
    studies("postgresql+psycopg://u:secret@h:port/x", 2, "***", PATTERN),
    studies("postgresql+psycopg://u:sec@secret@h/x", 2, "***@h/x", "%40"),
    studies("postgresql:/u:secret@h/x", 2, "***", PATTERN),
    studies("u:secret@h", 2, "***", PATTERN),
    studies("garbage://u:secret@h/x", 2, "'garbage'", PATTERN),
    studies("postgresql+none://u:secret@h/x", 2, "'postgresql+none'", PATTERN),
    studies("mssql+pyodbc://u:secret@h/x", 2, "driver is not installed", "pyodbc"),
    studies("garbage://h/x?password=secret", 2, "password=***"),
    studies("sqlite:///x.db?timeout=9", 2, "options behind it"),
    studies("sqlite://", 2, "in memory"),
    studies("journal://", 2, PATTERN),
    studies("sqlite:///no/x.db", 2, "no folder", "no"),
    studies("journal://no/such/x.log", 2, "no folder", "such"),
    studies("sqlite:///d", 2, "d is no file", before=folder_named("d")),
    studies("journal://d", 2, "d is no file", before=folder_named("d")),
    studies("journal:///dev/null", 2, "no file"),
    studies("sqlite:///x.db", 1, "not a database", before=text("x.db", "a letter to somebody\n" * 30)),
    studies("sqlite:///x.db", 1, "another program", "invoices", before=foreign_database),
    studies("sqlite:///x.db", 1, "another program", "alembic_version", before=of_alembic),
    studies("sqlite:///x.db", 1, "malformed", before=torn_database),
    studies("sqlite:///x.db", 1, "optuna", before=of_another_version),
    studies("x.log", 1, "line 1 is no record", before=text("x.log", "a letter\n")),
    studies("x.log", 1, "line 1 is no record", before=text("x.log", '{"a": "file of somebody else"}')),
    studies("x.log", 1, "line 2 is no record", before=journal_with(b"[1, 2]\n", at=1)),
    studies("x.log", 1, "line 3 is no record", before=journal_with(b'{"op_code":4,"work\n', at=2)),
    studies("x.log", 1, "line 2 is no record", before=journal_with(b"\xff\xfe\x00\n", at=1)),
    studies("x.log", 1, "do not fit", before=journal_with(b'{"op_code":77,"worker_id":"x"}\n', at=1)),
    studies("x.log", 1, "do not fit", before=journal_with(b'{"op_code":4,"worker_id":"x"}\n', at=0)),
    Try("work --study s --storage sqlite:///x.db", 2, ("--study s", "no such study")),
    Try("work --study s --storage x.log", 2, ("--study s", "no such study")),
    Try("work --study s --storage postgresql+psycopg://u:secret@127.0.0.1:PORT/x", 1, ("--storage", "***", "refused")),
    Try("overhead --storage garbage://u:secret@h/x", 2, ("--storage", "***")),
]


def files(folder: Path) -> dict[Path, bytes]:
    """Path -> content of all files, but for those that SQLite keeps beside a database while it is open."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix[:4] != ".db-"}


@pytest.mark.parametrize("tried", STORAGES, ids=lambda tried: f"{tried.command} {tried.says[-1]}")
def test_a_storage_that_cannot_be_used_is_a_line_within_10_s_and_is_left_as_it_was(
    tried, empty_workspace, closed_port, capfd
):
    tried.before(empty_workspace)
    before = files(empty_workspace)
    begin = time.monotonic()
    answered(at_port(tried, closed_port)._replace(before=lambda folder: None), empty_workspace, capfd)
    assert time.monotonic() - begin < 10
    assert files(empty_workspace) == before


def test_the_variable_is_named_where_it_was_used_and_no_message_has_the_password(
    empty_workspace, closed_port, monkeypatch, capfd
):
    monkeypatch.setenv("PDIFF_STORAGE", "garbage://u:secret@h/x")
    for command in ("studies", "work --study s", "overhead"):
        answered(Try(command, 2, ("PDIFF_STORAGE garbage://u:***@h/x",)), empty_workspace, capfd)
    for tried in (at_port(tried, closed_port) for tried in STORAGES if "secret" in tried.command):
        assert main(shlex.split(tried.command)) == tried.code
    printed = capfd.readouterr()
    assert "secret" not in printed.out + printed.err


@pytest.mark.parametrize("url", ["sqlite:///optuna.db", "journal://x.log"])
def test_looking_creates_nothing(empty_workspace, capfd, url):
    before = list(empty_workspace.iterdir())
    assert main(["studies", "--storage", url]) == 0
    assert capfd.readouterr().out == "no study\n" and list(empty_workspace.iterdir()) == before


def test_workers_have_the_storage_in_their_environment_alone():
    """A list of processes shows their words to everybody."""
    task = _task(Command("digits_mlp", "accuracy_cost", storage="postgresql+psycopg://u:secret@h/x"), "trials")
    assert "secret" not in " ".join(task.command) and "secret" in task.variables["PDIFF_STORAGE"]


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(empty_workspace, capfd):
    """It accepts connections, and is silent then."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql+psycopg://u:secret@127.0.0.1:{server.getsockname()[1]}/x"
        begin = time.monotonic()
        answered(Try(f"studies --storage {url}", 1, ("--storage", "***", "timeout")), empty_workspace, capfd)
    assert time.monotonic() - begin < 10


def refuse_password(server: socket.socket) -> None:
    """What PostgreSQL says to a wrong password: https://www.postgresql.org/docs/current/protocol-message-formats.html."""
    connection, _ = server.accept()
    with connection:
        while len(connection.recv(1024)) == 8:  # asks for encryption
            connection.sendall(b"N")
        connection.sendall(b"R" + struct.pack("!ii", 8, 3))  # asks for the password
        assert connection.recv(1024).endswith(b"secret\0")
        fields = b'SFATAL\0C28P01\0Mpassword authentication failed for user "u"\0\0'
        connection.sendall(b"E" + struct.pack("!i", 4 + len(fields)) + fields)


def test_a_wrong_password_is_a_line_without_it(empty_workspace, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=refuse_password, args=[server])
        thread.start()
        url = f"postgresql+psycopg://u:secret@127.0.0.1:{server.getsockname()[1]}/x"
        answered(Try(f"studies --storage {url}", 1, ("u:***@", "authentication failed")), empty_workspace, capfd)
        thread.join()


def test_a_tracking_server_that_is_away_leaves_no_storage(empty_workspace, closed_port, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(f"http://127.0.0.1:{closed_port}")
    with_sweep()(empty_workspace)
    before = files(empty_workspace)
    assert main(shlex.split(SWEEP)) and "no answer" in capfd.readouterr().err
    assert files(empty_workspace) == before


def test_a_full_disk_and_damage_are_a_line_while_a_study_is_used(tmp_path):
    """What a database says that answers, but cannot do what it is asked for."""
    for orig in (sqlite3.OperationalError("database or disk is full"), sqlite3.DatabaseError("malformed")):

        class Full(optuna.storages.InMemoryStorage):
            def get_all_studies(self, orig=orig):
                raise storage.DBAPIError("insert", {}, orig)

        with pytest.raises(UserError, match=rf"--storage sqlite:///x.db: cannot be used: {orig}"):
            storage.Storage(Full(), "sqlite:///x.db").get_all_studies()


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_database(empty_workspace):
    """Files of this process may not grow beyond 40 kB."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    code = "from pdiff.sweeps.storage import open_storage; open_storage('sqlite:///optuna.db')"
    ended = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True)
    assert "Failure: --storage sqlite:///optuna.db: cannot be opened: " in ended.stderr
    assert not [path for path in empty_workspace.iterdir() if "optuna.db" in path.name and path.stat().st_size]
    made(open_storage("sqlite:///optuna.db"))


# -- killed in the middle of a write


def test_a_journal_whose_last_line_was_not_finished_is_read_and_continued(tmp_path):
    path = journal(tmp_path)
    whole = path.read_bytes()
    for part in (b"{", b'{"op_code":4,"worker_id":"x","study_id":0,"dat'):
        path.write_bytes(whole + part)
        table = trials.studies(str(path)).set_index("study")
        assert table.waiting["s"] == 2 and path.read_bytes() == whole + part
    study = made(open_storage(str(path)))
    trials.plan(study, 3)
    assert path.read_bytes().startswith(whole) and part + b"{" not in path.read_bytes()
    assert trials.studies(str(path)).waiting.tolist() == [3]


def half_made(path: Path, ways: str) -> None:
    """A database that was begun: as one of Optuna's without some of its tables or rows."""
    local.make(path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(ways)
    assert path.stat().st_size


EMPTY = "".join(f"DROP TABLE {name};" for name in ("trial_values", "alembic_version", "version_info"))


@pytest.mark.slow
@pytest.mark.parametrize("ways", ["DELETE FROM alembic_version", "DROP TABLE studies", EMPTY, None], ids=str)
def test_a_half_made_database_is_moved_aside(tmp_path, capsys, ways):
    path = tmp_path / "optuna.db"
    for number in (1, 2):
        path.touch() if ways is None else half_made(path, ways)
        old = path.read_bytes()
        assert trials.studies(f"sqlite:///{path}").empty and path.read_bytes() == old
        made(open_storage(f"sqlite:///{path}"))
        aside = tmp_path / f"optuna.db.damaged-{number}"
        assert aside.read_bytes() == old
        assert f"warning: {path} was not made to its end, and holds nothing; it is now {aside.name}" in (
            capsys.readouterr().out
        )
        assert trials.studies(f"sqlite:///{path}").study.tolist() == ["s"]
        path.unlink()


@pytest.mark.slow
def test_journals_of_a_database_that_is_gone_are_not_taken_for_those_of_a_new_one(tmp_path):
    url, wal = f"sqlite:///{tmp_path}/optuna.db", tmp_path / "optuna.db-wal"
    study = made(open_storage(url))
    study.set_user_attr("x", 1)
    left = wal.read_bytes()
    assert left, "the log of a process that still runs"
    study.set_user_attr("x", 2)
    (tmp_path / "optuna.db").unlink()
    wal.write_bytes(left)
    assert trials.studies(url).empty
    made(open_storage(url), name="new")
    assert trials.studies(url).study.tolist() == ["new"]
    assert (tmp_path / "optuna.db.damaged-1-wal").read_bytes() == left


@pytest.mark.slow
@pytest.mark.parametrize("ways", ["DELETE FROM alembic_version", "DROP TABLE trial_heartbeats"])
def test_what_holds_studies_is_never_moved(tmp_path, ways):
    path = tmp_path / "x.db"
    with_study(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(ways)
    assert trials.studies(f"sqlite:///{path}").study.tolist() == ["s"]
    made(open_storage(f"sqlite:///{path}"), name="t")
    assert not list(tmp_path.glob("*damaged*"))


MAKE = """
import optuna
from pdiff.sweeps.storage import open_storage
print("begun", flush=True)
optuna.create_study(study_name="s", storage=open_storage("sqlite:///optuna.db"), load_if_exists=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.8])
def test_a_kill_while_a_database_is_made_wedges_nothing(empty_workspace, seconds):
    process = subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = Path("optuna.db").exists()
    study = optuna.create_study(study_name="s", storage=open_storage("sqlite:///optuna.db"), load_if_exists=True)
    trials.plan(study, 1)
    assert trials.studies("sqlite:///optuna.db").waiting.tolist() == [1]
    assert not (before and list(empty_workspace.glob("optuna.db.damaged*"))), "what is there is whole"


@pytest.mark.slow
def test_several_processes_make_one_database(empty_workspace):
    """Each has a study of its own; if one database replaced another, a study would be lost."""
    half_made(empty_workspace / "optuna.db", "DELETE FROM alembic_version")
    codes = [MAKE.replace('"s"', f'"s{k}"') for k in range(4)]
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) for code in codes]
    assert [process.wait(120) for process in processes] == [0] * 4
    assert trials.studies("sqlite:///optuna.db").study.tolist() == ["s0", "s1", "s2", "s3"]
    assert len(list(empty_workspace.glob("*damaged*"))) == 1


# -- all trials fail


@pytest.mark.slow
def test_a_sweep_of_which_every_trial_fails_says_why(workspace, capfd):
    """The function that evaluates is not a function of networks."""
    (workspace / "evaluate.py").write_text("def accuracy(state):\n    raise OSError('the images are gone')\n")
    with_sweep(objectives={"nearest_distance/generated_mean": "maximize"})(workspace)
    keys = "--evaluate.kind function --evaluate.function evaluate.py:accuracy --diffusion.steps 20"
    command = f"sweep --tag tiny.yaml --sweep s.yaml --trials 2 --launcher inline {keys}"
    says = ("study s-tiny: no trial completed, 2 of 2 failed; trial 0: ", "the images are gone")
    answered(Try(command, 1, says), workspace, capfd)
    assert os.path.exists(".pdiff/sweeps/s-tiny/report/study.html")
