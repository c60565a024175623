"""TODO experiment.evaluate."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pdiff.experiment import config, published, report
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.metrics import by_part
from pdiff.experiment.prepared import base_network, originals, spread
from pdiff.experiment.schema import Experiment
from pdiff.experiment.summary import compare_networks, summary
from pdiff.files import (
    copy_file,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from pdiff.method import baselines
from pdiff.method.collection import Collection
from pdiff.method.log import Log, measured
from pdiff.method.standardize import Standardizer
from pdiff.method.training import resolve_device
from pdiff.networks import datasets
from pdiff.networks.evaluators import Context, Evaluations, Evaluator
from pdiff.networks.imported.plain import first_template
from pdiff.networks.imported.template import Template
from pdiff.parallel import ranks
from pdiff.parallel.ranks import rank_zero_first
from pdiff.seeds import sample_seed

VERDICTS = "verdicts"  # folder of an evaluation with what is known of the originals


def evaluate(experiment: Experiment, out: Path, log: Log, *, prepare: Path, train: Path, generate: Path) -> Metrics:
    """Compare groups of networks.

    Writes `evaluation.csv`, `similarity.safetensors`, `summary.json`, `report.html`, the verdicts on the originals, and
    `trajectory.csv` where `generate` looked at draws on their way.
    """
    history = History(out, log)
    collection = originals(experiment, prepare)
    standardizer = Standardizer.fit(collection)
    groups = {"original": collection, "generated": Collection.load(generate / "generated.safetensors")}
    groups |= _baselines(experiment, collection, standardizer)
    on_the_way = generate / "trajectory.safetensors"
    judged = groups | ({"trajectory": Collection.load(on_the_way)} if on_the_way.exists() else {})
    with measured(history, "evaluate"):
        verdicts = _verdicts(_evaluator(experiment, prepare), judged, out)
    if ranks.rank():  # these have judged their networks, and the first one has all verdicts
        return {}
    with measured(history, "similarity"):
        evaluation, matrices = compare_networks(groups, verdicts, standardizer)
        metrics = summary(evaluation, matrices)
    write_text(out / "evaluation.csv", evaluation.to_csv(index=False))
    if on_the_way.exists():
        write_text(out / "trajectory.csv", _trajectory_table(judged["trajectory"], verdicts).to_csv(index=False))
    if matrices:
        write_tensors(out / "similarity.safetensors", matrices)
    history.save(out / "history.csv")
    write_json(out / "summary.json", {n: v if math.isfinite(v) else None for n, v in metrics.items()})
    _report(experiment, out, evaluation, matrices, metrics, [prepare, train, generate])
    return metrics


def _verdicts(evaluator: Evaluator, groups: dict[str, Collection], out: Path) -> Evaluations:
    """Evaluations of all groups; those of the originals are kept for other runs, or come from one."""
    state, kept = out / STATE, out / VERDICTS
    with rank_zero_first():
        for path in sorted(kept.glob("original.*")):
            copy_file(path, state / path.name)
    verdicts = evaluator(groups, state)
    for path in sorted(state.glob("original.*")):
        if not (kept / path.name).exists():
            copy_file(path, kept / path.name)
    return verdicts


def _evaluator(experiment: Experiment, prepared: Path) -> Evaluator:
    """The evaluator of an experiment, with what it needs of the stage `prepare`."""
    context = Context(
        network=lambda: base_network(experiment, datasets.load(experiment.dataset), prepared),
        images=lambda: datasets.load(experiment.dataset),
        template=lambda: _template(experiment, prepared),
        device=resolve_device(experiment.device),
    )
    return experiment.evaluator.make(context)


def _template(experiment: Experiment, prepared: Path) -> Template:
    """How files of the networks are laid out: as somebody's own, or plainly with all tensors of the base network."""
    if experiment.prepare.source:
        return first_template(Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude)
    return Template.of(read_tensors(prepared / "network.safetensors"))


def _baselines(experiment: Experiment, collection: Collection, standardizer: Standardizer) -> dict[str, Collection]:
    """Name -> networks that need no generator."""
    settings, some = experiment.evaluate, spread(collection, experiment.evaluate.noise_count)
    groups = {}
    for k, scale in enumerate(settings.noise):
        seed = sample_seed(experiment.seed, 5 + k)
        groups[f"noise_{scale:g}"] = baselines.noisy(some, standardizer, scale=scale, seed=seed)
    return groups | {name: baselines.BASELINES[name](collection) for name in settings.baselines}


def _trajectory_table(trajectory: Collection, verdicts: Evaluations) -> pd.DataFrame:
    """One row for each look at a draw on its way: timestep, draw, accuracies."""
    timesteps, draws = zip(*(name.split() for name in trajectory.names), strict=True)
    columns = {by_part("accuracy")[part]: verdict["trajectory"].accuracy for part, verdict in verdicts.items()}
    return pd.DataFrame({"timestep": map(float, timesteps), "draw": map(int, draws), **columns})


def _report(
    experiment: Experiment,
    out: Path,
    evaluation: pd.DataFrame,
    matrices: dict[str, Tensor],
    metrics: Metrics,
    upstream: list[Path],
) -> None:
    """Write the HTML report."""
    histories = [pd.read_csv(folder / "history.csv") for folder in upstream]
    matrix = next(reversed(matrices.values()), torch.zeros(0, 0))
    trajectory = out / "trajectory.csv"
    html = report.report(
        title=experiment.tag,
        summary={**metrics, "config": config.to_yaml(experiment)},
        evaluation=evaluation,
        similarity=matrix.numpy(),
        groups=evaluation["group"][: len(matrix)].tolist(),
        history=pd.concat(histories, ignore_index=True),
        trajectory=pd.read_csv(trajectory) if trajectory.exists() else None,
        published=published.published(experiment.tag),
        changes=config.changes(experiment),
    )
    write_text(out / "report.html", html)
