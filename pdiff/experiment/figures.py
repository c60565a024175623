"""The figures of reports, as plotly figures. Importing this module imports plotly: do so where a figure is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pdiff.experiment.metrics import COLORS, COMPARED, DIAGNOSTICS, OTHER_COLORS, by_part, colors, find, of_networks

# Without this list a button would offer to upload the figure.
PLOTLY_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
}

# Grey on nothing, so that a figure suits a light page and a dark one.
_AXIS = {
    "gridcolor": "rgba(128,128,128,0.25)",
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 10},  # beyond the longest label
}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "#808080", "family": "system-ui, sans-serif", "size": 13},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#808080", "activecolor": "#4477AA"},
        "hovermode": "closest",
    }
)


SYMBOLS = {"published": ("circle-open", "diamond-open", "dot"), "ours": ("circle", "diamond", "solid")}
"""Side of the leaderboard -> marker, marker of the difference, line."""


def accuracy_against_similarity(evaluation: pd.DataFrame) -> go.Figure:
    """Scatter of the accuracy of each network over its similarity to the nearest original.

    Args:
        evaluation: one row a network: group, index and metrics. The accuracy is the one on test images, or the one on
            validation images where no network was tested.
    """
    measured = {name: metric for name, metric in of_networks().items() if _has(evaluation, name)}
    parts = by_part("accuracy")
    accuracy = parts["test"] if parts["test"] in measured else parts["validation"]
    hover = [f"{metric.label} %{{customdata[{i}]:.4f}}" for i, metric in enumerate(measured.values(), 1)]
    figure = _figure(height=520)
    if {"max_similarity", accuracy} <= measured.keys():
        for group, color, rows in _by_group(evaluation, needed=["max_similarity", accuracy]):
            figure.add_scatter(
                x=rows["max_similarity"],
                y=rows[accuracy],
                name=group,
                mode="markers",
                marker={"color": color, "opacity": 0.7, "size": 14 if len(rows) == 1 else 7},
                zorder=-len(rows),  # small groups on top, where they can be seen
                customdata=rows[["index", *measured]].to_numpy(float),
                hovertemplate="<br>".join(["<b>%{fullData.name} %{customdata[0]}</b>", *hover]) + "<extra></extra>",
            )
    figure.update_xaxes(title=f"{find('max_similarity').label} to an original")
    return figure.update_yaxes(title=find(accuracy).label, tickformat=".2~%")


def accuracy_distributions(evaluation: pd.DataFrame) -> go.Figure:
    """Boxes of validation and test accuracy by group, with a point for every network."""
    figure = _figure(height=480, boxmode="group")
    accuracies = {name: part for part, name in by_part("accuracy").items() if _has(evaluation, name)}
    for group, color, rows in _by_group(evaluation):
        values = rows[list(accuracies)].melt().dropna()
        if len(values):
            figure.add_box(
                x=values["variable"].map(accuracies),
                y=values["value"],
                name=group,
                boxpoints="all",
                pointpos=0,
                jitter=0.6,
                line={"color": color, "width": 1.5},
                marker={"color": color, "opacity": 0.35, "size": 4},
            )
    return figure.update_yaxes(title="accuracy", tickformat=".2~%")


def similarity_heatmap(similarity: np.ndarray, groups: Sequence[str], *, limit: int = 200) -> go.Figure:
    """Heat map of the similarity of every two networks, with lines between the groups.

    Args:
        similarity: IoU of errors, (N, N).
        groups: the group of each network, N names, equal ones side by side.
        limit: at most this many networks are shown, evenly chosen, to keep the page small.
    """
    figure = _figure()
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
    """Accuracy of networks that are being sampled, from noise to the last step: mean, and a band from worst to best.

    Args:
        trajectory: one row for each intermediate state: timestep, index of the sample, and the accuracies that were
            measured. Of a single timestep nothing is shown.
    """
    figure = _figure(height=420)
    measured = {part: name for part, name in by_part("accuracy").items() if _has(trajectory, name)}
    timesteps = trajectory.groupby("timestep")
    for (part, name), color in zip(measured.items(), COLORS.values(), strict=False):
        if len(timesteps) > 1:
            accuracy = timesteps[name].agg(["min", "mean", "max"])
            band = {"x": accuracy.index, "line_width": 0, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
            transparent = f"rgba{(*bytes.fromhex(color[1:]), 0.2)}"
            figure.add_scatter(y=accuracy["min"], **band)
            figure.add_scatter(y=accuracy["max"], fill="tonexty", fillcolor=transparent, **band)
            line = {"mode": "lines+markers", "line_color": color, "name": part}
            figure.add_scatter(x=accuracy.index, y=accuracy["mean"], **line)
    figure.update_xaxes(title="timestep, from noise to a network", autorange="reversed")
    return figure.update_yaxes(title="accuracy", tickformat=".2~%")


def loss_curves(history: pd.DataFrame, *, limit: int = 1000) -> go.Figure:
    """Losses over steps, one plot for each part of the training, and a small one for each of DIAGNOSTICS.

    Curves of a single point are left out.

    Args:
        history: name, step, value; of the names only DIAGNOSTICS and those that end in "loss", as in
            "diffusion/heldout_loss", whose part is "diffusion". Values that are not finite are left out.
        limit: at most this many points a curve, evenly chosen.
    """
    history = history.astype({"name": str, "step": float, "value": float})
    alarms = history["name"].isin(DIAGNOSTICS)
    shown = history[(history["name"].str.endswith("loss") | alarms) & np.isfinite(history["value"])]
    shown = shown[shown.groupby("name")["step"].transform("nunique") > 1]
    plot = shown["name"].where(alarms, shown["name"].str.split("/").str[0])
    parts = dict(sorted(shown.groupby(plot, sort=False), key=lambda item: item[0] in DIAGNOSTICS))
    if not parts:
        return _figure()
    heights = [110 if part in DIAGNOSTICS else 220 for part in parts]
    figure = make_subplots(rows=len(parts), row_heights=heights, vertical_spacing=0.3 / len(parts))
    line_colors = cycle(COLORS.values())
    for row, (part, curves) in enumerate(parts.items(), 1):
        for name, curve in curves.groupby("name", sort=False):
            shown = curve.sort_values("step", kind="stable").iloc[_evenly(len(curve), limit)]
            line = go.Scatter(x=shown["step"], y=shown["value"], name=name, mode="lines", line_color=next(line_colors))
            figure.add_trace(line, row=row, col=1)
        scale = "log" if part not in DIAGNOSTICS and (curves["value"] > 0).all() else "linear"
        title = find(part).title() if part in DIAGNOSTICS else part
        figure.update_yaxes(title=title, type=scale, nticks=3, row=row, col=1)
    figure.update_xaxes(title="step", row=len(parts), col=1)
    return figure.update_layout(template=TEMPLATE, height=100 + sum(heights), showlegend=True)


def dumbbells(board: pd.DataFrame, first: str, second: str) -> go.Figure:
    """Two metrics of every tag joined by a line, published above ours; and, beside them, second minus first.

    Args:
        board: as `leaderboard.table` makes it.
        first: a label in `metrics.COMPARED`, in the colour of originals.
        second: another, in the colour of generated networks.
    """
    metric = find(COMPARED[first])
    shown = [f"{name} {side}" for name in (first, second) for side in SYMBOLS]
    board = board.dropna(subset=shown, how="all")
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.66, 0.34], horizontal_spacing=0.03)
    for side, offset in {"published": -0.17, "ours": 0.17}.items():
        rows = board[[f"{first} {side}", f"{second} {side}"]].mul(metric.scale).set_axis(["first", "second"], axis=1)
        rows = rows.assign(tag=board["tag"], changed=board["changed"], y=[k + offset for k in range(len(board))])
        rows = rows.dropna()
        if len(rows):
            _add_side(figure, rows, side, (first, second))
    figure.update_xaxes(title=metric.unit, row=1, col=1)
    figure.update_xaxes(title="difference", zeroline=True, zerolinecolor="#808080", rangemode="tozero", row=1, col=2)
    labels = board["tag"] + board["changed"].map(lambda changed: " *" if changed else "")
    figure.update_yaxes(tickvals=list(range(len(board))), ticktext=labels, range=[len(board) - 0.4, -0.6])
    figure.update_layout(template=TEMPLATE, height=170 + 24 * len(board), showlegend=True, margin_t=150)
    return figure.update_xaxes(side="top").update_layout(legend={"yref": "container", "y": 1, "yanchor": "top"})


def _add_side(figure: go.Figure, rows: pd.DataFrame, side: str, names: Sequence[str]) -> None:
    """The lines and points of one side, and its differences."""
    symbol, diamond, dash = SYMBOLS[side]
    x = rows[["first", "second"]].assign(gap=np.nan).to_numpy().ravel()
    y = rows["y"].to_numpy().repeat(3)
    line = {"color": "#808080", "width": 1.5, "dash": dash}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=1)
    points = {"y": rows["y"], "mode": "markers", "customdata": rows[["tag", "changed"]]}
    points["hovertemplate"] = "<b>%{customdata[0]}</b><br>%{fullData.name} %{x:.4~f}<br>%{customdata[1]}<extra></extra>"
    for column, name, group in zip(("first", "second"), names, ("original", "generated"), strict=True):
        marker = {"color": COLORS[group], "symbol": symbol, "size": 9}
        figure.add_scatter(x=rows[column], name=f"{side}: {name}", marker=marker, **points, row=1, col=1)
    marker = {"color": OTHER_COLORS[0], "symbol": diamond, "size": 9}
    difference = rows["second"] - rows["first"]
    figure.add_scatter(x=difference, name=f"{side}: difference", marker=marker, **points, row=1, col=2)


def _figure(**layout: object) -> go.Figure:
    """An empty figure in the common look."""
    return go.Figure(layout={"template": TEMPLATE, "showlegend": True, **layout})


def _has(table: pd.DataFrame, column: str) -> bool:
    """Whether a column was measured."""
    return column in table and bool(table[column].notna().any())


def _by_group(evaluation: pd.DataFrame, needed: Sequence[str] = ()) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Each group, its colour, and those of its rows that have what is needed, in a fixed order."""
    for group, color in colors(evaluation["group"]).items():
        rows = evaluation[evaluation["group"] == group].dropna(subset=list(needed))
        if len(rows):
            yield group, color, rows


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the indices below `count`, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)
