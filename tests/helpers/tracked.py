"""A tiny experiment, its runs, and commands as processes: what tests of the whole platform need."""

from __future__ import annotations

import os
import time
from pathlib import Path

import mlflow
from forked import Command

TINY = """
log_models: false
dataset: {name: digits, validation_fraction: 0.2}
network: {architecture: mlp}
prepare:
  pretrain: {epochs: 3, batch_size: 64, learning_rate: 3e-3}
  collect: {learning_rate: 0.01, checkpoints: 20}
diffusion: {steps: 60, width: 32, blocks: 1, evaluate_every: 20}
generate: {count: 8, sampling_steps: 6}
evaluate: {noise: [0.05], baselines: [average, gaussian], baseline_count: 4}
"""
NAMES = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "PDIFF_WORK", "PDIFF_STORAGE")
"""Variables that say where runs go."""
STAGES = ["pretrain", "prepare", "train", "generate", "originals", "evaluate"]


def runs(stage=None):
    """Runs of a stage, the oldest first."""
    ids = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    found = mlflow.search_runs(ids, output_format="list", order_by=["attributes.start_time ASC"])
    return [run for run in found if stage in (None, run.data.tags.get("pdiff.stage"))]


def statuses():
    return [(run.data.tags["pdiff.stage"], run.info.status) for run in runs()]


def artifacts(run):
    return Path(run.info.artifact_uri)


def start(*words, **environment):
    """Start the command in another process, in the current folder and on the workspace's store."""
    variables = {**os.environ, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), **environment}
    return Command(Path.cwd(), words, variables)


def wait_for(condition, process, seconds=90):
    """Wait until a condition holds while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
