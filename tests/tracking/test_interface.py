"""Addresses of MLflow's user interface."""

from types import SimpleNamespace

import mlflow
import pytest

from pdiff.tracking import interface

RUN = SimpleNamespace(info=SimpleNamespace(experiment_id="7", run_id="a1"))


@pytest.mark.parametrize(
    ("store", "server"),
    [("sqlite:///mlflow.db", "http://127.0.0.1:5000"), ("https://team.org/mlflow/", "https://team.org/mlflow")],
)
def test_addresses(store, server, monkeypatch):
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: store)
    assert interface.is_served() == (server != "http://127.0.0.1:5000")
    assert interface.run(RUN) == f"{server}/#/experiments/7/runs/a1?workflowType=machine_learning"
    start, _, words = interface.table(RUN).partition("?")
    assert start == f"{server}/#/experiments/7/runs"
    assert sorted(words.split("&")) == ["viewStateShareKey=pdiff", "workflowType=machine_learning"]
