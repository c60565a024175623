"""Hostile tries at the tracking store and at what is kept in it."""

import mlflow
import pytest
from hostile import Try, answered


def at(uri):
    """Another tracking store than the workspace's."""

    def before(folder):
        mlflow.set_tracking_uri(uri.format(folder=folder))

    return before


def written(name, content):
    """A file in the folder."""

    def before(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return before


def folder_named(name):
    def before(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return before


def cut(folder):
    """A database whose pages are overwritten after the first."""
    path = folder / "mlflow.db"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\1" * (len(content) - 4096))


TRIES = [
    Try("export --run 00000000000000000000000000000000 --out there", 2, ("--run", "0000")),
    Try("compare", 1, ("mlflow.db", "is not a database"), written("mlflow.db", b"something else " * 100)),
    Try("main --tag tiny.yaml", 1, ("mlflow.db", "is not a database"), written("mlflow.db", b"\0\xff" * 5000)),
    Try("compare", 1, ("mlflow.db", "malformed"), cut),
    Try("compare", 1, ("mlflow.db", "unable to open"), folder_named("mlflow.db")),
    Try("main --tag tiny.yaml", 1, (".pdiff", "cannot be written"), written(".pdiff", b"")),
    Try("compare", 2, ("garbage://x", "unsupported URI"), at("garbage://x")),
    Try("prepare --tag tiny.yaml", 1, ("/dev/null/mlflow.db",), at("sqlite:////dev/null/mlflow.db")),
    Try("compare", 1, ("mysql+nothing://me:***@h/x",), at("mysql+nothing://me:pw@h/x")),
    Try("main --tag tiny.yaml", 1, ("postgresql://me:***@127.0.0.1:1/x",), at("postgresql://me:pw@127.0.0.1:1/x")),
    Try("leaderboard", 1, ("http://127.0.0.1:1", "no answer"), at("http://127.0.0.1:1")),
]


@pytest.mark.parametrize("tried", TRIES, ids=lambda tried: f"{tried.command}: {' '.join(tried.says)}")
def test_a_line(tried, workspace, capfd):
    answered(tried, workspace, capfd)
