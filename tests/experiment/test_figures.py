"""Figures of an evaluation, against plain Python."""

from math import inf, nan

import numpy as np
import pandas as pd
import pytest
from reports import ACCURACIES, evaluation, history, trajectory

from pdiff.experiment import figures, metrics


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
    rows = [(name, step, 0.5 + step / 10) for name in metrics.ALARMS for step in (1, 2, 3)]
    alarms = pd.DataFrame(rows, columns=["name", "step", "value"])
    figure = figures.loss_curves(pd.concat([alarms, history()]))
    axes = {trace.name: figure.layout[trace.yaxis.replace("y", "yaxis")] for trace in figure.data}
    assert [axis.title.text for axis in axes.values()] == [
        *("diffusion", "diffusion", "autoencoder", "dispersion", "nearest ratio")
    ]
    assert [axes[name].type for name in metrics.ALARMS] == ["linear"] * 2
    heights = {name: high - low for name, (low, high) in ((name, axis.domain) for name, axis in axes.items())}
    assert all(heights[name] == pytest.approx(heights["diffusion/loss"] / 2) for name in metrics.ALARMS)


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


def test_losses_of_a_single_point_are_left_out():
    losses = history()
    losses = losses[(losses["name"] != "autoencoder/loss") | (losses["step"] == 0)]  # of a PCA, which has no steps
    figure = figures.loss_curves(losses)
    assert [trace.name for trace in figure.data] == ["diffusion/loss", "diffusion/heldout_loss"]
    assert not figures.loss_curves(losses[losses["name"] == "autoencoder/loss"]).data


def test_nothing_is_plotted_over_a_single_timestep():
    assert not figures.accuracy_over_time(trajectory().query("timestep == 1")).data
