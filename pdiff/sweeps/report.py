"""Figures of a study: one page that works offline, and a file per figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import plotly.graph_objects as go
from optuna import visualization as plots
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from pdiff.experiment.figures import PLOTLY_CONFIG, TEMPLATE
from pdiff.experiment.metrics import MISSING
from pdiff.experiment.report import page, section
from pdiff.files import write_text
from pdiff.sweeps.trials import best, table, values_text

SHOWN = 4  # parameters in the figure of pairs, the most important ones
PLOTLY = "plotly.min.js"
FANOVA = optuna.importance.FanovaImportanceEvaluator(seed=0)  # the default one takes low values for the better ones
READING = {
    "history": "Each point is a trial; the line is the best value so far. Once it is flat, more trials gain little.",
    "importances": "How much of the variance of the objective each parameter explains (fANOVA).",
    "parallel": "Each line is a trial. Drag along an axis to keep only the lines that pass there.",
    "slices": "The objective against each parameter; darker trials came later.",
    "contour": "The objective over pairs of important parameters; a diagonal shape shows that they interact.",
    "front": "Marked trials are those that no other one beats in every objective; choose among these.",
    "timeline": "When each trial ran, and how it ended.",
    "intermediate": "The metric of the pruner at every step, negated where its direction is not the objective's.",
}


def figures(study: optuna.Study) -> Iterator[tuple[str, str, go.Figure]]:
    """Yield name, objective and figure; figures for which there are too few trials are left out."""
    single = len(study.directions) == 1
    for k, objective in enumerate(study.metric_names):
        target = None if single else lambda trial, k=k: trial.values[k]
        options = {"target": target, "target_name": objective}
        yield from _tried("history", objective, lambda o=options: plots.plot_optimization_history(study, **o))
        yield from _tried(
            "importances", objective, lambda o=options: plots.plot_param_importances(study, **o, evaluator=FANOVA)
        )
        yield from _tried("parallel", objective, lambda o=options: plots.plot_parallel_coordinate(study, **o))
        yield from _tried("slices", objective, lambda o=options: plots.plot_slice(study, **o))
        yield from _tried("contour", objective, lambda o=options: _contour(study, **o))
    if len(study.directions) in (2, 3):
        yield from _tried("front", "all objectives", lambda: plots.plot_pareto_front(study))
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        yield from _tried("intermediate", "pruner", lambda: plots.plot_intermediate_values(study))
    yield from _tried("timeline", "all trials", lambda: plots.plot_timeline(study))


def _contour(study: optuna.Study, **options: object) -> go.Figure:
    importances = optuna.importance.get_param_importances(study, evaluator=FANOVA, target=options["target"])
    return plots.plot_contour(study, params=list(importances)[:SHOWN], **options)


def _tried(name: str, objective: str, make: Callable[[], go.Figure]) -> Iterator[tuple[str, str, go.Figure]]:
    try:
        figure = make()
    except (ValueError, RuntimeError):  # what Optuna raises where there are too few trials, or all are alike
        return
    if figure.data:
        yield name, objective, figure.update_layout(template=TEMPLATE, title=None, plot_bgcolor=None)


def write(study: optuna.Study, folder: Path) -> Path:
    """Write `study.html`, a file per figure, and `trials.csv`; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, objective, figure in figures(study):
        key = "_".join([name, *(objective.replace("/", "_").split() if len(study.directions) > 1 else [])])
        shown.append(section(f"{name}: {objective}".capitalize(), READING[name], figure, key=key))
        write_text(folder / "figures" / f"{key}.html", figure.to_html(include_plotlyjs=PLOTLY, config=PLOTLY_CONFIG))
    write_text(folder / "figures" / PLOTLY, get_plotlyjs())
    frame = table(study)
    write_text(folder / "trials.csv", frame.to_csv(index=False))
    trials = frame.drop(columns="run").apply(lambda column: column.map(_cell))
    text = page("study", title=f"Study {study.study_name}", findings=summary(study), trials=trials, plots=shown)
    write_text(folder / "study.html", text)
    return folder / "study.html"


def _cell(value: object) -> str:
    """A cell of the table of trials, for people."""
    if value is None or value != value:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(study: optuna.Study) -> str:
    """How many trials there are, how they ended, and the best, in a sentence or two."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    counts = {state.name.lower(): states.count(state) for state in TrialState if state in states}
    text = f"{len(states)} trials: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + "."
    for trial in best(study, 3):
        chosen = ", ".join(f"{name} = {value}" for name, value in trial.params.items())
        text += f" Trial {trial.number}: {values_text(study, trial.values)} with {chosen}."
    return text + " All values are measured on validation images."
