"""What MLflow's user interface shows at first sight: tags of the MLflow experiment that decide it, and addresses.

The tag `mlflow.experimentKind` makes an experiment one of model training. The interface around it still opens for
generative AI, unless the address says `workflowType`: no tag and no setting of the server decides that, only this
parameter and what the browser remembers. Columns are the same: of a table that it has never shown, a browser shows no
metric. A saved view, a tag `mlflow.sharedViewState.NAME` of the experiment, brings its own columns to all who open its
address or choose it under "Views".
"""

from __future__ import annotations

import json
import time

import mlflow
from mlflow.entities import Run as Record

from pdiff.experiment.metrics import FIT_SECONDS

USER_INTERFACE = "http://127.0.0.1:5000"  # of `mlflow ui`
MODEL_TRAINING = "workflowType=machine_learning"
VIEW = "pdiff"  # name and identifier of the saved view
COLUMNS = {
    "tags.`pdiff.tag`": 90,
    "duration": 75,
    "metrics.`test_accuracy/generated_mean`": 200,
    "metrics.`test_accuracy/original_mean`": 190,
    "metrics.`novelty/generated_median`": 175,
    "tags.`pdiff.alarm`": 100,
    "tags.`pdiff.verdict`": 300,
    **{f"metrics.`{name}`": 170 for name in (*FIT_SECONDS, "seconds/generate")},
}
"""Of the runs table in the saved view, from left to right -> width in pixels; those that no run has are left out."""


def tags() -> dict[str, str]:
    """Tags of an MLflow experiment for runs of pdiff."""
    now = int(time.time() * 1000)
    state = json.dumps({"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS})
    view = {"name": VIEW, "createdAt": now, "updatedAt": now, "state": state}
    return {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": json.dumps(view)}


def is_served() -> bool:
    """Whether the tracking store is a server, which shows the interface, too; else `mlflow ui` does."""
    return mlflow.get_tracking_uri().startswith("http")


def run(record: Record) -> str:
    """The address of the page of a run."""
    return f"{_runs(record)}/{record.info.run_id}?{MODEL_TRAINING}"


def table(record: Record) -> str:
    """The address of the table with a run and all others of its MLflow experiment, in the saved view."""
    return f"{_runs(record)}?viewStateShareKey={VIEW}&{MODEL_TRAINING}"


def _runs(record: Record) -> str:
    """The address of the runs of an experiment: at the tracking server, or where `mlflow ui` serves by default."""
    server = mlflow.get_tracking_uri().rstrip("/") if is_served() else USER_INTERFACE
    return f"{server}/#/experiments/{record.info.experiment_id}/runs"
