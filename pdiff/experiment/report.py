"""Reports: the text and tables of an evaluation, and HTML pages that work offline.

Importing this module imports no plotly; a page imports it for its figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isnan, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pdiff.experiment.metrics import MISSING, STATISTICS, by_part, find, label, of_networks

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from markupsafe import Markup

STD = " ± "  # between the two statistics of one column

PUBLISHED_READING = "Published results chose their settings on test images; ours choose on validation images alone."
READING = {
    "Accuracy against similarity": (
        "Each point is a network; similarity is the overlap (IoU) of its mistakes with those of the "
        "most similar original. A generator is worth its cost where its points lie as high as the "
        "originals but further left than noise and averages of the same accuracy. "
        "Click a name to hide a group, double-click to show it alone."
    ),
    "Accuracy by group": (
        "A box holds the middle half of a group, its line is the median, and each point is a network. "
        "Compare the generated networks with the originals and with the groups that need no generator."
    ),
    "Similarity of networks": (
        "Brighter means that two networks make the same mistakes. Compare the two squares on the "
        "diagonal: if the generated one is brighter, generated networks vary less than the originals."
    ),
    "Accuracy on the way": (
        "The networks that would result if sampling stopped at a timestep. The line is their mean, the band reaches "
        "from the worst to the best."
    ),
    "Training": (
        "Every curve should have flattened by its end; a held-out loss that rises while the loss falls "
        "means that the diffusion model memorises its checkpoints."
    ),
}
"""Heading of a figure -> how to read it."""


# -- tables and text, for the terminal and for pages


def table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One row a group, in order of appearance: networks, and `<metric>_<statistic>` as fractions, NaN where missing."""
    metrics = of_networks()
    complete = evaluation.reindex(columns=["group", *metrics]).astype(dict.fromkeys(metrics, float))
    groups = complete.groupby("group", sort=False)
    columns = {"networks": groups.size()}
    for name, metric in metrics.items():
        for statistic in STD.join(metric.columns).split(STD) if metric.columns else ():
            columns[f"{name}_{statistic}"] = groups[name].agg(STATISTICS[statistic])
    return pd.DataFrame(columns).reset_index()


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """The `table` as text for people, in the units and under the headings of its metrics."""
    columns = {"group": table["group"], "networks": table["networks"].astype(str)}
    for name, metric in of_networks().items():
        for column in metric.columns:
            parts = [table[f"{name}_{statistic}"].map(metric.text) for statistic in column.split(STD)]
            columns[metric.title(column)] = [STD.join(row) for row in zip(*parts, strict=True)]
    return pd.DataFrame(columns).replace(STD.join([MISSING] * 2), MISSING)


def published_table(summary: Mapping[str, float], published: Mapping[str, float]) -> pd.DataFrame:
    """One row for each published metric, as text: measure, published, ours, difference."""
    rows = []
    for name, theirs in published.items():
        metric, ours = find(name), summary.get(name, nan)
        rows.append((label(name), metric.text(theirs), metric.text(ours), metric.text(ours - theirs, sign="+")))
    return pd.DataFrame(rows, columns=["measure", "published", "ours", "difference"])


def findings(summary: Mapping[str, Any]) -> str:
    """What the metrics of an evaluation say about the generator, in sentences."""
    sentences = [_compare_accuracy(summary, part, name) for part, name in by_part("accuracy").items()]
    return (
        " ".join(filter(None, [*sentences, _compare_diversity(summary)]))
        or "Too little was measured to compare the groups."
    )


def _compare_accuracy(summary: Mapping[str, Any], part: str, accuracy: str) -> str:
    """How accurate generated networks are beside the originals and every baseline, on one part of the images."""
    names = [key for key in summary if key.startswith(f"{accuracy}/") and key.endswith("_mean")]
    means = {key.removeprefix(f"{accuracy}/").removesuffix("_mean"): summary[key] for key in names}
    means = {group: mean for group, mean in means.items() if not isnan(mean)}
    generated, original = means.pop("generated", nan), means.pop("original", nan)
    if isnan(generated) or isnan(original):
        return ""
    comparison = "at least as accurate as" if generated >= original else "less accurate than"
    text = (
        f"On {part} images the generated networks are, on average, {comparison} the originals "
        f"({generated:.2%} against {original:.2%})"
    )
    for phrase, wanted in {"they beat": True, "they do not beat": False}.items():
        baselines = [f"{g} ({m:.2%})" for g, m in means.items() if (generated > m) == wanted]
        if baselines:
            text += f"; {phrase} {', '.join(baselines)}"
    return text + "."


def _compare_diversity(summary: Mapping[str, Any]) -> str:
    """How alike the generated networks are, among themselves and to the originals."""
    names = ("generated_generated", "original_original", "original_generated_max")
    generated, original, nearest = (summary.get(f"similarity/{name}", nan) for name in names)
    text = ""
    if not (isnan(generated) or isnan(original)):
        comparison = "less diverse than" if generated > original else "at least as diverse as"
        text = (
            f"Among themselves they are {comparison} the originals "
            f"(mean similarity {generated:.3f} against {original:.3f})."
        )
    if not isnan(nearest):
        text += f" The nearest original has, on average, a similarity of {nearest:.3f}."
    return text.strip()


# -- pages


class Plot(NamedTuple):
    """A figure in a page, under its heading and a sentence on how to read it."""

    heading: str
    reading: str
    html: Markup


def plot(heading: str, reading: str, figure: go.Figure, *, key: str = "") -> Plot:
    """A figure for a page; `key` is its identifier there, the heading by default."""
    from markupsafe import Markup

    from pdiff.experiment.figures import PLOTLY_CONFIG

    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=PLOTLY_CONFIG,
        div_id=key or heading.lower().replace(" ", "-"),
        default_height="min(35rem, 115vw)",  # where the figure has none: as a heat map, which is square
    )
    return Plot(heading, reading, Markup(html))


def page(template: str, *, plots: Sequence[Plot] = (), **values: Any) -> str:
    """Render one of the templates: an HTML page that works offline, with plotly.js inlined where there are plots.

    Args:
        template: name of a file in `templates/`, without ".html.j2".
        plots: the figures of the page.
        values: what the template needs beside them; `title` and `findings` of all pages.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("pdiff.experiment"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotlyjs = ""
    if plots:
        from plotly.offline import get_plotlyjs

        plotlyjs = Markup(get_plotlyjs())
    return templates.get_template(f"{template}.html.j2").render(values, plots=plots, plotlyjs=plotlyjs)


def report(
    *,
    title: str,
    summary: Mapping[str, Any],
    evaluation: pd.DataFrame,
    similarity: np.ndarray,
    groups: Sequence[str],
    history: pd.DataFrame,
    trajectory: pd.DataFrame | None = None,
    published: Mapping[str, float] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> str:
    """The page of an evaluation: findings, tables, figures and, where `summary` holds it, the "config" (YAML).

    `published` are published metrics by name, `changes` the keys in which this run differs from what they were
    published for. The other arguments are those of the figures. What has no data is left out.
    """
    changed = ", ".join(f"{key}={value}" for key, value in (changes or {}).items())
    return page(
        "evaluation",
        title=title,
        findings=findings(summary),
        table=cells(table(evaluation)),
        hints={metric.title(column): metric.hint for metric in of_networks().values() for column in metric.columns},
        published=published_table(summary, published) if published else None,
        note=f"This run differs from the published experiment in: {changed}." if changed else PUBLISHED_READING,
        plots=list(_plots(evaluation, similarity, groups, history, trajectory)),
        config=summary.get("config", ""),
    )


def _plots(
    evaluation: pd.DataFrame,
    similarity: np.ndarray,
    groups: Sequence[str],
    history: pd.DataFrame,
    trajectory: pd.DataFrame | None,
) -> Iterator[Plot]:
    """The figures of an evaluation that have something to show."""
    from pdiff.experiment import figures

    found = [
        figures.accuracy_against_similarity(evaluation),
        figures.accuracy_distributions(evaluation),
        figures.similarity_heatmap(similarity, groups),
        figures.accuracy_over_time(pd.DataFrame({"timestep": []}) if trajectory is None else trajectory),
        figures.loss_curves(history),
    ]
    for (heading, reading), figure in zip(READING.items(), found, strict=True):
        if figure.data:
            yield plot(heading, reading, figure)
