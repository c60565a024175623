"""The stage `evaluate`: original and generated networks and baselines, compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pdiff.errors import UserError
from pdiff.experiment import board, config, control, costs, limits, published, report, summary, verdict, warm_start
from pdiff.experiment.history import HISTORY, LINEAGE, STATE, History, Metrics
from pdiff.experiment.measures import Evaluated
from pdiff.experiment.metrics import by_part
from pdiff.experiment.population import Population
from pdiff.experiment.prepared import (
    evaluator,
    heldout_networks,
    original_networks,
    reference,
    unit_groups,
    with_statistics,
)
from pdiff.experiment.schema import Experiment
from pdiff.files import copy_file, read_json, write_json, write_tensors, write_text
from pdiff.method.alignment.copies import Originals
from pdiff.method.alignment.groups import recombine
from pdiff.method.alignment.reference import Reference
from pdiff.method.baselines import BASELINES, Fitted, available, noise
from pdiff.method.collection import Collection, generated_numbers
from pdiff.method.generators.base import Generator
from pdiff.method.log import Log, ignore, measured
from pdiff.method.novelty import nearest_two, squared_distances
from pdiff.method.standardize import Standardizer
from pdiff.method.training import resolve_device
from pdiff.method.vectors import Matrix
from pdiff.networks.evaluators import Evaluations
from pdiff.parallel import ranks


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

    Writes `evaluation.csv`, `similarity.safetensors`, `summary.json`, `verdict.md`, `report.html`, the data of its
    figures in `tables/`, `history.csv`, and `trajectory.csv` where `generate` kept networks at intermediate timesteps.

    Args:
        experiment: what to compare.
        out: folder to write to.
        log: receives seconds and memory.
        prepare: folder of the original networks.
        train: folder of the generator, for its loss curves, and for reconstructions.
        generate: folder of the generated networks.
        pretrain: folder of the pretrained network, for its loss curve.
        originals: folder with the evaluation of the original networks, where there is one.
    """
    history = History(out, log)
    fitted, heldout = original_networks(experiment, prepare), heldout_networks(prepare)
    limits.check(experiment, ["evaluate"], out, size=generated_numbers(fitted[0]))
    standardizer = Standardizer.fit(fitted)
    groups = {"original": fitted} | ({"heldout": heldout} if heldout else {})
    generator, to = Generator.load(train / "generator"), reference(experiment, prepare)
    groups |= aligned(to, {"generated": Collection.load(generate / "generated.safetensors")}, history)
    with measured(history, "baselines"):
        arms = baselines(experiment, prepare, fitted, standardizer, groups["generated"], generator)
        groups |= aligned(to, arms)
    matched = matched_to_originals(to, groups, standardizer, history)
    paths = {name: generate / f"{name}.safetensors" for name in ("trajectory", "control")}
    extra = {name: Collection.load(path) for name, path in paths.items() if path.exists()}
    with measured(history, "evaluate"):
        results = results_of(experiment, groups | extra, out / STATE, prepare, originals)
    warm = None
    if experiment.evaluate.warm_start:
        with measured(history, "warm_start"):
            warm = warm_start.warm_start_table(experiment, prepare, groups, out / STATE / "warm_start")
    if ranks.rank():  # rank 0 has the results of all
        return {}
    if "trajectory" in extra:
        write_text(out / "trajectory.csv", _trajectory_table(extra["trajectory"], results).to_csv(index=False))
    folders = {"pretrain": pretrain, "prepare": prepare, "train": train, "generate": generate, "originals": originals}
    upstream = {name: folder for name, folder in folders.items() if folder}
    found = summary.evaluated(groups, results, standardizer, matched)
    asked = None
    if "control" in extra and "validation" in results:
        asked = control.control_table(extra["control"].names, results["validation"]["control"].accuracy)
    return write_audit(experiment, out, history, found, summary.GENERATED, upstream, asked=asked, warm=warm)


def aligned(to: Reference | None, groups: Mapping[str, Collection], log: Log = ignore) -> Mapping[str, Collection]:
    """Groups of networks, aligned as the originals are, if they are; they predict what they did."""
    if not to:
        return groups
    with measured(log, "align"):
        return {name: to.align(networks)[0] for name, networks in groups.items()}


def matched_to_originals(
    to: Reference | None, groups: Mapping[str, Collection], standardizer: Standardizer, log: Log
) -> Mapping[str, Tensor]:
    """Group -> `Originals.distances`, of aligned networks that are not the originals themselves."""
    if not to:
        return {}
    with measured(log, "match"):
        originals = Originals(groups["original"], to, standardizer)
        return {name: originals.distances(networks) for name, networks in groups.items() if name != "original"}


def write_audit(
    experiment: Experiment,
    out: Path,
    log: Log,
    groups: Mapping[str, Evaluated],
    generated: tuple[str, ...],
    upstream: Mapping[str, Path],
    notes: Sequence[str] = (),
    asked: pd.DataFrame | None = None,
    warm: pd.DataFrame | None = None,
) -> Metrics:
    """Measure groups of networks, and write what was found: numbers, tables, the verdict, and the report.

    Args:
        experiment: what was compared.
        out: folder to write to.
        log: receives seconds and memory.
        groups: what `summary.evaluated` returns.
        generated: the groups that come from generators.
        upstream: stage -> its folder, of those whose training and costs the report shows.
        notes: what the reader of the verdict must know beside it.
        asked: as of `control.control_table`, where networks were asked for accuracies.
        warm: as of `warm_start.warm_start_table`, where networks were trained on.
    """
    stage = "audit" if experiment.audit else "evaluate"
    with measured(log, "audit"):
        evaluation, matrices = summary.evaluation_table(groups), summary.similarity_matrices(groups, generated)
        metrics = summary.summary(groups, evaluation, matrices, generated)
        tables = {
            "evaluation": evaluation,
            "front": verdict.front_table(groups, evaluation, generated),
            "comparisons": verdict.comparisons_table(groups, evaluation, generated),
            "votes": summary.votes_table(groups),
            "calibration": summary.calibration_table(groups),
            "latents": summary.latents_table(groups),
            "spectrum": summary.spectrum_table(groups),
            "layers": summary.layers_table(groups),
            "board": board.board(metrics, groups, generated) if len(generated) > 1 else pd.DataFrame(),
        }
        sentences = verdict.verdict(groups, evaluation, tables["comparisons"], metrics, generated)
        if asked is not None:
            tables["control"] = asked
            metrics |= control.slope(asked)
            sentences.append(control.sentence(asked, metrics))
        if warm is not None:
            tables["warm_start"], target = warm, groups["original"].accuracy("validation").mean().item()
            metrics |= warm_start.fewest_steps(warm, target)
            sentences.append(warm_start.sentence(warm, target))
        if "prepare" in upstream:
            sentences.append(f"The originals: {Population.load(upstream['prepare']).describe()}.")
        sentences += notes
    of_stages = {**upstream, stage: out}
    tables["costs"] = costs.costs_table(of_stages, _networks(groups, generated, of_stages))
    write_text(out / "verdict.md", "\n\n".join(sentences) + "\n")
    write_text(out / "evaluation.csv", evaluation.to_csv(index=False))
    for name, table in tables.items():
        if name != "evaluation" and len(table):
            write_text(out / "tables" / f"{name}.csv", table.to_csv(index=False))
    if matrices:
        write_tensors(out / "similarity.safetensors", matrices)
    write_json(out / "summary.json", {n: v if math.isfinite(v) else None for n, v in metrics.items()})
    matrix = next(reversed(matrices.values()), torch.zeros(0, 0))
    there = published.published(experiment.tag)
    lineage = read_json(out / LINEAGE) if (out / LINEAGE).exists() else {}  # the engine writes it
    trajectory, histories = out / "trajectory.csv", [pd.read_csv(folder / HISTORY) for folder in of_stages.values()]
    html = report.report(
        title=experiment.tag,
        verdict=sentences,
        tables=tables,
        similarity=matrix.numpy(),
        groups=[name for name in ("original", *generated) for _ in range(len(groups[name].networks))][: len(matrix)],
        history=pd.concat(histories, ignore_index=True),
        trajectory=pd.read_csv(trajectory) if trajectory.exists() else None,
        published=report.published_table(metrics, there) if there else None,
        changes=config.changes(experiment),
        config=config.to_yaml(experiment),
        lineage=[(stage, of["run"], of["link"]) for stage, of in lineage.items()],
    )
    write_text(out / "report.html", html)
    return metrics


def _networks(groups: Mapping[str, Evaluated], generated: tuple[str, ...], stages: Iterable[str]) -> dict[str, int]:
    """Stage -> how many networks it deals with, of some stages."""
    counts = {name: len(group.networks) for name, group in groups.items()}
    originals, every = sum(counts.get(name, 0) for name in summary.ORIGINALS), sum(counts.values())
    of = {"prepare": originals, "originals": originals, "generate": sum(counts[name] for name in generated)}
    return {name: count for name, count in (of | {"evaluate": every, "audit": every}).items() if name in stages}


def baselines(
    experiment: Experiment,
    prepare: Path | None,
    originals: Collection,
    standardizer: Standardizer,
    generated: Collection,
    generator: Generator | None = None,
) -> dict[str, Collection]:
    """Name -> networks that need no generator: noise at every scale, and the baselines that are asked for.

    Args:
        experiment: which, and how many.
        prepare: folder of the base network, whose units are recombined, if the experiment has one.
        originals: what they are made of.
        standardizer: of the originals.
        generated: networks of a generator, to whose distance from the originals one baseline is matched.
        generator: through whose compression originals are reconstructed, if there is one.

    Raises:
        UserError: a baseline that is asked for by name cannot be made of these originals.
    """
    settings, vectors = experiment.evaluate, standardizer.vectors(originals)
    squares = squared_distances(standardizer.vectors(generated), vectors) / standardizer.size
    device = resolve_device(experiment.device)

    def reconstruct(rows: Matrix) -> Matrix:
        return standardizer.vectors(generator.reconstruct(standardizer.decode(rows), device=device))

    distance = nearest_two(squares.sqrt())[0].median().item()

    def recombined(parents: Tensor, seed: int) -> Matrix:
        return standardizer.vectors(recombine(originals, parents, units, seed=seed))

    units = unit_groups(experiment, prepare).within(originals.tensors) if experiment.network else ()
    fitted = Fitted(
        vectors,
        standardizer,
        reconstruct=reconstruct if generator and generator.compresses else None,
        distance=distance,
        recombine=recombined if len(units) else None,
    )
    automatic = settings.baselines == ("auto",)
    chosen = available(len(originals), fitted.parts) if automatic else settings.baselines
    for name in chosen:
        if reason := BASELINES[name].unmet(len(originals), fitted.parts):
            raise UserError(f"evaluate.baselines: {reason}")
    arms = [*(noise(scale) for scale in settings.noise), *(BASELINES[name] for name in chosen)]
    made = {arm.name: standardizer.decode(arm.make(fitted, settings.baseline_count, experiment.seed)) for arm in arms}
    return {n: with_statistics(experiment, prepare, arm, n, originals=originals) for n, arm in made.items()}


def results_of(
    experiment: Experiment, groups: Mapping[str, Collection], state: Path, prepare: Path, originals: Path | None
) -> Evaluations:
    """Results of all groups; those of the originals are read from where their stage wrote them."""
    known = [path for name in summary.ORIGINALS for path in sorted(originals.glob(f"{name}.*"))] if originals else []
    with ranks.rank_zero_first():
        for path in known:
            copy_file(path, state / path.name)
    try:
        return evaluator(experiment, prepare)(groups, state)
    finally:
        if not ranks.rank():  # what is left in the folder, if anything, was found here
            for path in known:
                (state / path.name).unlink(missing_ok=True)


def _trajectory_table(trajectory: Collection, results: Evaluations) -> pd.DataFrame:
    """One row for each network at an intermediate timestep: timestep, index of the sample, accuracies."""
    timesteps, indices = zip(*(name.split() for name in trajectory.names), strict=True)
    columns = {by_part("accuracy")[part]: result["trajectory"].accuracy for part, result in results.items()}
    return pd.DataFrame({"timestep": map(float, timesteps), "index": map(int, indices), **columns})
