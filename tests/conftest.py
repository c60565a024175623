"""What several test modules need."""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from tracked import NAMES, TINY

from pdiff.method.collection import Collection
from pdiff.networks import datasets
from pdiff.networks.images import Images
from pdiff.networks.options import Dataset

# One thread, in processes that tests start, too: networks are tiny, a thread that waits for a core in use delays all,
# and results are the same to the last bit in every process.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where pytest runs in the background


@pytest.fixture
def mixed() -> Collection:
    """Seven checkpoints with every kind of tensor: floats of three types, a running variance, constants."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "weight": 0.3 + 0.05 * torch.randn(7, 4, 3, generator=g),
        "scale": 2 + torch.randn(7, 1, generator=g),
        "norm.running_mean": torch.randn(7, 5, generator=g),
        "norm.running_var": 0.2 + torch.rand(7, 5, generator=g),
        "norm.num_batches_tracked": torch.arange(7) + 10,
        "half": torch.randn(7, 6, generator=g).half(),
        "counts": torch.arange(14).reshape(7, 2),
        "bias": 1e-3 * torch.randn(7, 3, generator=g).double(),
    }
    return Collection(tensors)


@pytest.fixture(scope="session")
def digits() -> Images:
    """The digits of scikit-learn with 120 images for training, 8 x 8 grey."""
    return datasets.load(Dataset(name="digits", validation_fraction=0.9))


@pytest.fixture(scope="session")
def tracking_store(tmp_path_factory) -> Path:
    """The file of an empty SQLite tracking store; creating its tables takes longer than most tests."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.search_experiments()
        mlflow.set_tracking_uri(None)
    return folder / "mlflow.db"


@pytest.fixture
def empty_workspace(tmp_path, monkeypatch) -> Iterator[Path]:
    """The current folder, with a tiny experiment in it, and the address of a tracking store that does not exist yet."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(TINY)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def workspace(empty_workspace, tracking_store) -> Path:
    """The same with a tracking store, in which there is no run."""
    shutil.copy(tracking_store, empty_workspace)
    return empty_workspace


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nothing listens, and nothing can while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
