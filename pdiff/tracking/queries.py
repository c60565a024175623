"""Questions about finished runs: side by side (`compare`), and the latest of each tag (the leaderboard)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import mlflow
import pandas as pd
from mlflow.entities import Run

from pdiff.errors import UserError
from pdiff.experiment import config, leaderboard, published
from pdiff.experiment.leaderboard import Result
from pdiff.experiment.metrics import COMPARED, FIT_SECONDS, MISSING
from pdiff.tracking.engine import Done
from pdiff.tracking.runs import CONFIG, record, tracked
from pdiff.tracking.store import artifacts_of, named, search

if TYPE_CHECKING:
    from pdiff.experiment.benchmark.page import Found

COLUMNS = ["tag", "seed", *COMPARED.values(), "seconds/fit", "seconds/generate", "run"]
"""Of the table of `compare`."""


def finished(*stages: str) -> list[Run]:
    """All finished runs of some stages of experiments, except those of trials, the latest first."""
    condition = "attributes.status = 'FINISHED' and tags.`pdiff.tag` LIKE '%' and tags.`pdiff.stage` = "
    found = [run for stage in stages for run in search(f"{condition}'{stage}'") if "pdiff.trial" not in run.data.tags]
    return sorted(found, key=lambda run: run.info.start_time, reverse=True)


def compare(tag: str = "") -> pd.DataFrame:
    """Every finished run of all stages, one row each, the oldest first; `metrics.readable` makes a table for people.

    Args:
        tag: of the experiment; that of any when absent.
    """
    rows = []
    for run in reversed(finished("main")):
        if tag not in ("", run.data.tags["pdiff.tag"]):
            continue
        metrics, parameters = run.data.metrics, run.data.params
        row = {"tag": run.data.tags["pdiff.tag"], "seed": parameters.get("config.seed", "")}
        row |= {name: metrics.get(name, math.nan) for name in COMPARED.values()}
        fit = [metrics[name] for name in FIT_SECONDS if name in metrics]
        row["seconds/fit"] = sum(fit) if fit else math.nan
        row["seconds/generate"] = metrics.get("seconds/generate", math.nan)
        rows.append(row | {"run": run.info.run_id})
    return pd.DataFrame(rows, columns=COLUMNS)


def audits(run_ids: Sequence[str]) -> tuple[dict[str, dict[str, pd.DataFrame]], pd.DataFrame]:
    """What runs of main, evaluate or audit have found, and in what their configurations differ.

    Args:
        run_ids: of at least two runs, or the beginnings of their ids.

    Returns:
        "tag run" -> name of a table -> table, for every run; and, as text, one row for each key of the configuration
        that differs, with a column for each run.

    Raises:
        UserError: no such run, the same one twice, or a run of something else.
    """
    tables, parameters = {}, {}
    for run_id in run_ids:
        folder, tags = artifacts_of(run_id)
        record = named(run_id)
        if evaluated := tags.get("pdiff.evaluate_run") if tags.get("pdiff.stage") == "main" else None:
            folder, _ = artifacts_of(evaluated)
        if not (folder / "evaluation.csv").exists():
            kind = tags.get("pdiff.stage", "something else")
            raise UserError(
                f"RUN {run_id}: a run of {kind} compares no networks, expected one of main, evaluate or audit"
            )
        label = f"{tags['pdiff.tag']} {record.info.run_id[:8]}"
        if label in tables:
            raise UserError(f"RUN {run_id}: given twice, expected each run once")
        files = [folder / "evaluation.csv", *sorted((folder / "tables").glob("*.csv"))]
        tables[label] = {path.stem: pd.read_csv(path) for path in files}
        parameters[label] = configuration(record)
    frame = pd.DataFrame(parameters).fillna(MISSING)
    differing = frame[frame.nunique(axis=1) > 1]
    return tables, differing.rename_axis("key").reset_index()


def configuration(run: Run) -> dict[str, str]:
    """The configuration of a run, dotted key -> value as text."""
    return {key.removeprefix(CONFIG): value for key, value in run.data.params.items() if key.startswith(CONFIG)}


def log_comparison(tables: Mapping[str, Mapping[str, pd.DataFrame]], differing: pd.DataFrame) -> Done:
    """Log what `audits` returns as a run with `comparison.html`."""
    from pdiff.experiment import report

    with tracked("compare") as run:
        mlflow.log_text(differing.to_csv(index=False), "differences.csv")
        mlflow.log_text(report.compare_page(tables, differing), "comparison.html")
    return run.done()


def log_leaderboard(board: pd.DataFrame) -> Done:
    """Log a board, as `leaderboard.table` makes it, as a run with `leaderboard.csv` and `leaderboard.html`."""
    with tracked("leaderboard") as run:
        mlflow.log_text(board.to_csv(index=False), "leaderboard.csv")
        mlflow.log_text(leaderboard.page(board), "leaderboard.html")
    return run.done()


def log_benchmark(found: Found, parameters: Mapping[str, str]) -> Done:
    """Log a benchmark as a run with its metrics, `benchmark.md` and `benchmark.html`."""
    with tracked("benchmark") as run:
        record(run.run_id, metrics=found.metrics(), parameters={f"benchmark.{k}": v for k, v in parameters.items()})
        mlflow.log_text(found.markdown(), "benchmark.md")
        mlflow.log_text(found.html(), "benchmark.html")
    return run.done()


def results(ours: Mapping[str, Result], names: Sequence[str] = (), *, only_ours: bool = False) -> list[Result]:
    """Our results and published ones, in the order of a leaderboard.

    Args:
        ours: those of `evaluations`.
        names: a tag is shown that holds one of them; every tag when absent.
        only_ours: leave out what was never run.
    """
    others = (
        [] if only_ours else [Result(tag, published.published(tag)) for tag in config.runnable() if tag not in ours]
    )
    found = sorted([*ours.values(), *others], key=lambda result: (not result.ours, not result.published, result.tag))
    return [result for result in found if not names or any(name in result.tag for name in names)]


def evaluations() -> dict[str, Result]:
    """The latest finished evaluation of every tag; those of the tag as it stands come before those with changes."""
    known, results = config.tags(), {}
    as_it_stands = cache(config.load)
    for run in finished("main", "evaluate"):
        tag = run.data.tags["pdiff.tag"]
        changed = config.changed(as_it_stands(tag), configuration(run)) if tag in known else {}
        if tag not in results or (results[tag].changed and not changed):
            results[tag] = Result(tag, published.published(tag), run.data.metrics, changed, run.info.run_id)
    return results
