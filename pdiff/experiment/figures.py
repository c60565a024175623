"""Figures of an evaluation, and the report that explains them: one HTML page that works offline."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import cycle
from math import isnan, nan
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

SPLITS = {"val_accuracy": "validation", "test_accuracy": "test"}
MEASURES = SPLITS | {"max_similarity": "maximum similarity", "nearest_distance": "nearest distance"}

# The "bright" and "muted" schemes of Paul Tol, which colour-blind readers can tell apart.
COLORS = {
    "original": "#4477AA",
    "generated": "#EE6677",
    "noise_0.001": "#66CCEE",
    "noise_0.05": "#228833",
    "noise_0.15": "#CCBB44",
    "average": "#AA3377",
}
OTHER_COLORS = ("#44AA99", "#999933", "#CC6677", "#88CCEE", "#DDCC77", "#882255")

# Without this list a button would offer to upload the figure.
PLOTLY_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}

# Grey on nothing, so that a figure suits a light page and a dark one.
_AXIS = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "#808080", "family": "system-ui, sans-serif", "size": 13},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 10, "r": 10, "t": 80, "b": 10},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#808080", "activecolor": "#4477AA"},
        "hovermode": "closest",
    }
)


def accuracy_against_similarity(evaluation: pd.DataFrame) -> go.Figure:
    """Scatter of the accuracy of each network over its similarity to the nearest original.

    Args:
        evaluation: one row a network: group, index and `MEASURES`. The accuracy is the one on test
            images, or the one on validation images where no network was tested.
    """
    evaluation = _complete(evaluation)
    measured = [name for name in MEASURES if evaluation[name].notna().any()]
    accuracy = "test_accuracy" if "test_accuracy" in measured else "val_accuracy"
    hover = [f"{MEASURES[name]} %{{customdata[{i}]:.4f}}" for i, name in enumerate(measured, 1)]
    figure = _figure(height=520)
    for group, color, rows in _by_group(evaluation, needed=["max_similarity", accuracy]):
        figure.add_scatter(
            x=rows["max_similarity"],
            y=rows[accuracy],
            name=group,
            mode="markers",
            marker={"color": color, "opacity": 0.7, "size": 14 if len(rows) == 1 else 7},
            zorder=-len(rows),  # small groups on top, or they could not be seen
            customdata=rows[["index", *measured]].to_numpy(float),
            hovertemplate="<br>".join(["<b>%{fullData.name} %{customdata[0]}</b>", *hover]) + "<extra></extra>",
        )
    figure.update_xaxes(title="maximum similarity to an original")
    figure.update_yaxes(title=f"{SPLITS[accuracy]} accuracy", tickformat=".2~%")
    return figure


def accuracy_distributions(evaluation: pd.DataFrame) -> go.Figure:
    """Boxes of validation and test accuracy by group, with a point for every network."""
    figure = _figure(height=480, boxmode="group")
    for group, color, rows in _by_group(_complete(evaluation)):
        accuracy = rows.melt(value_vars=list(SPLITS)).dropna()
        if len(accuracy):
            figure.add_box(
                x=accuracy["variable"].map(SPLITS),
                y=accuracy["value"],
                name=group,
                boxpoints="all",
                pointpos=0,
                jitter=0.6,
                line={"color": color, "width": 1.5},
                marker={"color": color, "opacity": 0.35, "size": 4},
            )
    figure.update_yaxes(title="accuracy", tickformat=".2~%")
    return figure


def similarity_heatmap(similarity: np.ndarray, groups: Sequence[str], *, limit: int = 200) -> go.Figure:
    """Heat map of the similarity of every two networks, with lines between the groups.

    Args:
        similarity: IoU of wrong predictions, (N, N).
        groups: the group of each network, N names, equal ones side by side.
        limit: at most so many networks are shown, evenly chosen, to keep the page small.
    """
    figure = _figure(height=560)
    shown = _evenly(len(groups), limit)
    if not len(shown):
        return figure
    members = pd.Series(groups, dtype=str)
    labels = (members + " " + members.groupby(members).cumcount().astype(str)).iloc[shown]
    figure.add_heatmap(
        x=labels.to_numpy(),
        y=labels.to_numpy(),
        z=similarity[np.ix_(shown, shown)].astype(np.float32),
        colorscale="Cividis",
        colorbar={"orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 12},
        hovertemplate="%{y}<br>%{x}<br>similarity %{z:.4f}<extra></extra>",
    )
    positions = pd.Series(range(len(shown))).groupby(members.iloc[shown].to_numpy(), sort=False)
    for start in positions.min().iloc[1:]:
        figure.add_vline(start - 0.5, line_color="white", line_width=2)
        figure.add_hline(start - 0.5, line_color="white", line_width=2)
    middles = labels.iloc[positions.median().astype(int)]
    ticks = {"type": "category", "tickvals": middles.to_numpy(), "ticktext": list(positions.groups)}
    figure.update_xaxes(**ticks, constrain="domain", showgrid=False)
    figure.update_yaxes(**ticks, scaleanchor="x", autorange="reversed", showgrid=False)
    figure.update_yaxes(constrain="domain", constraintoward="top", tickangle=-90)
    return figure


def accuracy_over_time(trajectory: pd.DataFrame) -> go.Figure:
    """Mean accuracy of draws on their way from noise to a network, and the band from the worst to the best.

    Args:
        trajectory: one row for each look at a draw: timestep, draw, and the accuracies that were measured.
    """
    figure = _figure(height=420)
    columns = [column for column in SPLITS if column in trajectory]
    for column, color in zip(columns, COLORS.values(), strict=False):
        accuracy = trajectory.groupby("timestep")[column].agg(["min", "mean", "max"])
        band = {"x": accuracy.index, "line_width": 0, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
        figure.add_scatter(y=accuracy["min"], **band)
        figure.add_scatter(y=accuracy["max"], fill="tonexty", fillcolor=f"rgba{(*_rgb(color), 0.2)}", **band)
        line = {"mode": "lines+markers", "line_color": color, "name": SPLITS[column]}
        figure.add_scatter(x=accuracy.index, y=accuracy["mean"], **line)
    figure.update_xaxes(title="timestep, from noise to a network", autorange="reversed")
    figure.update_yaxes(title="accuracy", tickformat=".2~%")
    return figure


def _rgb(color: str) -> tuple[int, ...]:
    """Red, green and blue of #RRGGBB."""
    return tuple(bytes.fromhex(color[1:]))


def loss_curves(history: pd.DataFrame, *, limit: int = 1000) -> go.Figure:
    """Losses over steps, one plot for each part of the training.

    Args:
        history: name, step, value; of the names only those that end in "loss", as in
            "diffusion/heldout_loss", whose part is "diffusion". What is not finite is left out.
        limit: at most so many points a curve, evenly chosen.
    """
    history = history.astype({"name": str, "step": float, "value": float})
    losses = history[history["name"].str.endswith("loss") & np.isfinite(history["value"])]
    parts = dict(list(losses.groupby(losses["name"].str.split("/").str[0], sort=False)))
    if not parts:
        return _figure()
    figure = make_subplots(rows=len(parts), vertical_spacing=0.3 / len(parts))
    colors = cycle(COLORS.values())
    for row, (part, curves) in enumerate(parts.items(), 1):
        for name, curve in curves.groupby("name", sort=False):
            shown = curve.sort_values("step", kind="stable").iloc[_evenly(len(curve), limit)]
            line = go.Scatter(x=shown["step"], y=shown["value"], name=name, mode="lines", line_color=next(colors))
            figure.add_trace(line, row=row, col=1)
        scale = "log" if (curves["value"] > 0).all() else "linear"
        figure.update_yaxes(title=part, type=scale, nticks=3, row=row, col=1)
    figure.update_xaxes(title="step", row=len(parts), col=1)
    return figure.update_layout(template=TEMPLATE, height=100 + 220 * len(parts), showlegend=True)


def table(evaluation: pd.DataFrame) -> pd.DataFrame:
    """One row a group, in order of appearance: accuracies as fractions, population deviations."""
    groups = _complete(evaluation).groupby("group", sort=False)
    columns = {"networks": groups.size()}
    for split in ("val", "test"):
        accuracy = groups[f"{split}_accuracy"]
        columns[f"{split}_mean"] = accuracy.mean()
        columns[f"{split}_std"] = accuracy.std(ddof=0)
        columns[f"{split}_max"] = accuracy.max()
    columns["max_similarity"] = groups["max_similarity"].mean()
    return pd.DataFrame(columns).reset_index()


def table_text(table: pd.DataFrame) -> str:
    """The `table` as aligned plain text, accuracies in percent."""
    cells = _cells(table).set_index("group")
    return cells.rename_axis(index=None, columns="group").to_string()


def published_table(summary: Mapping[str, float], published: Mapping[str, float]) -> pd.DataFrame:
    """One row for each metric that was published: measure, published, ours, difference; accuracies in percent."""
    rows = []
    for name, value in published.items():
        scale = 100 if "accuracy" in name else 1
        measure = name.replace("_accuracy/", " % ").replace("similarity/", "similarity ").replace("_", " ")
        rows.append((measure, scale * value, scale * summary.get(name, nan)))
    table = pd.DataFrame(rows, columns=["measure", "published", "ours"])
    table["difference"] = table["ours"] - table["published"]
    digits = table["measure"].map(lambda measure: 2 if "%" in measure else 3)
    for column in ("published", "ours", "difference"):
        sign = "+" if column == "difference" else ""
        table[column] = [_number(value, f"{sign}.{d}f") for value, d in zip(table[column], digits, strict=True)]
    return table


def _number(value: float, form: str) -> str:
    """A number as text, a dash for NaN."""
    return "–" if isnan(value) else format(value, form)


def verdict(summary: Mapping[str, Any]) -> str:
    """What the metrics of an evaluation say about the generator, in plain words."""
    sentences = [*(_compare_accuracy(summary, accuracy) for accuracy in SPLITS), _compare_diversity(summary)]
    return " ".join(filter(None, sentences)) or "Too little was measured for a verdict."


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
    """One HTML page: verdict, tables, figures and, where `summary` holds it, the "config" (YAML).

    `published` are published metrics by name, `changes` the keys in which this run differs from what they were
    published for. The other arguments are those of the figures. What has no data is left out.
    """
    figures = {
        "Accuracy against similarity": accuracy_against_similarity(evaluation),
        "Accuracy by group": accuracy_distributions(evaluation),
        "Similarity of networks": similarity_heatmap(similarity, groups),
        "Accuracy on the way": _figure() if trajectory is None else accuracy_over_time(trajectory),
        "Training": loss_curves(history),
    }
    sections = [section(heading, READING[heading], figure) for heading, figure in figures.items() if figure.data]
    config = escape(summary.get("config", ""))
    return page(
        title=title,
        verdict=verdict(summary),
        table=_cells(table(evaluation)).to_html(index=False, border=0),
        sections=[_published_section(summary, published or {}, changes or {}), *sections],
        more=config and f"<details><summary>Configuration</summary><pre>{config}</pre></details>",
    )


def page(*, title: str, verdict: str, table: str, sections: Sequence[str], more: str = "", style: str = "") -> str:
    """One HTML page that works offline.

    Args:
        title: text.
        verdict: text that stands first.
        table: HTML.
        sections: HTML each, such as `section` makes it.
        more: HTML at the foot.
        style: CSS beside that of all pages.
    """
    texts = {"title": escape(title), "verdict": escape(verdict), "style": STYLE + style, "plotly": get_plotlyjs()}
    return PAGE.format(**texts, table=table, sections="\n".join(sections), config=more)


def _complete(evaluation: pd.DataFrame) -> pd.DataFrame:
    """The evaluation with every measure as float, NaN where it was not taken."""
    return evaluation.reindex(columns=["group", "index", *MEASURES]).astype(dict.fromkeys(MEASURES, float))


def _by_group(evaluation: pd.DataFrame, needed: Sequence[str] = ()) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Each group, its colour, and those of its rows that have what is needed, in a fixed order."""
    groups = dict(list(evaluation.groupby("group", sort=False)))
    others = [group for group in groups if group not in COLORS]
    for group, color in [*COLORS.items(), *zip(others, cycle(OTHER_COLORS), strict=False)]:
        if group in groups and len(rows := groups[group].dropna(subset=list(needed))):
            yield group, color, rows


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the indices below `count`, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)


def _figure(**layout: object) -> go.Figure:
    """An empty figure in the common look."""
    return go.Figure(layout={"template": TEMPLATE, "showlegend": True, **layout})


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """The `table` as text for people, accuracies in percent."""
    cells = {"group": table["group"], "networks": table["networks"].astype(str)}
    for split, word in {"val": "validation", "test": "test"}.items():
        mean, std = (_text(table[f"{split}_{stat}"], 100, 2) for stat in ("mean", "std"))
        cells[f"{word} %"] = mean + " ± " + std
        cells[f"max {word}"] = _text(table[f"{split}_max"], 100, 2)
    cells["max similarity"] = _text(table["max_similarity"], 1, 3)
    return pd.DataFrame(cells).replace("– ± –", "–")


def _text(values: pd.Series, scale: float, digits: int) -> pd.Series:
    """Scaled numbers with so many digits after the point, a dash for NaN."""
    return values.map(lambda value: _number(scale * value, f".{digits}f")).astype(str)


def _compare_accuracy(summary: Mapping[str, Any], accuracy: str) -> str:
    """How generated networks compare with the originals and with every baseline, on one split."""
    names = [key for key in summary if key.startswith(f"{accuracy}/") and key.endswith("_mean")]
    means = {key.removeprefix(f"{accuracy}/").removesuffix("_mean"): summary[key] for key in names}
    means = {group: mean for group, mean in means.items() if not isnan(mean)}
    generated, original = means.pop("generated", nan), means.pop("original", nan)
    if isnan(generated) or isnan(original):
        return ""
    comparison = "at least as accurate as" if generated >= original else "less accurate than"
    text = (
        f"On {SPLITS[accuracy]} images the generated networks are, on average, {comparison} the originals "
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
        "Networks that draws would be if their denoising stopped there. The line is their mean, the band reaches "
        "from the worst to the best."
    ),
    "Training": (
        "Every curve should have flattened by its end; a held-out loss that rises while the loss falls "
        "means that the diffusion model memorises its checkpoints."
    ),
}


def _published_section(summary: Mapping[str, Any], published: Mapping[str, float], changes: Mapping[str, Any]) -> str:
    """Published numbers beside the measured ones, and what was done otherwise; nothing where none were published."""
    if not published:
        return ""
    differs = ", ".join(f"{key}={value}" for key, value in changes.items())
    note = f"This run differs from the published experiment in: {differs}." if differs else PUBLISHED_READING
    rows = published_table(summary, published).to_html(index=False, border=0)
    return f'<section><h2>Published</h2><p>{escape(note)}</p><div class="scroll">{rows}</div></section>'


def section(heading: str, reading: str, figure: go.Figure, *, key: str = "") -> str:
    """A figure under its heading and a sentence on how to read it; `key` is its identifier in the page."""
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=key or heading.lower().replace(" ", "-"),
        config=PLOTLY_CONFIG,
    )
    return f"<section><h2>{escape(heading)}</h2>\n<p>{escape(reading)}</p>\n{plot}</section>"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
<div class="scroll">{table}</div>
{sections}
{config}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --page: #ffffff; --card: #f6f8fa; --accent: #4477aa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --page: #14181d; --card: #1c2229; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.25rem; }
section p { color: var(--soft); margin: 0 0 0.5rem; }
.verdict { background: var(--card); border-left: 4px solid var(--accent); padding: 0.8rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.95em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.5rem; text-align: right !important; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left !important; }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); padding: 1rem; overflow-x: auto; }
/* Plotly writes colours into each element; these suit the page, light or dark. */
.infolayer text, .xaxislayer-above text, .yaxislayer-above text { fill: var(--ink) !important; }
"""
