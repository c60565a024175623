"""The figures of reports, as plotly figures. Importing this module imports plotly: do so where a figure is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pdiff.experiment.metrics import (
    COLORS,
    COMPARED,
    DIAGNOSTICS,
    OTHER_COLORS,
    Style,
    by_part,
    find,
    is_null_arm,
    of_networks,
    styles,
)

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


WIDE = 20  # from this ratio of the largest to the smallest value, or to 1, on an axis is logarithmic

SYMBOLS = {"published": ("circle-open", "diamond-open", "dot"), "ours": ("circle", "diamond", "solid")}
"""Side of the leaderboard -> marker, marker of the difference, line."""


VERDICTS = {"better": Style("#4477AA", "triangle-right"), "worse": Style("#EE6677", "triangle-left")}
"""Verdict of a comparison -> how it looks, with colour and without."""
NO_DIFFERENCE = Style("#808080", "circle-open")
SHOWN_ARMS = ("noise_matched", "average_16", "gaussian", "mixed", "recombined_2")
"""The null arms of figures in which twenty groups would hide each other: one of each family, none of them trivial."""

Styles = Mapping[str, Style]


# -- accuracy, novelty, distances


def front(points: pd.DataFrame, networks: pd.DataFrame, *, looks: Styles | None = None) -> go.Figure:
    """Accuracy against novelty: a point a group with its intervals, and the front of the null arms.

    Args:
        points: one row for each group and part: group, networks, part, accuracy, novelty, each with `_low` and `_high`,
            and on_front, which marks the null arms that no other one beats in both.
        networks: one row a network: group, index, novelty and accuracies, for the faint points of trained and generated
            networks.
        looks: style of each group; that of `metrics.styles` by default.
    """
    figure = _figure(height=640)
    part, points = _one_part(points)
    accuracy, on_front = by_part("accuracy").get(part, ""), points.get("on_front", [])
    for group, style, rows in _by_group(networks, ["novelty", accuracy], looks):
        if not is_null_arm(group):
            marker = {"color": style.color, "symbol": style.symbol, "size": 5, "opacity": 0.3}
            cloud = {"legendgroup": group, "showlegend": False, "mode": "markers", "marker": marker, "name": group}
            figure.add_scatter(**_xy(rows, "novelty", accuracy), **cloud, hoverinfo="skip")
    if any(on_front):
        arms = points[on_front.astype(bool)].sort_values("novelty")
        line = {"color": "#808080", "dash": "dot", "shape": "vh", "width": 1.5}
        figure.add_scatter(**_xy(arms, "novelty", "accuracy"), mode="lines", line=line, name="front of the null arms")
    for group, style, rows in _by_group(points, ["novelty", "accuracy"], looks):
        bars = {f"error_{axis}": _interval(rows, name) for axis, name in (("x", "novelty"), ("y", "accuracy"))}
        hover = f"<b>{group}</b><br>novelty %{{x:.3f}}<br>{part} accuracy %{{y:.2%}}<extra></extra>"
        figure.add_scatter(
            **_xy(rows, "novelty", "accuracy"), **bars, **_look(group, style, size=12), hovertemplate=hover
        )
    if figure.data:
        figure.add_vline(1, line={"color": "#808080", "width": 1})
        ends = points[["accuracy_low", "accuracy", "accuracy_high"]].stack()  # single networks may lie outside
        low, high, room = ends.min(), ends.max(), 0.1 * (ends.max() - ends.min())
        figure.update_yaxes(range=_window(points.set_index("group")["accuracy"]) or [low - room, high + room])
    wide = points["novelty"].max() > WIDE and points["novelty"].min() > 0 if len(points) else False
    figure.update_xaxes(
        title="novelty (1: as far as held-out networks)", rangemode="tozero", type="log" if wide else "-"
    )
    return figure.update_yaxes(title=f"{part} accuracy", tickformat=".4~%")


def distances(networks: pd.DataFrame) -> go.Figure:
    """Distance of every network to the nearest fitted one, a row a group; of a fitted network, to the nearest other.

    Args:
        networks: one row a network: group, nearest_distance.
    """
    return _rows(networks, {"distance": "nearest_distance"}).update_xaxes(
        title=find("nearest_distance").label, rangemode="tozero"
    )


def accuracy_distributions(evaluation: pd.DataFrame) -> go.Figure:
    """Boxes of test accuracy by group, and of validation accuracy above in grey, with a point for every network."""
    figure = _rows(evaluation, by_part("accuracy"))
    return figure.update_xaxes(title="accuracy", tickformat=".4~%", range=_around_groups(evaluation))


def _around_groups(evaluation: pd.DataFrame) -> list[float] | None:
    """The range of accuracies of single networks that holds all but the groups far below."""
    name = next((name for name in reversed(by_part("accuracy").values()) if _has(evaluation, name)), None)
    return _window(evaluation.groupby("group")[name].median()) if name else None


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
    figure = _figure(height=640)
    if {"max_similarity", accuracy} <= measured.keys():
        for group, style, rows in _by_group(evaluation, ["max_similarity", accuracy]):
            figure.add_scatter(
                **_xy(rows, "max_similarity", accuracy),
                **_look(group, style, size=14 if len(rows) == 1 else 7),
                opacity=0.7,
                customdata=rows[["index", *measured]].to_numpy(np.float32),
                hovertemplate="<br>".join(["<b>%{fullData.name} %{customdata[0]}</b>", *hover]) + "<extra></extra>",
            )
    figure.update_xaxes(title=f"{find('max_similarity').label} to an original")
    return figure.update_yaxes(title=find(accuracy).label, tickformat=".4~%", range=_around_groups(evaluation))


# -- latents, votes, calibration, tensors


def latents(table: pd.DataFrame) -> go.Figure:
    """The networks on the first two principal axes of the fitted ones.

    Args:
        table: one row a network: group, index, component_1, component_2.
    """
    figure = _figure(height=560)
    for group, style, rows in _by_group(table, ["component_1", "component_2"]):
        look = _look(group, style, size=7, waits=is_null_arm(group))
        figure.add_scatter(**_xy(rows, "component_1", "component_2"), **look, opacity=0.7)
    figure.update_xaxes(title="component 1")
    return figure.update_yaxes(title="component 2")


def spectrum(table: pd.DataFrame) -> go.Figure:
    """Spread of each group along each principal axis of the fitted networks, over theirs.

    Args:
        table: group, component (from 1), rms_ratio, variance_share.
    """
    figure = _curves(table, "component", ["rms_ratio"])
    if figure.data:
        figure.add_hline(1, line={"color": "#808080", "width": 1, "dash": "dot"})
    figure.update_xaxes(title="component", type="log", tickvals=[d * 10**k for k in range(7) for d in (1, 2, 5)])
    wide = len(table) and table["rms_ratio"].max() > WIDE
    return figure.update_yaxes(title="rms over that of the fitted", rangemode="tozero", type="log" if wide else "-")


def votes(table: pd.DataFrame, *, looks: Styles | None = None) -> go.Figure:
    """Accuracy, likelihood and calibration of m networks that vote.

    Args:
        table: group, part, networks (m), accuracy, nll, ece.
        looks: style of each group; that of `metrics.styles` by default.
    """
    part, table = _one_part(table)
    figure = _curves(table, "networks", ["accuracy", "nll", "ece"], looks=looks)
    figure.update_xaxes(type="log", tickvals=sorted(set(table["networks"])) if len(table) else None)
    for row, title in enumerate((f"{part} accuracy", find("nll").label, find("ece").label) if figure.data else (), 1):
        figure.update_yaxes(title=title, row=row, col=1, tickformat=".4~%" if row != 2 else "")
    return figure


def calibration(table: pd.DataFrame) -> go.Figure:
    """Reliability diagram: accuracy of the predictions of each bin of confidence.

    Args:
        table: group, part, confidence (mean of the bin), accuracy, count. Empty bins are left out.
    """
    part, table = _one_part(table)
    figure = _curves(table[table["count"] > 0], "confidence", ["accuracy"], waits=is_null_arm)
    if figure.data:
        figure.add_shape(_diagonal(0, 1))
    figure.update_xaxes(title="confidence", tickformat=".4~%")
    return figure.update_yaxes(title=f"{part} accuracy", tickformat=".4~%")


def layers(table: pd.DataFrame) -> go.Figure:
    """Mean and standard deviation of the numbers of each tensor, against those of the originals.

    Args:
        table: group, tensor, mean, std; tensors in the order of the network.
    """
    fitted = table[table["group"] == "original"].set_index("tensor")[["mean", "std"]]
    pairs = table[table["group"] != "original"].join(fitted, on="tensor", rsuffix="_original", how="inner")
    pairs["place"] = pairs["tensor"].map({tensor: place for place, tensor in enumerate(fitted.index, 1)})
    pairs["shift"] = (pairs["mean"] - pairs["mean_original"]) / pairs["std_original"]
    pairs["ratio"] = pairs["std"] / pairs["std_original"]
    figure = _curves(pairs, "place", ["shift", "ratio"], mode="markers", hover="tensor", waits=is_null_arm)
    for row, title in enumerate(("shift of the mean, in std", "ratio of std") if figure.data else (), 1):
        figure.update_yaxes(title=title, zeroline=True, zerolinecolor="#808080", row=row, col=1)
    return figure.update_xaxes(
        title="tensor, in the order of the network", row=2 if figure.data else None, col=1 if figure.data else None
    )


# -- comparisons and costs


def forest(comparisons: pd.DataFrame) -> go.Figure:
    """Difference of every two groups that were compared, with its interval; questions one below the other.

    Args:
        comparisons: question, group, against, part, difference (a fraction), low, high, verdict.
    """
    part, comparisons = _one_part(comparisons)
    labels, places = [], {}
    for question, rows in comparisons.dropna(subset=["difference"]).groupby("question", sort=False):
        labels.append(f"<b>{question}</b>")
        for index, row in rows.iterrows():
            places[index] = len(labels)
            labels.append(f"{row['group']} – {row['against']}")
    figure = _figure(height=150 + 19 * len(labels))
    shown = comparisons.loc[list(places)].assign(y=list(places.values()))
    shown[["difference", "low", "high"]] *= 100
    for verdict, rows in shown.groupby("verdict", sort=False):
        look = _look(verdict, VERDICTS.get(verdict, NO_DIFFERENCE), size=11)
        hover = f"%{{y}}<br>%{{x:+.2f}} points: {verdict}<extra></extra>"
        bars = {"error_x": _interval(rows, "difference", low="low", high="high")}
        figure.add_scatter(**_xy(rows, "difference", "y"), **look, **bars, hovertemplate=hover)
    figure.update_yaxes(tickvals=list(range(len(labels))), ticktext=labels, range=[len(labels) - 0.4, -0.6])
    figure.update_xaxes(range=_window(shown.set_index("group")["difference"], (0.2, 0.8)))
    return figure.update_xaxes(
        title=f"difference of {part} accuracy, points", zeroline=True, zerolinecolor="#808080", rangemode="tozero"
    )


def costs(ledger: pd.DataFrame, *, looks: Styles | None = None) -> go.Figure:
    """Seconds of every stage as bars.

    Args:
        ledger: stage, seconds; and the group in whose style the bar is, where `looks` are given.
        looks: style of each group.
    """
    ledger = ledger[ledger["seconds"] > 0]
    figure = _figure(height=130 + 30 * len(set(ledger["stage"])), showlegend=bool(looks))
    for group, style, rows in _by_group(ledger.assign(group=ledger["group"] if looks else "generated"), looks=looks):
        bar = {"orientation": "h", "name": group, "marker_color": style.color, "texttemplate": "%{x:,.3~s} s"}
        figure.add_bar(x=rows["seconds"].to_numpy(np.float32), y=rows["stage"], **bar, textposition="auto")
    figure.update_yaxes(autorange="reversed")
    return figure.update_xaxes(title="seconds", type="log")


# -- similarity, training, trajectory


def similarity_heatmap(similarity: np.ndarray, groups: Sequence[str], *, limit: int = 128) -> go.Figure:
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


def control(asked: pd.DataFrame) -> go.Figure:
    """Accuracy of networks against that which they were asked for.

    Args:
        asked: asked, obtained; one row a network.
    """
    figure = _figure(height=420, showlegend=False)
    look = _look("generated", styles(["generated"])["generated"], size=6)
    figure.add_scatter(**_xy(asked, "asked", "obtained"), **look)
    figure.add_shape(_diagonal(asked.to_numpy().min(), asked.to_numpy().max()))
    figure.update_xaxes(title="validation accuracy that was asked for", tickformat=".4~%")
    return figure.update_yaxes(title="validation accuracy", tickformat=".4~%")


def loss_curves(history: pd.DataFrame, *, limit: int = 1000) -> go.Figure:
    """Losses over steps, one plot for each part of the training, and a small one for each of DIAGNOSTICS.

    Curves of a single point are left out.

    Args:
        history: name, step, value; of the names only DIAGNOSTICS and those that end in "loss", as in
            "diffusion/heldout_loss", whose part is "diffusion". Values that are not finite are left out.
        limit: at most this many points a curve, evenly chosen.
    """
    history = history.astype({"name": str, "step": float, "value": float})
    curves = history["name"].str.endswith("loss") | history["name"].isin(DIAGNOSTICS)
    shown = history[curves & np.isfinite(history["value"])]
    shown = shown[shown.groupby("name")["step"].transform("nunique") > 1]
    plot = shown["name"].where(shown["name"].isin(DIAGNOSTICS), shown["name"].str.split("/").str[0])
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


def _panels(count: int, *, height: int = 260) -> go.Figure:
    """An empty figure of several plots, one below the other."""
    figure = make_subplots(rows=count, vertical_spacing=0.25 / count)
    return figure.update_layout(template=TEMPLATE, showlegend=True, height=120 + height * count)


def _curves(
    table: pd.DataFrame,
    x: str,
    columns: Sequence[str],
    *,
    mode: str = "lines+markers",
    hover: str = "",
    looks: Styles | None = None,
    waits: Callable[[str], bool] = lambda group: False,
) -> go.Figure:
    """A line for each group, in a plot for each of the columns.

    Args:
        table: group, x and the columns.
        x: column of the horizontal axis.
        columns: those of the vertical axes.
        mode: of the traces: lines, markers, or both.
        hover: a column that says what a point is.
        looks: style of each group; that of `metrics.styles` by default.
        waits: which groups are hidden until they are clicked in the legend.
    """
    figure = _panels(len(columns), height=420 if len(columns) == 1 else 260)
    for row, column in enumerate(columns, 1):
        for group, style, rows in _by_group(table, [x, column], looks):
            rows = rows.sort_values(x, kind="stable")
            look = _look(group, style, size=6, mode=mode, waits=waits(group)) | {"showlegend": row == 1}
            text = {"text": rows[hover]} if hover else {}
            figure.add_scatter(**_xy(rows, x, column), **look, **text, row=row, col=1)
    return figure


def _rows(networks: pd.DataFrame, columns: Mapping[str, str]) -> go.Figure:
    """A row for each group: a box and the points of its networks, in grey for all columns but the last."""
    columns = {part: name for part, name in columns.items() if _has(networks, name)}
    groups = list(_by_group(networks, columns.values()))
    figure = _figure(height=100 + 28 * len(groups), boxmode="group", showlegend=False)
    for part, column in columns.items():
        for group, style, rows in groups:
            color = style.color if column == [*columns.values()][-1] else "#A0A0A0"
            figure.add_box(
                x=rows[column].to_numpy(np.float32),
                y0=group,
                name=f"{group} {part}".strip(),
                offsetgroup=part,
                orientation="h",
                boxpoints="all",
                pointpos=0,
                jitter=0.6,
                line={"color": color, "width": 1.5},
                marker={"color": color, "opacity": 0.35, "size": 4},
            )
    return figure.update_yaxes(type="category", autorange="reversed")


def _look(group: str, style: Style, *, size: int, mode: str = "markers", waits: bool = False) -> dict[str, Any]:
    """What the traces of a group have in common; one that waits is hidden until it is clicked in the legend."""
    return {
        "name": group,
        "legendgroup": group,
        "visible": "legendonly" if waits else True,
        "zorder": 1 - is_null_arm(group),
        "mode": mode,
        "marker": {"color": style.color, "symbol": style.symbol, "size": size},
        "line": {"color": style.color, "width": 1.5},
    }


def _xy(rows: pd.DataFrame, x: str, y: str) -> dict[str, np.ndarray]:
    """Coordinates in single precision, which takes half the room in a page."""
    return {"x": rows[x].to_numpy(np.float32), "y": rows[y].to_numpy(np.float32)}


def _interval(rows: pd.DataFrame, column: str, *, low: str = "", high: str = "") -> dict[str, Any]:
    """Error bars from the ends of an interval, by default the columns `<column>_low` and `<column>_high`."""
    middle = rows[column]
    ends = {"array": rows[high or f"{column}_high"] - middle, "arrayminus": middle - rows[low or f"{column}_low"]}
    return {name: end.to_numpy(np.float32) for name, end in ends.items()} | {"thickness": 1.5, "width": 3}


def _window(values: pd.Series, ends: tuple[float, float] = (0.2, 1)) -> list[float] | None:
    """The range around these two quantiles, where a few values lie so far off that they would squeeze all others.

    Args:
        values: one for each group, which is its index; all but null arms are in the range, however far they lie.
        ends: the two quantiles.
    """
    values = values.dropna()
    needed = [*values.quantile(list(ends)), *(v for group, v in values.items() if not is_null_arm(str(group)))]
    low, high = min(needed, default=0), max(needed, default=0)
    room = high - low
    return [low - room / 2, high + room / 3] if values.max() - values.min() > 3 * room > 0 else None


def _diagonal(low: float, high: float) -> dict[str, Any]:
    """The line on which both coordinates are equal."""
    line = {"color": "#808080", "width": 1, "dash": "dot"}
    return {"type": "line", "x0": low, "y0": low, "x1": high, "y1": high, "line": line, "layer": "below"}


def _one_part(table: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The part of the images that a figure shows, test where it was used, and the rows of that part."""
    parts = [part for part in ("test", "validation") if part in set(table.get("part", ()))]
    return (parts[0], table[table["part"] == parts[0]]) if parts else ("", table)


def _has(table: pd.DataFrame, column: str) -> bool:
    """Whether a column was measured."""
    return column in table and bool(table[column].notna().any())


def _by_group(
    table: pd.DataFrame, needed: Iterable[str] = (), looks: Styles | None = None
) -> Iterator[tuple[str, Style, pd.DataFrame]]:
    """Each group, its style, and those of its rows that have what is needed, in a fixed order."""
    needed = list(needed)
    if {"group", *needed} <= set(table):
        for group, style in (looks or styles(table["group"])).items():
            rows = table[table["group"] == group].dropna(subset=needed)
            if len(rows):
                yield group, style, rows


def less_crowded(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of all groups but most null arms, so that a figure of curves or clouds can be read."""
    return table[[not is_null_arm(group) or group in SHOWN_ARMS for group in table["group"]]]


def thinned(table: pd.DataFrame, limit: int = 120, *, by: str = "group") -> pd.DataFrame:
    """At most this many rows of each group, evenly chosen, so that a page stays small."""
    groups = table.groupby(by)[by]
    step = (groups.transform("size") / limit).clip(lower=1)
    return table[groups.cumcount() % step < 1]


def thinned_components(spectrum: pd.DataFrame, limit: int = 60) -> pd.DataFrame:
    """At most this many components of each group, evenly chosen on a logarithmic axis, with the first and the last."""
    components = np.geomspace(1, spectrum["component"].max(), limit).round()
    return spectrum[spectrum["component"].isin(components)]


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the indices below `count`, evenly spaced, with the first and the last."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int)
