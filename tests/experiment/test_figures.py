"""Figures, table, verdict and report, against plain Python and a plain HTML parser."""

from html.parser import HTMLParser
from math import inf, isnan, nan
from statistics import fmean, pstdev

import numpy as np
import pandas as pd
import pytest

from pdiff.experiment import figures

ACCURACIES = {
    "original": [0.90, 0.92, 0.94],
    "generated": [0.93, 0.95],
    "noise_0.05": [0.80, 0.85, 0.87],
    "average": [0.945],
    "gaussian": [0.91, 0.97],
}
SUMMARY = {
    "val_accuracy/original_mean": 0.92,
    "val_accuracy/generated_mean": 0.94,
    "val_accuracy/average_mean": 0.945,
    "val_accuracy/noise_0.05_mean": 0.84,
    "similarity/original_original": 0.742,
    "similarity/generated_generated": 0.898,
    "similarity/original_generated_max": 0.85,
}


def evaluation() -> pd.DataFrame:
    """Five groups; on test images every accuracy is lower by 0.01."""
    rows = [
        (group, index, accuracy, accuracy - 0.01, accuracy - 0.1, 2.5)
        for group, accuracies in ACCURACIES.items()
        for index, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows, columns=["group", "index", *figures.MEASURES])


def history(steps: int = 5) -> pd.DataFrame:
    """A falling loss and a held-out loss of one part, a loss of another that reaches 0, and no loss."""
    names = ["diffusion/loss", "diffusion/heldout_loss", "autoencoder/loss", "pretrain/val_accuracy"]
    rows = [(n, s, 1 - s / (steps - 1) + (n != "autoencoder/loss")) for n in names for s in range(steps)]
    return pd.DataFrame(rows, columns=["name", "step", "value"])


def trajectory() -> pd.DataFrame:
    """Two draws at three timesteps."""
    rows = [(t, draw, 0.9 - t / 10 - draw / 10, 0.8 - t / 10) for t in (2.0, 1.0, 0.0) for draw in (0, 1)]
    return pd.DataFrame(rows, columns=["timestep", "draw", "val_accuracy", "test_accuracy"])


def report(**changes: object) -> str:
    """The report on the data above."""
    groups = ["original"] * 3 + ["generated"] * 2
    arguments = {
        "title": "tag",
        "summary": SUMMARY,
        "evaluation": evaluation(),
        "similarity": np.eye(5),
        "groups": groups,
        "history": history(),
        "trajectory": trajectory(),
    }
    return figures.report(**arguments | changes)


class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def test_table_agrees_with_plain_python():
    table = figures.table(evaluation())
    assert list(table["group"]) == list(ACCURACIES)
    for row, accuracies in zip(table.itertuples(), ACCURACIES.values(), strict=True):
        assert row.networks == len(accuracies)
        assert row.val_mean == pytest.approx(fmean(accuracies))
        assert row.val_std == row.test_std == pytest.approx(pstdev(accuracies))
        assert row.val_max == max(accuracies)
        assert row.test_mean == pytest.approx(fmean(accuracies) - 0.01)
        assert row.test_max == pytest.approx(max(accuracies) - 0.01)
        assert row.max_similarity == pytest.approx(fmean(accuracies) - 0.1)


def test_table_skips_values_that_are_missing():
    frame = evaluation().drop(columns="test_accuracy")
    frame.loc[0, "val_accuracy"] = nan
    row = next(figures.table(frame).itertuples())
    assert row.val_mean == pytest.approx(0.93)
    assert isnan(row.test_mean)
    assert isnan(row.test_max)


def test_table_text_is_aligned_and_in_percent():
    lines = figures.table_text(figures.table(evaluation().assign(max_similarity=nan))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[0] == "group"
    assert lines[2].split() == ["generated", "2", "94.00", "±", "1.00", "95.00", "93.00", "±", "1.00", "94.00", "–"]


def test_scatter_shows_every_network_once_in_the_colour_of_its_group():
    figure = figures.accuracy_against_similarity(evaluation())
    points = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    assert list(points) == ["original", "generated", "noise_0.05", "average", "gaussian"]
    for group, accuracies in ACCURACIES.items():
        assert np.allclose(points[group], [(a - 0.1, a - 0.01) for a in accuracies])
    few = figures.accuracy_against_similarity(evaluation().query("group in ['gaussian', 'generated']"))
    colors = {trace.name: trace.marker.color for trace in figure.data}
    assert len(set(colors.values())) == 5
    assert {trace.name: trace.marker.color for trace in few.data}.items() <= colors.items()


def test_scatter_falls_back_to_validation_accuracy():
    figure = figures.accuracy_against_similarity(evaluation().assign(test_accuracy=nan))
    assert list(figure.data[0].y) == ACCURACIES["original"]
    assert figure.layout.yaxis.title.text == "validation accuracy"


def test_distributions_hold_both_splits():
    original = figures.accuracy_distributions(evaluation()).data[0]
    assert list(original.x) == ["validation"] * 3 + ["test"] * 3
    assert list(original.y) == pytest.approx([0.90, 0.92, 0.94, 0.89, 0.91, 0.93])


@pytest.mark.parametrize("column", figures.MEASURES)
@pytest.mark.parametrize("spoil", [lambda f, c: f.assign(**{c: nan}), lambda f, c: f.drop(columns=c)])
def test_missing_measures_do_no_harm(column, spoil):
    Page(report(evaluation=spoil(evaluation(), column)))


def test_figures_without_data_are_left_out():
    headings = Page(
        report(
            evaluation=evaluation().drop(columns=list(figures.MEASURES)),
            similarity=np.empty((0, 0)),
            groups=[],
            history=pd.DataFrame(columns=["name", "step", "value"]),
            trajectory=None,
        )
    ).texts
    assert "h2" not in headings
    assert (
        "h2"
        not in Page(
            report(
                evaluation=evaluation()[:0],
                similarity=np.empty((0, 0)),
                groups=[],
                history=history()[:0],
                trajectory=None,
            )
        ).texts
    )


def test_heatmap_keeps_the_order_and_marks_the_border():
    similarity = np.arange(25.0).reshape(5, 5)
    figure = figures.similarity_heatmap(similarity, ["original"] * 3 + ["generated"] * 2)
    (heatmap,) = figure.data
    assert np.array_equal(heatmap.z, similarity)
    assert (
        list(heatmap.x) == list(heatmap.y) == ["original 0", "original 1", "original 2", "generated 0", "generated 1"]
    )
    assert {(line.x0, line.y0) for line in figure.layout.shapes} == {(2.5, 0), (0, 2.5)}
    assert list(figure.layout.xaxis.ticktext) == ["original", "generated"]


def test_heatmap_is_thinned_evenly():
    similarity = np.add.outer(np.arange(500), 1000 * np.arange(500))
    figure = figures.similarity_heatmap(similarity, ["original"] * 300 + ["generated"] * 200, limit=100)
    z = figure.data[0].z
    assert z.shape == (100, 100)
    assert (z[0, 0], z[0, -1], z[-1, 0]) == (similarity[0, 0], similarity[0, -1], similarity[-1, 0])
    assert set(np.diff(z[:, 0])) == {5, 6}
    assert figure.layout.shapes[0].x0 == 59.5


def test_loss_curves_have_a_plot_for_each_part_and_a_fitting_scale():
    figure = figures.loss_curves(history())
    assert {trace.name: trace.yaxis for trace in figure.data} == {
        "diffusion/loss": "y",
        "diffusion/heldout_loss": "y",
        "autoencoder/loss": "y2",
    }
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type == "linear"
    assert len({trace.line.color for trace in figure.data}) == 3


def test_loss_curves_are_thinned_and_keep_their_ends():
    losses = history(steps=5000)
    losses.loc[7, "value"] = inf
    for curve in figures.loss_curves(losses.sample(frac=1, random_state=0), limit=100).data:
        assert len(curve.x) == len(curve.y) == 100
        assert (curve.x[0], curve.x[-1]) == (0, 4999)
        assert np.all(np.diff(curve.x) > 0)


def test_verdict_follows_the_numbers():
    text = figures.verdict(SUMMARY)
    assert "at least as accurate as the originals (94.00% against 92.00%)" in text
    assert "they beat noise_0.05 (84.00%); they do not beat average (94.50%)" in text
    assert "less diverse than the originals (mean similarity 0.898 against 0.742)" in text
    assert "test images" not in text

    flipped = SUMMARY | {
        "val_accuracy/original_mean": 0.96,
        "val_accuracy/noise_0.05_mean": 0.95,
        "val_accuracy/average_mean": 0.93,
        "similarity/generated_generated": 0.7,
    }
    text = figures.verdict(flipped)
    assert "less accurate than the originals (94.00% against 96.00%)" in text
    assert "they beat average (93.00%); they do not beat noise_0.05 (95.00%)" in text
    assert "at least as diverse as the originals" in text


def test_verdict_gives_validation_before_test():
    tested = {key.replace("val_", "test_"): value for key, value in SUMMARY.items()}
    text = figures.verdict(tested | SUMMARY)
    assert text.index("On validation images") < text.index("On test images")


@pytest.mark.parametrize("summary", [{}, dict.fromkeys(SUMMARY, nan)])
def test_verdict_without_numbers(summary):
    assert figures.verdict(summary) == "Too little was measured for a verdict."


def test_report_is_one_page_that_needs_nothing_from_outside():
    html = report()
    page = Page(html)
    assert [script for script in page.texts["script"] if "plotly.js v" in script] == [
        max(page.texts["script"], key=len)
    ]
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not {"link", "iframe", "img", "base"} & set(page.tags)
    assert "url(" not in "".join(page.texts["style"])
    assert "@import" not in "".join(page.texts["style"])
    plots = [value for name, value in page.attributes if name == "class" and value == "plotly-graph-div"]
    assert len(plots) == len(page.texts["h2"]) == len(figures.READING)
    assert html.count('"modeBarButtons": [["toImage", ') == len(plots)


def test_report_escapes_what_it_is_given():
    evil = "<script>alert(1)</script>{title}"
    frame = evaluation().replace({"group": {"gaussian": evil}})
    summary = SUMMARY | {"config": evil, f"val_accuracy/{evil}_mean": 0.5}
    html = report(title=evil, evaluation=frame, summary=summary)
    page = Page(html)
    assert "<script>alert" not in html
    assert "".join(page.texts["h1"]) == "".join(page.texts["title"]) == "".join(page.texts["pre"]) == evil
    assert page.tags.count("script") == 1 + len(figures.READING)


def test_report_is_the_same_for_the_same_data():
    assert report() == report()


def test_report_shows_the_configuration_only_where_there_is_one():
    assert "details" not in Page(report()).tags
    page = Page(report(summary=SUMMARY | {"config": "seed: 0\n"}))
    assert page.texts["pre"] == ["seed: 0\n"]


# -- on the way, and published


def test_accuracy_over_time_has_mean_and_band():
    traces = figures.accuracy_over_time(trajectory()).data
    lines = {trace.name: trace for trace in traces if trace.name}
    assert list(lines) == ["validation", "test"]
    assert dict(zip(lines["validation"].x, lines["validation"].y, strict=True)) == pytest.approx(
        {0: 0.85, 1: 0.75, 2: 0.65}
    )
    low, high = traces[0], traces[1]
    assert high.fill == "tonexty"
    assert list(low.y) == pytest.approx([0.8, 0.7, 0.6])
    assert list(high.y) == pytest.approx([0.9, 0.8, 0.7])


PUBLISHED = {"test_accuracy/generated_mean": 0.95, "similarity/generated_generated": 0.9, "test_accuracy/x_mean": 0.5}


def test_published_numbers_stand_beside_ours():
    ours = {"test_accuracy/generated_mean": 0.93, "similarity/generated_generated": 0.95}
    rows = figures.published_table(ours, PUBLISHED).to_numpy().tolist()
    assert rows == [
        ["test % generated mean", "95.00", "93.00", "-2.00"],
        ["similarity generated generated", "0.900", "0.950", "+0.050"],
        ["test % x mean", "50.00", "–", "–"],
    ]


def test_report_shows_what_was_published_and_what_was_done_otherwise():
    page = Page(report(published=PUBLISHED, changes={"dataset.name": "<digits>"}))
    assert "Published" in page.texts["h2"]
    assert any("dataset.name=<digits>" in text for text in page.texts["p"])
    assert "Published" not in Page(report()).texts["h2"]
