"""Hostile tries at the registered generator, at what names a run, and at exported files."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from elsewhere import HIDE
from mlflow.exceptions import MlflowException

from pdiff.experiment import schema
from pdiff.method.collection import Collection
from pdiff.method.generators import GaussianOptions
from pdiff.method.generators.base import Generator
from pdiff.tracking import models

GENERATOR = {"tag": "tiny", "prepare": {"source": "folder"}, "generator": {"kind": "gaussian"}}


def collection(count: int = 6) -> Collection:
    """Networks with a tensor of every kind that a state dict has."""
    g = torch.Generator().manual_seed(0)
    return Collection(
        {
            "layer.weight": torch.randn(count, 3, 2, generator=g),
            "half": torch.randn(count, 4, generator=g).bfloat16(),
            "double": torch.randn(count, 2, generator=g).double(),
            "steps": torch.arange(count) + 2**40,
        }
    )


@pytest.fixture(scope="module")
def logged(tracking_store, tmp_path_factory):
    """A generator, and the folder of the MLflow model that was logged of it."""
    folder = tmp_path_factory.mktemp("model")
    generator = Generator.fit(collection(), GaussianOptions())
    generator.save(folder / "generator")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "mlflow.db").write_bytes(tracking_store.read_bytes())
        with mlflow.start_run():
            models.log(schema.experiment({**GENERATOR, "log_models": False}), folder / "generator")
        (found,) = mlflow.search_logged_models(output_format="list")
    mlflow.set_tracking_uri(None)
    return generator, Path(found.artifact_location)


@pytest.fixture(scope="module")
def loaded(logged):
    """The same, loaded where pdiff is installed; the folders that modules are imported from are as before."""
    before = list(sys.path)
    model = mlflow.pyfunc.load_model(str(logged[1]))
    assert sys.path == before
    return model


def same(found: dict, expected: Collection) -> bool:
    """Whether arrays, or the lists that JSON makes of them, are the networks of a collection, to the last bit."""
    return list(found) == list(expected.tensors) and all(
        torch.equal(torch.as_tensor(np.asarray(found[name])).to(tensor.dtype), tensor)
        for name, tensor in expected.tensors.items()
    )


def test_every_row_is_answered(logged, loaded):
    rows = [(2, 0), (1, 7), (3, 0), (1, 2**60)]
    answers = loaded.predict(pd.DataFrame(rows, columns=["count", "seed"])[["seed", "count"]])
    assert len(answers) == len(rows)
    assert all(same(answer, logged[0].sample(n, seed=seed)) for answer, (n, seed) in zip(answers, rows, strict=True))
    assert same(loaded.predict(pd.DataFrame({"count": [2.0], "seed": [3]}))[0], logged[0].sample(2, seed=3))


def test_the_signature_tells_what_goes_in_and_what_comes_out(loaded):
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == signature.inputs.required_input_names() == ["count", "seed"]
    outputs = {column.name: str(column.type) for column in signature.outputs}
    assert outputs == {
        "layer.weight": "Array(Array(Array(float)))",
        "half": "Array(Array(float))",
        "double": "Array(Array(double))",
        "steps": "Array(long)",
    }


WRONG = {
    "count 0": ({"count": [0], "seed": [0]}, "row 0: count is 0, expected a whole number >= 1"),
    "count -1": ({"count": [-1], "seed": [0]}, "row 0: count is -1, expected a whole number >= 1"),
    "count 2.7": ({"count": [2.7], "seed": [0]}, "row 0: count is 2.7, expected a whole number >= 1"),
    "count NaN": ({"count": [np.nan], "seed": [0]}, "row 0: count is nan, expected"),
    "count infinite": ({"count": [np.inf], "seed": [0]}, "row 0: count is inf, expected"),
    "count of letters": ({"count": ["many"], "seed": [0]}, "row 0: count is 'many', expected"),
    "count of digits": ({"count": ["2"], "seed": [0]}, "row 0: count is '2', expected"),
    "count True": ({"count": [True], "seed": [0]}, "row 0: count is True, expected"),
    "count absent": ({"count": [None], "seed": [0]}, "row 0: count is None, expected"),
    "count of lists": ({"count": [[2]], "seed": [0]}, "row 0: count is [2], expected"),
    "seed -1": ({"count": [1], "seed": [-1]}, "row 0: seed is -1, expected a whole number >= 0"),
    "seed 0.5": ({"count": [1], "seed": [0.5]}, "row 0: seed is 0.5, expected a whole number >= 0"),
    "second row": ({"count": [1, 0], "seed": [0, 0]}, "row 1: count is 0, expected"),
    "no row": ({"count": [], "seed": []}, "no rows, expected at least one"),
    "no seed": ({"count": [1]}, "missing inputs ['seed']"),
    "no count, and one more": ({"n": [1], "seed": [1]}, "missing inputs ['count']. Note that there were extra inputs"),
    "too many": ({"count": [10**15], "seed": [0]}, "count: 1000000000000000 networks, expected at most "),
    "too many together": ({"count": [10**15, 10**15], "seed": [0, 0]}, "count: 2000000000000000 networks"),
}


@pytest.mark.parametrize(("frame", "says"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(frame, says, loaded):
    with pytest.raises(MlflowException) as raised:
        loaded.predict(pd.DataFrame(frame))
    assert raised.value.get_http_status_code() == 400
    assert says in raised.value.message.splitlines()[-1] and len(raised.value.message) < 500


def test_other_columns_change_nothing(logged, loaded):
    (answer,) = loaded.predict(pd.DataFrame({"count": [2], "seed": [1], "first": [5]}))
    assert same(answer, logged[0].sample(2, seed=1))


@pytest.fixture
def server(logged, tmp_path):
    """The address of `mlflow models serve` in an environment where pdiff cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    absent = subprocess.run([sys.executable, "-c", "import pdiff"], **options, text=True)
    assert "No module named 'pdiff'" in absent.stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", str(logged[1]), "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", *words], **options | {"stdout": log})
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not answers(address):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(address: str) -> bool:
    """Whether a server says that it is ready."""
    try:
        return requests.get(f"{address}/ping", timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.slow
def test_the_model_is_served_where_pdiff_is_not_installed(server, logged):
    def asked(*rows: tuple, columns: tuple = ("count", "seed")) -> requests.Response:
        body = {"dataframe_split": {"columns": columns, "data": rows}}
        return requests.post(f"{server}/invocations", json=body, timeout=60)

    answer = asked((2, 3), (1, 0))
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["predictions"]
    assert same(first, logged[0].sample(2, seed=3)) and same(second, logged[0].sample(1, seed=0))
    for rows, says in {
        ((2.7, 0),): "row 0: count is 2.7, expected a whole number >= 1",
        ((1, 0), (0, 0)): "row 1: count is 0, expected a whole number >= 1",
        (("2", 0),): "row 0: count is '2', expected a whole number >= 1",
        ((None, 0),): "row 0: count is None, expected a whole number >= 1",
        ((10**15, 0),): "expected at most",
    }.items():
        refused = asked(*rows)
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        assert says in refused.json()["message"].splitlines()[-1]
    assert "missing inputs ['seed']" in asked((2,), columns=("count",)).json()["message"]
