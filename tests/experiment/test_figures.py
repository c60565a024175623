"""Figures of an evaluation, against plain Python."""

from math import inf, nan

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from reports import ACCURACIES, AUDITED, audit, evaluation, history, trajectory

from pdiff.experiment import figures, metrics


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """The tables of an audit of 22 groups."""
    return audit()


def points(figure: go.Figure, name: str) -> list[tuple[float, float]]:
    """The points of the last trace of a name."""
    trace = [trace for trace in figure.data if trace.name == name][-1]
    return list(zip(trace.x.tolist(), trace.y.tolist(), strict=True))


@pytest.mark.slow
def test_front_has_a_point_for_each_group_with_its_intervals(tables):
    figure = figures.front(tables["front"], tables["evaluation"])
    for row in tables["front"].query("part == 'test'").itertuples():
        assert points(figure, row.group) == [pytest.approx((row.novelty, row.accuracy), rel=1e-5)]
        trace = [trace for trace in figure.data if trace.name == row.group][-1]
        assert trace.x[0] + trace.error_x.array[0] == pytest.approx(row.novelty_high, rel=1e-5)
        assert trace.x[0] - trace.error_x.arrayminus[0] == pytest.approx(row.novelty_low, rel=1e-5)
        assert trace.y[0] + trace.error_y.array[0] == pytest.approx(row.accuracy_high, rel=1e-5)
    (line,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y, reverse=True), "a front falls"
    assert {shape.x0 for shape in figure.layout.shapes} == {1}


def test_front_shows_the_networks_of_generators_with_their_group(tables):
    figure = figures.front(tables["front"], tables["evaluation"])
    clouds = {trace.legendgroup: len(trace.x) for trace in figure.data if trace.showlegend is False}
    assert clouds == {"original": 300, "heldout": 60, "generated": 200}


@pytest.mark.slow
def test_a_front_on_validation_images_alone(tables):
    figure = figures.front(tables["front"].query("part == 'validation'"), tables["evaluation"])
    assert figure.layout.yaxis.title.text == "validation accuracy"
    assert not figures.front(tables["front"][:0], tables["evaluation"][:0]).data


@pytest.mark.slow
def test_arms_far_below_do_not_squeeze_the_others(tables):
    low, high = figures.front(tables["front"], tables["evaluation"]).layout.yaxis.range
    inside = tables["front"].query("part == 'test'").accuracy.between(low, high)
    assert 0.65 < low < 0.88 and high > 0.91 and inside.mean() > 0.7
    failed = tables["front"].assign(accuracy=lambda f: f["accuracy"].where(f["group"] != "generated", 0.1))
    window = figures.front(failed, tables["evaluation"]).layout.yaxis.range
    assert window is None or window[0] < 0.1, "a generator that fails is seen"
    alike = tables["front"].query("group in ['original', 'generated', 'heldout']")
    low, high = figures.front(alike, tables["evaluation"]).layout.yaxis.range
    assert low < alike["accuracy_low"].min() < alike["accuracy_high"].max() < high


@pytest.mark.slow
def test_novelty_near_1_is_told_apart(tables):
    """A logarithmic axis only where an arm is many times as far as held-out networks, not for noise that is near 0."""
    near = tables["front"].query("part == 'test'").assign(novelty=0.9)
    near.iloc[0, near.columns.get_loc("novelty")] = 0.001
    assert figures.front(near, tables["evaluation"]).layout.xaxis.type == "-"
    far = near.assign(novelty=[0.5, *[50] * (len(near) - 1)])
    assert figures.front(far, tables["evaluation"]).layout.xaxis.type == "log"


def test_distances_have_a_row_for_each_group(tables):
    figure = figures.distances(tables["evaluation"])
    assert [trace.y0 for trace in figure.data] == list(AUDITED)
    for trace in figure.data:
        expected = tables["evaluation"].query("group == @trace.y0").nearest_distance
        assert np.allclose(trace.x, expected)


@pytest.mark.parametrize(
    ("name", "x", "columns"),
    [
        ("votes", "networks", ["accuracy", "nll", "ece"]),
        ("calibration", "confidence", ["accuracy"]),
        ("spectrum", "component", ["rms_ratio"]),
    ],
)
def test_curves_hold_the_numbers_of_their_table(tables, name, x, columns):
    table = tables[name]
    figure = getattr(figures, name)(table)
    rows = table[table["group"] == "generated"]
    rows = rows[rows["part"] == "test"] if "part" in rows else rows
    rows = rows[rows["count"] > 0] if "count" in rows else rows
    traces = [trace for trace in figure.data if trace.name == "generated"]
    assert len(traces) == len(columns) and [trace.showlegend for trace in traces] == [True] + [False] * (
        len(columns) - 1
    )
    for trace, column in zip(traces, columns, strict=True):
        assert np.allclose(trace.x, rows[x]) and np.allclose(trace.y, rows[column])


def test_tensors_are_compared_with_those_of_the_originals():
    rows = [
        ("original", "a", 1.0, 2.0),
        ("original", "b", 0.0, 1.0),
        ("generated", "b", 0.5, 3.0),
        ("generated", "a", 0, 1),
    ]
    figure = figures.layers(pd.DataFrame(rows, columns=["group", "tensor", "mean", "std"]))
    shift, ratio = figure.data
    assert list(shift.text) == ["a", "b"]
    assert list(zip(shift.x, shift.y, strict=True)) == [(1, -0.5), (2, 0.5)]
    assert list(ratio.y) == [0.5, 3]


def test_null_arms_wait_in_the_legend_of_the_latent_space(tables):
    figure = figures.latents(figures.less_crowded(tables["latents"]))
    shown = {trace.name: trace.visible for trace in figure.data}
    assert shown == dict.fromkeys(("original", "heldout", "generated"), True) | dict.fromkeys(
        figures.SHOWN_ARMS, "legendonly"
    )


def test_forest_can_be_read_without_colour(tables):
    figure = figures.forest(tables["comparisons"])
    assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data) == 3
    labels = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    found = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in figure.data}
    for row in tables["comparisons"].query("part == 'test'").itertuples():
        place = labels[f"{row.group} – {row.against}"]
        assert found[row.verdict][place] == pytest.approx(100 * row.difference, rel=1e-5)
    assert len(labels) == len(tables["comparisons"]) / 2 + 2, "a heading for each question"


def test_costs_are_bars_of_seconds(tables):
    (bars,) = figures.costs(tables["costs"]).data
    assert dict(zip(bars.y, bars.x.tolist(), strict=True)) == pytest.approx(
        dict(zip(tables["costs"].stage, tables["costs"].seconds, strict=True)), rel=1e-5
    )


def test_thinning_keeps_groups_and_spreads_what_it_keeps(tables):
    kept = figures.thinned(tables["evaluation"], 50)
    assert kept.groupby("group").size().to_dict() == {group: min(50, count) for group, (count, *_) in AUDITED.items()}
    steps = np.diff(kept.query("group == 'original'")["index"])
    assert set(steps) == {6}
    components = figures.thinned_components(tables["spectrum"]).query("group == 'original'").component
    assert {1, 2, 3, 299} < set(components) and len(components) < 60


@pytest.mark.parametrize(
    "name", ["latents", "spectrum", "votes", "calibration", "layers", "forest", "costs", "distances"]
)
def test_figures_of_nothing_are_empty(tables, name):
    table = {"forest": "comparisons", "distances": "evaluation"}.get(name, name)
    assert not getattr(figures, name)(tables[table][:0]).data


def test_scatter_shows_every_network_once_in_the_style_of_its_group():
    figure = figures.accuracy_against_similarity(evaluation())
    assert [trace.name for trace in figure.data] == ["original", "generated", "noise_0.05", "average", "gaussian"]
    for group, accuracies in ACCURACIES.items():
        assert np.allclose(points(figure, group), [(a - 0.1, a - 0.01) for a in accuracies])
    few = figures.accuracy_against_similarity(evaluation().query("group in ['gaussian', 'generated']"))
    looks = {trace.name: (trace.marker.color, trace.marker.symbol) for trace in figure.data}
    assert len(set(looks.values())) == 5
    assert {trace.name: (trace.marker.color, trace.marker.symbol) for trace in few.data}.items() <= looks.items()


def test_scatter_falls_back_to_validation_accuracy():
    figure = figures.accuracy_against_similarity(evaluation().assign(test_accuracy=nan))
    assert list(figure.data[0].y) == pytest.approx(ACCURACIES["original"])
    assert figure.layout.yaxis.title.text == "validation accuracy"


def test_distributions_hold_both_splits():
    boxes = {trace.name: trace for trace in figures.accuracy_distributions(evaluation()).data}
    assert boxes["original validation"].y0 == boxes["original test"].y0 == "original"
    assert list(boxes["original validation"].x) == pytest.approx([0.90, 0.92, 0.94])
    assert list(boxes["original test"].x) == pytest.approx([0.89, 0.91, 0.93])


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


def test_each_alarm_has_a_small_plot_below_the_losses():
    rows = [(name, step, 0.5 + step / 10) for name in metrics.DIAGNOSTICS for step in (1, 2, 3)]
    alarms = pd.DataFrame(rows, columns=["name", "step", "value"])
    figure = figures.loss_curves(pd.concat([alarms, history()]))
    axes = {trace.name: figure.layout[trace.yaxis.replace("y", "yaxis")] for trace in figure.data}
    assert [axis.title.text for axis in axes.values()] == [
        *("diffusion", "diffusion", "autoencoder", "dispersion", "nearest ratio")
    ]
    assert [axes[name].type for name in metrics.DIAGNOSTICS] == ["linear"] * 2
    heights = {name: high - low for name, (low, high) in ((name, axis.domain) for name, axis in axes.items())}
    assert all(heights[name] == pytest.approx(heights["diffusion/loss"] / 2) for name in metrics.DIAGNOSTICS)


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


def test_control_has_a_point_for_each_network_and_the_diagonal(tables):
    figure, asked = figures.control(tables["control"]), tables["control"]
    assert points(figure, "generated") == [pytest.approx(row, rel=1e-6) for row in asked.to_numpy()]
    (line,) = figure.layout.shapes
    assert line.x0 == line.y0 == asked.to_numpy().min() and line.x1 == line.y1 == asked.to_numpy().max()


def test_losses_of_a_single_point_are_left_out():
    losses = history()
    losses = losses[(losses["name"] != "autoencoder/loss") | (losses["step"] == 0)]  # of a PCA, which has no steps
    figure = figures.loss_curves(losses)
    assert [trace.name for trace in figure.data] == ["diffusion/loss", "diffusion/heldout_loss"]
    assert not figures.loss_curves(losses[losses["name"] == "autoencoder/loss"]).data


def test_nothing_is_plotted_over_a_single_timestep():
    assert not figures.accuracy_over_time(trajectory().query("timestep == 1")).data
