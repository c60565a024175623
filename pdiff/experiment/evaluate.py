"""The stage `evaluate`: original and generated networks and baselines, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pdiff.experiment import config, limits, published, report
from pdiff.experiment.history import HISTORY, STATE, History, Metrics
from pdiff.experiment.metrics import by_part
from pdiff.experiment.prepared import evaluator, evenly_spaced, original_networks
from pdiff.experiment.schema import Experiment
from pdiff.experiment.summary import compare_networks, summary
from pdiff.files import copy_file, write_json, write_tensors, write_text
from pdiff.method import baselines
from pdiff.method.collection import Collection, generated_numbers
from pdiff.method.log import Log, measured
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluations
from pdiff.parallel import ranks
from pdiff.seeds import stream


def evaluate(
    experiment: Experiment,
    out: Path,
    log: Log,
    *,
    prepare: Path,
    train: Path,
    generate: Path,
    pretrain: Path | None = None,
    originals: Path | None = None,
) -> Metrics:
    """Compare groups of networks.

    Writes `evaluation.csv`, `similarity.safetensors`, `summary.json`, `report.html`, `history.csv`, and
    `trajectory.csv` where `generate` kept networks at intermediate timesteps.

    Args:
        experiment: what to compare.
        out: folder to write to.
        log: receives seconds and memory.
        prepare: folder of the original networks.
        train: folder of the generator, for its loss curves.
        generate: folder of the generated networks.
        pretrain: folder of the pretrained network, for its loss curve.
        originals: folder with the evaluation of the original networks, where there is one.
    """
    history = History(out, log)
    collection = original_networks(experiment, prepare)
    limits.check(experiment, ["evaluate"], out, size=generated_numbers(collection[0]))
    standardizer = Standardizer.fit(collection)
    groups = {"original": collection, "generated": Collection.load(generate / "generated.safetensors")}
    groups |= _baselines(experiment, collection, standardizer)
    intermediate = generate / "trajectory.safetensors"
    extra = {"trajectory": Collection.load(intermediate)} if intermediate.exists() else {}
    with measured(history, "evaluate"):
        results = _evaluated(experiment, groups | extra, out / STATE, prepare, originals)
    if ranks.rank():  # rank 0 has the results of all
        return {}
    with measured(history, "similarity"):
        evaluation, matrices = compare_networks(groups, results, standardizer)
        metrics = summary(evaluation, matrices)
    write_text(out / "evaluation.csv", evaluation.to_csv(index=False))
    if extra:
        write_text(out / "trajectory.csv", _trajectory_table(extra["trajectory"], results).to_csv(index=False))
    if matrices:
        write_tensors(out / "similarity.safetensors", matrices)
    write_json(out / "summary.json", {n: v if math.isfinite(v) else None for n, v in metrics.items()})
    curves = [folder for folder in (pretrain, prepare, train, generate) if folder]
    _report(experiment, out, evaluation, matrices, metrics, curves)
    return metrics


def _evaluated(
    experiment: Experiment, groups: Mapping[str, Collection], state: Path, prepare: Path, originals: Path | None
) -> Evaluations:
    """Results of all groups; those of the originals are read from where their stage wrote them."""
    known = sorted(originals.glob("original.*")) if originals else []
    with ranks.rank_zero_first():
        for path in known:
            copy_file(path, state / path.name)
    try:
        return evaluator(experiment, prepare)(groups, state)
    finally:
        if not ranks.rank():  # what is left in the folder, if anything, was found here
            for path in known:
                (state / path.name).unlink(missing_ok=True)


def _baselines(experiment: Experiment, originals: Collection, standardizer: Standardizer) -> dict[str, Collection]:
    """Name -> networks that need no generator."""
    settings, some = experiment.evaluate, evenly_spaced(originals, experiment.evaluate.noise_count)
    groups = {}
    for scale in settings.noise:
        name = f"noise_{scale:g}"
        groups[name] = baselines.noisy(some, standardizer, scale=scale, seed=stream(experiment.seed, name))
    return groups | {name: baselines.BASELINES[name](originals) for name in settings.baselines}


def _trajectory_table(trajectory: Collection, results: Evaluations) -> pd.DataFrame:
    """One row for each network at an intermediate timestep: timestep, index of the sample, accuracies."""
    timesteps, indices = zip(*(name.split() for name in trajectory.names), strict=True)
    columns = {by_part("accuracy")[part]: result["trajectory"].accuracy for part, result in results.items()}
    return pd.DataFrame({"timestep": map(float, timesteps), "index": map(int, indices), **columns})


def _report(
    experiment: Experiment,
    out: Path,
    evaluation: pd.DataFrame,
    matrices: dict[str, Tensor],
    metrics: Metrics,
    upstream: list[Path],
) -> None:
    """Write the HTML report."""
    histories = [pd.read_csv(folder / HISTORY) for folder in upstream]
    matrix = next(reversed(matrices.values()), torch.zeros(0, 0))
    trajectory = out / "trajectory.csv"
    known = published.published(experiment.tag)
    html = report.report(
        title=experiment.tag,
        verdict=[],
        tables={"evaluation": evaluation},
        similarity=matrix.numpy(),
        groups=evaluation["group"][: len(matrix)].tolist(),
        history=pd.concat(histories, ignore_index=True),
        trajectory=pd.read_csv(trajectory) if trajectory.exists() else None,
        published=report.published_table(metrics, known) if known else None,
        changes=config.changes(experiment),
        config=config.to_yaml(experiment),
    )
    write_text(out / "report.html", html)
