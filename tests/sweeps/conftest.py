"""A workspace whose storage of studies exists, too."""

import shutil

import pytest

from pdiff.sweeps.storage import open_storage


@pytest.fixture(scope="session")
def studies_file(tmp_path_factory):
    """The file of an empty SQLite storage of studies."""
    path = tmp_path_factory.mktemp("storage") / "optuna.db"
    open_storage(f"sqlite:///{path}").backend.engine.dispose()
    return path


@pytest.fixture
def workspace(workspace, studies_file):
    shutil.copy(studies_file, workspace)
    return workspace
