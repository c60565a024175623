"""Published results and ours, side by side: a table, figures, and one HTML page that works offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pdiff.experiment import figures

MEASURES = {
    "original mean": "test_accuracy/original_mean",
    "generated mean": "test_accuracy/generated_mean",
    "generated max": "test_accuracy/generated_max",
    "original-original": "similarity/original_original",
    "generated-generated": "similarity/generated_generated",
    "original-generated (max)": "similarity/original_generated_max",
}
"""Name -> metric of what is compared: test accuracy, then similarity."""
SIDES = ("published", "ours", "difference")
SYMBOLS = {"published": ("circle-open", "diamond-open", "dot"), "ours": ("circle", "diamond", "solid")}
"""Side -> marker, marker of the difference, line."""


@dataclass(frozen=True)
class Result:
    """What is known of a tag.

    Attributes:
        tag: its name.
        published: metric -> value; empty where nothing was published.
        ours: metric -> value; empty where it was never run.
        changed: dotted key -> value of what our run had otherwise than the tag's file.
        run: the identifier of our run.
    """

    tag: str
    published: Mapping[str, float] = field(default_factory=dict)
    ours: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""


def table(results: Iterable[Result]) -> pd.DataFrame:
    """One row a tag: tag, run, changed, and of every measure what is published, ours, and ours minus published.

    Accuracies are fractions. Columns of measures are called "generated mean published", and so on.
    """
    rows = []
    for result in results:
        changed = "; ".join(f"{key}={value}" for key, value in result.changed.items())
        row: dict[str, Any] = {"tag": result.tag, "run": result.run, "changed": changed}
        for name, metric in MEASURES.items():
            both = [float(side.get(metric, "nan")) for side in (result.published, result.ours)]
            row |= dict(zip((f"{name} {side}" for side in SIDES), (*both, both[1] - both[0]), strict=True))
        rows.append(row)
    return pd.DataFrame(rows, columns=["tag", "run", "changed", *(f"{n} {s}" for n in MEASURES for s in SIDES)])


def text(board: pd.DataFrame) -> str:
    """The board as aligned plain text: ours, and what is published in brackets; accuracies in percent."""
    cells = {"tag": board["tag"]}
    for name in MEASURES:
        published, ours, _ = (_cells(board, name, side) for side in SIDES)
        cells[name] = ours + " (" + published + ")"
    return pd.DataFrame(cells | {"changed": board["changed"].map(_shortened)}).to_string(index=False)


def page(board: pd.DataFrame) -> str:
    """One HTML page: what the board says, figures, table, and everything that was changed."""
    pairs = {
        "Test accuracy: originals and generated networks": ("original mean", "generated mean"),
        "Similarity: among originals and among generated networks": ("original-original", "generated-generated"),
    }
    drawn = {heading: dumbbells(board, *pair) for heading, pair in pairs.items()}
    sections = [figures.section(heading, READING, figure) for heading, figure in drawn.items() if figure.data]
    return figures.page(
        title="Leaderboard: published results and ours",
        verdict=verdict(board),
        table=_html(board),
        sections=sections,
        more=_changes(board),
        style=STYLE,
    )


def verdict(board: pd.DataFrame) -> str:
    """How many tags were run, and how generated networks compare with their originals, in plain words."""
    run, changed = board["run"] != "", board["changed"] != ""
    sentences = [f"{run.sum()} of {len(board)} tags were run here, {(run & changed).sum()} of them with changes."]
    for side, whose in {"published": "published results", "ours": "runs of ours"}.items():
        gain = (board[f"generated mean {side}"] - board[f"original mean {side}"]).dropna()
        if len(gain):
            sentences.append(
                f"In {(gain > 0).sum()} of {len(gain)} {whose} generated networks are on average more accurate "
                f"than their originals; the mean difference is {100 * gain.mean():+.2f} points."
            )
    return " ".join(sentences)


def dumbbells(board: pd.DataFrame, first: str, second: str) -> go.Figure:
    """Two measures of every tag joined by a line, published above ours; and, beside them, second minus first.

    Args:
        board: as `table` makes it.
        first: a name in `MEASURES`, in the colour of originals.
        second: another, in the colour of generated networks.
    """
    scale = _scale(first)
    board = board.dropna(subset=[f"{name} {side}" for name in (first, second) for side in SIDES[:2]], how="all")
    figure = make_subplots(1, 2, shared_yaxes=True, column_widths=[0.66, 0.34], horizontal_spacing=0.03)
    for side, offset in {"published": -0.17, "ours": 0.17}.items():
        rows = board[[f"{first} {side}", f"{second} {side}"]].mul(scale).set_axis(["first", "second"], axis=1)
        rows = rows.assign(tag=board["tag"], changed=board["changed"], y=[k + offset for k in range(len(board))])
        rows = rows.dropna()
        if len(rows):
            _add_side(figure, rows, side, (first, second))
    figure.update_xaxes(title="%" if scale == 100 else "IoU", row=1, col=1)
    figure.update_xaxes(title="difference", zeroline=True, zerolinecolor="#808080", rangemode="tozero", row=1, col=2)
    labels = board["tag"] + board["changed"].map(lambda changed: " *" if changed else "")
    figure.update_yaxes(tickvals=list(range(len(board))), ticktext=labels, range=[len(board) - 0.4, -0.6])
    figure.update_layout(template=figures.TEMPLATE, height=170 + 24 * len(board), showlegend=True, margin_t=150)
    return figure.update_xaxes(side="top").update_layout(legend={"yref": "container", "y": 1, "yanchor": "top"})


def _add_side(figure: go.Figure, rows: pd.DataFrame, side: str, names: Sequence[str]) -> None:
    """One side's lines and points, and its differences."""
    symbol, diamond, dash = SYMBOLS[side]
    x = rows[["first", "second"]].assign(gap=np.nan).to_numpy().ravel()
    y = rows["y"].to_numpy().repeat(3)
    line = {"color": "#808080", "width": 1.5, "dash": dash}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=1)
    points = {"y": rows["y"], "mode": "markers", "customdata": rows[["tag", "changed"]]}
    hover = "<b>%{customdata[0]}</b><br>%{fullData.name} %{x:.4~f}<br>%{customdata[1]}<extra></extra>"
    for column, name, color in zip(("first", "second"), names, ("original", "generated"), strict=True):
        marker = {"color": figures.COLORS[color], "symbol": symbol, "size": 9}
        label = f"{side}: {name}"
        figure.add_scatter(x=rows[column], name=label, marker=marker, hovertemplate=hover, **points, row=1, col=1)
    marker = {"color": DIFFERENCE, "symbol": diamond, "size": 9}
    difference = rows["second"] - rows["first"]
    label = f"{side}: difference"
    figure.add_scatter(x=difference, name=label, marker=marker, hovertemplate=hover, **points, row=1, col=2)


DIFFERENCE = "#44AA99"  # of the "muted" scheme of Paul Tol, as `figures.OTHER_COLORS`
READING = (
    "Two points of one tag: open ones are published, filled ones are ours; a star marks a tag of which our run was "
    "changed, so that it is no repetition of what was published. On the right the second minus the first."
)
STYLE = """
main { max-width: 84rem; }
.scroll { max-height: 44rem; overflow: auto; border: 1px solid var(--line); font-size: 0.92em; }
thead { position: sticky; top: 0; z-index: 1; background: var(--page); }
th[colspan] { text-align: center !important; border-left: 1px solid var(--line); }
td:nth-child(3n+3), tr:last-child > th:nth-child(3n+3) { border-left: 1px solid var(--line); }
td:nth-child(2), th:nth-child(2):not([colspan]) { text-align: left !important; color: var(--soft); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
.verdict { margin-bottom: 1.5rem; }
dt { font-weight: 600; margin-top: 0.6rem; }
dd { margin: 0 0 0 1.2rem; overflow-wrap: anywhere; }
"""


def _scale(name: str) -> int:
    """What a measure is multiplied with for people: accuracies are told in percent."""
    return 100 if MEASURES[name].startswith("test_accuracy") else 1


def _cells(board: pd.DataFrame, name: str, side: str) -> pd.Series:
    """A column of numbers as text, a dash where there is none."""
    scale, sign = _scale(name), "+" if side == "difference" else ""
    digits = 2 if scale == 100 else 3
    column = board[f"{name} {side}"]
    return column.map(lambda value: "–" if value != value else f"{scale * value:{sign}.{digits}f}").astype(str)


def _shortened(changed: str) -> str:
    """What was changed first, and how many other things were."""
    first, *others = changed.split("; ")
    return f"{first} +{len(others)}" if others else first


def _html(board: pd.DataFrame) -> str:
    """The table of the page: a column each for published, ours and difference under the name of their measure."""
    columns = {("", "tag"): board["tag"], ("", "changed"): board["changed"].map(_shortened)}
    for name in MEASURES:
        unit = ", %" if _scale(name) == 100 else ""
        heads = zip(SIDES, ("published", "ours", "Δ"), strict=True)
        columns |= {(f"{name}{unit}", head): _cells(board, name, side) for side, head in heads}
    return pd.DataFrame(columns).to_html(index=False, border=0)


def _changes(board: pd.DataFrame) -> str:
    """Everything that was changed, to be unfolded."""
    rows = board[board["changed"] != ""]
    items = [f"<dt>{escape(row.tag)}</dt><dd>{escape(row.changed)}</dd>" for row in rows.itertuples()]
    return f"<details><summary>What was changed</summary><dl>{''.join(items)}</dl></details>" if items else ""
