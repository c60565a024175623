"""A workspace whose stores exist already."""

import shutil

import mlflow
import pytest

from pdiff.sweeps.storage import open_storage


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """A folder with an empty tracking store and an empty storage of studies: what takes seconds to create."""
    folder = tmp_path_factory.mktemp("stores")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.search_experiments()
    mlflow.set_tracking_uri(None)
    open_storage(f"sqlite:///{folder}/optuna.db").backend.engine.dispose()
    return folder


@pytest.fixture
def workspace(workspace, monkeypatch, stores):
    """The workspace of all tests, with its stores, and no storage in the environment."""
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(stores / name, workspace)
    monkeypatch.delenv("PDIFF_STORAGE", raising=False)
    return workspace
