"""Reports: the text and tables of an evaluation, and HTML pages that work offline.

Importing this module imports no plotly; a page imports it for its figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from pdiff.experiment import board
from pdiff.experiment.metrics import (
    COLORS,
    MISSING,
    OTHER_COLORS,
    STATISTICS,
    SYMBOLS,
    Style,
    by_part,
    family,
    find,
    in_tables,
    is_null_arm,
    label,
    styles,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from markupsafe import Markup

NOTHING = pd.DataFrame({"group": []})
STD = " ± "  # between the two statistics of one column

PUBLISHED_READING = "Published results chose their settings on test images; ours choose on validation images alone."
READING = {
    "Leaderboard": (
        "The first has the largest share of networks that are novel and performant: as accurate as held-out networks, "
        "and at least half as far from the nearest fitted one; at equal shares accuracy decides. A generator below "
        "a null arm is not worth its cost. Z_U far below 0 means copies."
    ),
    "Groups": (
        "A row for each group of networks; hover over a heading for what it measures. The arms below the generated "
        "networks need no generator: a generator has to be better than all of them at the same novelty."
    ),
    "Accuracy against novelty": (
        "Higher is more accurate, further right is further from every network that the generator was fitted on. "
        "Bars are 95 % intervals, faint points single networks. A generator is worth its cost above and to the right "
        "of the dotted line, which joins the best null arms. Arms far below may lie outside: double-click to see all."
    ),
    "Distance to the nearest fitted network": (
        "Left of the fitted networks' own distances lie copies. Generated networks should lie where held-out ones do; "
        "a fitted network is compared with its nearest neighbour."
    ),
    "Latent space": (
        "The networks on the two main axes of the fitted ones. Generated networks should fill the same region, "
        "neither gather in its middle nor sit on single points. Click a null arm in the legend to show it."
    ),
    "Spread by component": (
        "At 1 a group varies as much along an axis as the fitted networks do; below, it has collapsed towards their "
        "mean. The axes that matter most stand on the left."
    ),
    "Votes": (
        "Networks that differ gain from voting. A curve that stays flat means that the networks make the same mistakes."
    ),
    "Calibration": "On the dotted line confidence equals accuracy; below it, networks are too sure of themselves.",
    "Statistics of each tensor": (
        "Each point is a tensor; hover over it for its name. Where its numbers are spread as in the originals, the "
        "shift of their mean is 0 and the ratio of their standard deviations 1."
    ),
    "Accuracy against similarity": (
        "Similarity is the overlap (IoU) of a network's mistakes with those of the most similar original; compare it "
        "at equal accuracy. Click a name to hide a group, double-click to show it alone; double-click the plot to see "
        "groups far below."
    ),
    "Accuracy by group": (
        "A box holds the middle half of a group, its line is the median, and each point is a network. "
        "Grey boxes are validation images, coloured ones test images, where there are both."
    ),
    "Similarity of networks": (
        "Brighter means that two networks make the same mistakes. If the square of the generated networks is brighter "
        "than that of the originals, generated networks vary less."
    ),
    "Training": (
        "Every curve should have flattened by its end. A held-out loss that rises while the loss falls, or a nearest "
        "ratio that falls, means that the generator memorises; a dispersion far below 1, that it collapses."
    ),
    "Accuracy on the way": (
        "The networks that would result if sampling stopped at a timestep. The line is their mean, the band reaches "
        "from the worst to the best."
    ),
    "Control": (
        "Each point is a network that was asked for an accuracy on validation images. On the dotted line it has it; a "
        "flat cloud means that the generator does not care."
    ),
    "Warm starts": (
        "Mean validation accuracy in % after so many steps of training. A generator is worth its cost as a beginning "
        "where its networks are sooner as accurate as the originals than newly initialised ones."
    ),
    "Comparisons": (
        "Differences of mean accuracy with 95 % intervals; p is adjusted for all comparisons (Holm). "
        "A triangle to the right is better, one to the left worse, and an open circle no difference."
    ),
    "Costs": "Seconds of every stage, on a logarithmic axis, beside those of training as many networks.",
    "Published": PUBLISHED_READING,
}
"""Heading of a section -> how to read it, in the order of the page."""


# -- tables and text, for the terminal and for pages


def table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One row a group, in the order of `styles`: networks, `<metric>_<statistic>` as fractions, NaN where missing."""
    metrics = in_tables()
    complete = evaluation.reindex(columns=["group", *metrics]).astype(dict.fromkeys(metrics, float))
    groups = complete.groupby("group", sort=False)
    columns = {"networks": groups.size()}
    for name, metric in metrics.items():
        for statistic in STD.join(metric.columns).split(STD) if metric.columns else ():
            columns[f"{name}_{statistic}"] = groups[name].agg(STATISTICS[statistic])
    return pd.DataFrame(columns).reindex(list(styles(evaluation["group"]))).rename_axis("group").reset_index()


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """The `table` as text for people, in the units and under the headings of its metrics."""
    columns = {"group": table["group"], "networks": table["networks"].astype(str)}
    for name, metric in in_tables().items():
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


def comparisons_table(comparisons: pd.DataFrame) -> pd.DataFrame:
    """The comparisons as text: differences with their intervals in points."""
    text = partial(find("test_accuracy").text, sign="+")
    numbers = comparisons[["difference", "low", "high"]].itertuples(index=False)
    shown = comparisons[["group", "against", "question", "part"]].astype(str)
    shown["difference, points"] = [f"{text(middle)} [{text(low)}, {text(high)}]" for middle, low, high in numbers]
    shown["p"] = comparisons["p"].map(lambda p: MISSING if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}")
    return shown.assign(verdict=comparisons["verdict"])


def warm_start_table(table: pd.DataFrame) -> pd.DataFrame:
    """Warm starts as text: a row for each group, a column for each number of steps."""
    wide = table.pivot(index="group", columns="steps", values="accuracy").reindex(table["group"].unique())
    return wide.map(find("val_accuracy").text).rename(columns=lambda steps: f"{steps} steps").reset_index()


def costs_table(costs: pd.DataFrame) -> pd.DataFrame:
    """The cost ledger as text."""
    formats = {"seconds": ",.1f", "memory_mb": ",.0f", "networks": ",.0f", "seconds_per_network": ",.3g"}
    headings = {"seconds": "seconds", "memory_mb": "memory, MB", "seconds_per_network": "seconds a network"}
    shown = pd.DataFrame({"stage": costs["stage"]})
    for name, form in formats.items():
        if name in costs:
            shown[headings.get(name, name)] = [MISSING if v != v else f"{v:{form}}" for v in costs[name]]
    return shown.assign(note=costs["note"].fillna("")) if "note" in costs else shown


# -- pages


class Section(NamedTuple):
    """A part of a page, under its heading and a sentence on how to read it.

    Attributes:
        heading: of the section.
        reading: how to read it.
        key: its identifier in the page, and the name of its data when they are downloaded.
        html: a figure; empty where there is only a table.
        table: of text, whose first column names the rows.
        data: the numbers as a `data:` link to a CSV file; empty where there are none.
    """

    heading: str
    reading: str
    key: str
    html: Markup | str = ""
    table: pd.DataFrame | None = None
    data: str = ""


def section(
    heading: str,
    reading: str,
    figure: go.Figure | None = None,
    data: pd.DataFrame | None = None,
    table: pd.DataFrame | None = None,
    *,
    key: str = "",
) -> Section:
    """A figure, a table of text, or both, with the numbers behind them; `key` is made from the heading by default."""
    key, html = key or re.sub(r"\W+", "-", heading.lower()).strip("-"), ""
    if figure is not None and figure.data:
        from markupsafe import Markup

        from pdiff.experiment.figures import PLOTLY_CONFIG

        html = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config=PLOTLY_CONFIG,
            div_id=key,
            default_height="min(35rem, 115vw)",  # where the figure has none: as a heat map, which is square
        )
        html = Markup(html)
    return Section(heading, reading, key, html, table, "" if data is None else csv_link(data))


def csv_link(frame: pd.DataFrame) -> str:
    """A table as a link that holds it (RFC 2397), with five significant digits; it works without a network."""
    return "data:text/csv;charset=utf-8," + quote(frame.to_csv(index=False, float_format="%.5g"), safe=",.-_+:")


def page(template: str, *, plots: Sequence[Section] = (), **values: Any) -> str:
    """Render one of the templates: an HTML page that works offline, with plotly.js inlined where there are figures.

    Args:
        template: name of a file in `templates/`, without ".html.j2".
        plots: the sections of the page.
        values: what the template needs beside them; `title` and `findings`, a text or several, of all pages. `marks`
            are the styles of groups that tables name, `hints` explain headings of columns.
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
    if any(shown.html for shown in plots):
        from plotly.offline import get_plotlyjs

        plotlyjs = Markup(get_plotlyjs())
    values = {"marks": {}, "hints": {}, "glyphs": SYMBOLS} | values
    return templates.get_template(f"{template}.html.j2").render(values, plots=plots, plotlyjs=plotlyjs)


def report(
    *,
    title: str,
    verdict: Sequence[str],
    tables: Mapping[str, pd.DataFrame],
    similarity: np.ndarray,
    groups: Sequence[str],
    history: pd.DataFrame,
    trajectory: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    changes: Mapping[str, Any] | None = None,
    config: str = "",
    lineage: Sequence[tuple[str, str, str]] = (),
) -> str:
    """The page of an audit: the verdict, then tables and figures. What has no data is left out.

    Args:
        title: of the page, as the tag.
        verdict: sentences that answer whether the generator is worth its cost, the first thing on the page.
        tables: by name, in long form, fractions rather than percent, NaN where nothing was measured:
            evaluation: group, index, and a column for each metric of networks; one row a network.
            front: as of `figures.front`; one row for each group and part.
            comparisons: question, group, against, part, difference, low, high, p (adjusted), verdict.
            votes: group, part, networks, accuracy, nll, ece.
            calibration: group, part, confidence, accuracy, count.
            latents: group, index, component_1, component_2.
            spectrum: group, component, variance_share, rms_ratio.
            layers: group, tensor, mean, std.
            costs: stage, seconds, memory_mb, networks, seconds_per_network, note.
            control: as of `figures.control`, where networks were asked for accuracies.
            warm_start: group, steps, accuracy, where networks were trained on.
            board: as of `board.board`, where several generators are compared.
        similarity: IoU of errors of every two networks, (N, N).
        groups: the group of each of these networks, N names, equal ones side by side.
        history: name, step, value of everything that was logged while training.
        trajectory: as of `figures.accuracy_over_time`.
        published: as `published_table` makes it.
        changes: the keys in which this run differs from what was published.
        config: the configuration (YAML).
        lineage: what the run was made from: label, text, address (empty for none).
    """
    from pdiff.experiment import figures

    given = {name: frame for name, frame in tables.items() if len(frame)}
    changed = ", ".join(f"{key}={value}" for key, value in (changes or {}).items())
    readings = READING | (
        {"Published": f"This run differs from the published experiment in: {changed}."} if changed else {}
    )
    found = [
        *_about_groups(figures, given),
        *_about_networks(figures, given, similarity, groups),
        *_about_the_run(figures, given, history, trajectory, published),
    ]
    return page(
        "evaluation",
        title=title,
        findings=verdict,
        hints={metric.title(column): metric.hint for metric in in_tables().values() for column in metric.columns},
        marks=styles(given["evaluation"]["group"]) if "evaluation" in given else {},
        plots=[section(shown.heading, readings[shown.heading], *shown[1:]) for shown in found if shown.something()],
        config=config,
        lineage=lineage,
    )


class Shown(NamedTuple):
    """What a section of the report shows: a figure, the numbers in it, and a table of text."""

    heading: str
    figure: go.Figure | None = None
    data: pd.DataFrame | None = None
    table: pd.DataFrame | None = None

    def something(self) -> bool:
        """Whether there is anything to show."""
        return self.table is not None or (self.figure is not None and bool(self.figure.data))


OF_GROUPS = {
    "Latent space": "latents",
    "Spread by component": "spectrum",
    "Votes": "votes",
    "Calibration": "calibration",
    "Statistics of each tensor": "layers",
}
"""Heading -> table that a figure of the same name shows, and nothing else."""


def _about_groups(figures: Any, tables: Mapping[str, pd.DataFrame]) -> Iterator[Shown]:
    """What decides: the table of groups, the front, distances, and how groups differ in kind."""
    if "board" in tables:
        yield Shown("Leaderboard", data=tables["board"], table=board.cells(tables["board"]))
    networks = figures.thinned(tables.get("evaluation", NOTHING))
    if len(networks):
        wide = table(tables["evaluation"])
        text = cells(wide)
        first = ["group", "networks", *(metric.title(metric.columns[0]) for metric in in_tables().values())]
        yield Shown("Groups", data=wide, table=text[[name for name in first if (text[name] != MISSING).any()]])
    if "front" in tables:
        yield Shown("Accuracy against novelty", figures.front(tables["front"], networks), tables["front"])
    yield Shown(
        "Distance to the nearest fitted network", figures.distances(networks), some(networks, "nearest_distance")
    )
    for heading, name in OF_GROUPS.items():
        if name in tables:
            frame = figures.less_crowded(tables[name])
            frame = figures.thinned(frame) if name == "latents" else frame
            frame = figures.thinned_components(frame) if name == "spectrum" else frame
            yield Shown(heading, getattr(figures, name)(frame), frame)


def _about_networks(
    figures: Any, tables: Mapping[str, pd.DataFrame], similarity: np.ndarray, groups: Sequence[str]
) -> Iterator[Shown]:
    """Accuracy and similarity of single networks."""
    networks = figures.thinned(tables.get("evaluation", NOTHING))
    accuracies = list(by_part("accuracy").values())
    scatter, data = figures.accuracy_against_similarity(networks), some(networks, *accuracies, "max_similarity")
    yield Shown("Accuracy against similarity", scatter, data)
    yield Shown("Accuracy by group", figures.accuracy_distributions(networks), some(networks, *accuracies))
    heatmap = figures.similarity_heatmap(similarity, groups)
    for drawn in heatmap.data:
        data = (
            pd.DataFrame(drawn.z.round(3), columns=drawn.x).assign(network=drawn.x).set_index("network").reset_index()
        )
        yield Shown("Similarity of networks", heatmap, data)


def _about_the_run(
    figures: Any,
    tables: Mapping[str, pd.DataFrame],
    history: pd.DataFrame,
    trajectory: pd.DataFrame | None,
    published: pd.DataFrame | None,
) -> Iterator[Shown]:
    """Training, sampling, comparisons, costs, and what was published."""
    curves = figures.thinned(history, 500, by="name")
    yield Shown("Training", figures.loss_curves(curves), curves)
    if trajectory is not None:
        yield Shown("Accuracy on the way", figures.accuracy_over_time(trajectory), trajectory)
    if "control" in tables:
        yield Shown("Control", figures.control(tables["control"]), tables["control"])
    if "warm_start" in tables:
        yield Shown("Warm starts", data=tables["warm_start"], table=warm_start_table(tables["warm_start"]))
    if "comparisons" in tables:
        found = tables["comparisons"]
        yield Shown("Comparisons", figures.forest(found), found, comparisons_table(found))
    if "costs" in tables:
        yield Shown("Costs", figures.costs(tables["costs"]), tables["costs"], costs_table(tables["costs"]))
    yield Shown("Published", table=published)


def some(networks: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Group, index, and those of some columns that there are."""
    return networks[[name for name in ("group", "index", *columns) if name in networks]]


# -- several runs


COMPARING = {
    "Accuracy against novelty": (
        "A colour for each run; generators and the null arms on the front of their run. Bars are 95 % intervals, faint "
        "points single generated networks. Runs on other data or other originals compare by their distance to their "
        "own null arms alone."
    ),
    "Votes": "Networks that differ gain from voting: compare how much each curve rises, and where it ends.",
    "Costs": "Seconds of every stage, on a logarithmic axis, a colour for each run.",
    "Configurations": "The keys in which the runs differ.",
}
"""Heading of a section of `compare_page` -> how to read it."""


def compare_page(runs: Mapping[str, Mapping[str, pd.DataFrame]], differences: pd.DataFrame) -> str:
    """Several audits on one page: their fronts, votes and costs, and what differs in their configurations.

    Args:
        runs: label of a run -> its tables, as `report` takes them; any may be absent or empty.
        differences: as text, a row for each key that differs, whose name is in the first column, a column for each run.
    """
    from pdiff.experiment import figures

    decisive = {label: _decisive(tables) for label, tables in runs.items()}
    colors = [*COLORS.values(), *OTHER_COLORS]
    looks = {
        f"{label}: {group}": Style(colors[k % len(colors)], style.symbol)
        for k, (label, groups) in enumerate(decisive.items())
        for group, style in styles(groups).items()
    }
    of_runs = {label: Style(colors[k % len(colors)], "circle") for k, label in enumerate(runs)}
    front, votes, networks = (_joined(runs, name, decisive) for name in ("front", "votes", "evaluation"))
    networks = networks[~networks["arm"]] if len(networks) else networks
    spent = [tables["costs"].assign(group=label) for label, tables in runs.items() if "costs" in tables]
    costs = pd.concat(spent) if spent else NOTHING.assign(stage=[], seconds=[])
    found = [
        Shown("Accuracy against novelty", figures.front(front, figures.thinned(networks), looks=looks), front),
        Shown("Votes", figures.votes(votes, looks=looks), votes),
        Shown("Costs", figures.costs(costs, looks=of_runs), costs),
        Shown("Configurations", data=differences, table=differences if len(differences) else None),
    ]
    return page(
        "evaluation",
        title=f"Comparison of {len(runs)} runs",
        findings=", ".join(runs),
        plots=[section(shown.heading, COMPARING[shown.heading], *shown[1:]) for shown in found if shown.something()],
        config="",
        lineage=(),
    )


def _decisive(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The groups of a run that are compared with those of other runs: generators, and the arms on its front."""
    front = tables.get("front", NOTHING)
    best = set(front["group"][front["on_front"].astype(bool)]) if "on_front" in front else set()
    groups = {group for name in ("front", "votes") for group in tables.get(name, NOTHING)["group"]}
    return sorted(group for group in groups if group in best or family(group) in ("generated", "named"))


def _joined(
    runs: Mapping[str, Mapping[str, pd.DataFrame]], name: str, decisive: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """One table of all runs: rows of their decisive groups, "<label>: <group>", and whether it is a null arm."""
    parts = []
    for run, tables in runs.items():
        rows = tables.get(name, NOTHING)
        rows = rows[rows["group"].isin(decisive[run])].drop(columns="on_front", errors="ignore")
        arms = [is_null_arm(group) for group in rows["group"]]
        parts.append(rows.assign(group=run + ": " + rows["group"].astype(str), arm=arms))
    return pd.concat([part for part in parts if len(part)] or [NOTHING], ignore_index=True)
