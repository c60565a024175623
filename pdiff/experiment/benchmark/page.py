"""What the benchmark found: metrics, tables and a page that works offline."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from pdiff.experiment.benchmark import PARTS
from pdiff.experiment.metrics import COLORS, MISSING, OTHER_COLORS
from pdiff.experiment.report import page, section

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from pdiff.experiment.benchmark.against import Timed
    from pdiff.experiment.benchmark.measure import Cost, Peaks, Work
    from pdiff.experiment.benchmark.scaling import Point

READING = {
    "Parts": (
        "Seconds are the median of the repeats, for a unit of work. Operations are those of matrix products and "
        "convolutions, bytes what must be read and written at least. The share is the time that the scarcer resource "
        "would need at its peak, over that of the fastest repeat: at 100 % nothing can be faster without less work."
    ),
    "Machine": "The best that was seen in this run, before, between and after the parts.",
    "Growth with D": "Seconds against the numbers of a network, both logarithmic; dotted is the fitted power.",
    "Growth with N": "Seconds against the number of networks, both logarithmic; dotted is the fitted power.",
    "Programs": "Whole processes that fit a generator on the same files and sample, timed in turn.",
}


class Found(NamedTuple):
    """All results.

    Attributes:
        machine: in a few words.
        peaks: of the machine.
        costs: part -> its work and what it costs.
        points: of scaling; none where it was left out.
        exponents: (operation, D or N) -> the power with which seconds grow.
        programs: that were compared; none where there was no other.
    """

    machine: str
    peaks: Peaks
    costs: Mapping[str, tuple[Work, Cost]]
    points: Sequence[Point]
    exponents: Mapping[tuple[str, str], float]
    programs: Sequence[Timed]

    def metrics(self) -> dict[str, float]:
        """Name of a metric -> its value, as a run records them."""
        found = {f"peak/{name}": value for name, value in self.peaks._asdict().items()}
        for row in self.parts().to_dict("records"):
            for metric in ("seconds", "memory_mb", "operations", "bytes", "share"):
                if row[metric] == row[metric]:
                    found[f"{metric}/{row['part']}"] = row[metric]
        found |= {f"exponent/{name}_{over}": value for (name, over), value in self.exponents.items()}
        return found | {f"seconds/program_{timed.program.lower()}": timed.seconds for timed in self.programs}

    def parts(self) -> pd.DataFrame:
        """A row for each part; seconds, operations and bytes are per unit."""
        rows = []
        for name, (work, cost) in self.costs.items():
            least = self.peaks.least_seconds(cost.operations, work.bytes, disk=work.disk)
            bound = max(least, key=least.get)
            rows.append(
                {
                    "part": name,
                    "what": PARTS[name].what,
                    "unit": PARTS[name].unit,
                    "repeats": cost.repeats,
                    "seconds": cost.seconds / work.units,
                    "memory_mb": cost.memory / 2**20,
                    "operations": cost.operations / work.units,
                    "bytes": work.bytes / work.units,
                    "bound": bound,
                    "share": least[bound] / cost.fastest,
                }
            )
        return pd.DataFrame(rows)

    def tables(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Heading -> table of text, in the order of the page."""
        if self.costs:
            yield "Parts", _text(self.parts())
        peaks = {
            "matrix product, float32": f"{self.peaks.gemm / 1e9:,.1f} GFLOP/s",
            "copy in memory, read and written": f"{self.peaks.memory / 1e9:,.1f} GB/s",
            "reading a file": f"{self.peaks.disk / 1e9:,.2f} GB/s",
        }
        yield "Machine", pd.DataFrame(peaks.items(), columns=["peak", "value"])
        for over in ("D", "N"):
            if rows := [point for point in self.points if point.over == over]:
                yield f"Growth with {over}", self._growth(over, rows)
        if self.programs:
            rows = [(t.program, f"{t.seconds:.2f}", f"{t.fastest:.2f}", str(t.repeats)) for t in self.programs]
            yield "Programs", pd.DataFrame(rows, columns=["program", "seconds", "fastest", "repeats"])

    def _growth(self, over: str, points: Sequence[Point]) -> pd.DataFrame:
        """Seconds of every operation at every size, and the exponent."""
        sizes = sorted({_size(point) for point in points})
        seconds = {(point.operation, _size(point)): point.seconds for point in points}
        rows = []
        for name in dict.fromkeys(point.operation for point in points):
            cells = [f"{seconds[name, size]:.3g}" for size in sizes]
            rows.append([name, *cells, f"{self.exponents[name, over]:.2f}"])
        return pd.DataFrame(rows, columns=["seconds", *(f"{over} = {size:,}" for size in sizes), "exponent"])

    def markdown(self) -> str:
        """The tables as Markdown."""
        parts = [f"{self.machine}\n"]
        for heading, frame in self.tables():
            lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
            parts += [f"## {heading}\n", *("| " + " | ".join(map(str, cells)) + " |" for cells in lines), ""]
        return "\n".join(parts)

    def html(self) -> str:
        """The page."""
        over = ("D", "N") if self.points else ()
        figures = {f"Growth with {axis}": growth(self.points, self.exponents, axis) for axis in over}
        return page(
            "evaluation",
            title="Benchmark",
            findings=self.machine,
            plots=[section(name, READING[name], figures.get(name), table=frame) for name, frame in self.tables()],
            config="",
            lineage=(),
        )


def machine(threads: int, torch_version: str, device: str) -> str:
    """What was measured on, in a line."""
    return f"{platform.processor() or platform.machine()}, {device}, {threads} threads, PyTorch {torch_version}"


def growth(points: Sequence[Point], exponents: Mapping[tuple[str, str], float], over: str) -> go.Figure:
    """Seconds against D or N: a line for each operation, and the power that its largest sizes follow."""
    import plotly.graph_objects as go

    from pdiff.experiment.figures import TEMPLATE

    figure = go.Figure(layout={"template": TEMPLATE, "height": 440})
    colors = [*COLORS.values(), *OTHER_COLORS]
    for k, name in enumerate(dict.fromkeys(point.operation for point in points)):
        rows = sorted((_size(p), p.seconds) for p in points if (p.operation, p.over) == (name, over))
        sizes, seconds = (list(column) for column in zip(*rows, strict=True))
        power, color = exponents[name, over], colors[k % len(colors)]
        fitted = [seconds[-1] * (size / sizes[-1]) ** power for size in sizes]
        look = {"legendgroup": name, "line": {"color": color}}
        figure.add_scatter(x=sizes, y=seconds, name=name, mode="lines+markers", marker={"color": color}, **look)
        look["line"] = {"color": color, "dash": "dot", "width": 1}
        figure.add_scatter(x=sizes, y=fitted, name=f"{name}: {over}^{power:.2f}", mode="lines", **look)
    title = {"D": "numbers of a network, D", "N": "networks, N"}[over]
    return figure.update_xaxes(title=title, type="log").update_yaxes(title="seconds", type="log")


def _size(point: Point) -> int:
    """What grows."""
    return point.size if point.over == "D" else point.networks


def _text(parts: pd.DataFrame) -> pd.DataFrame:
    """The table of parts for people."""
    shown = parts[["part", "unit"]].copy()
    shown["seconds a unit"] = parts["seconds"].map("{:.3g}".format)
    shown["memory, MB"] = [MISSING if v != v else f"{v:,.0f}" for v in parts["memory_mb"]]
    shown["operations"] = parts["operations"].map("{:.3g}".format)
    shown["bytes"] = parts["bytes"].map("{:.3g}".format)
    shown["bound by"] = parts["bound"]
    shown["share of peak"] = parts["share"].map("{:.0%}".format)
    return shown
