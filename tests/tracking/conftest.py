"""A workspace whose tracking store exists already: to create one takes a second."""

import shutil

import mlflow
import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    mlflow.search_experiments()
    mlflow.set_tracking_uri(None)
    return path


@pytest.fixture
def workspace(workspace, empty_store):
    """The workspace of all tests, with its store."""
    shutil.copy(empty_store, workspace)
    return workspace
