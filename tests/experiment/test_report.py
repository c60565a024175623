"""Tables, findings and the page of an evaluation, against plain Python and a plain HTML parser."""

from math import isnan, nan
from statistics import fmean, pstdev

import numpy as np
import pandas as pd
import pytest
from reports import ACCURACIES, MEASURES, Page, evaluation, history, trajectory

from pdiff.experiment import report

SUMMARY = {
    "val_accuracy/original_mean": 0.92,
    "val_accuracy/generated_mean": 0.94,
    "val_accuracy/average_mean": 0.945,
    "val_accuracy/noise_0.05_mean": 0.84,
    "similarity/original_original": 0.742,
    "similarity/generated_generated": 0.898,
    "similarity/original_generated_max": 0.85,
}


def page(**changes: object) -> str:
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
    return report.report(**arguments | changes)


def test_table_agrees_with_plain_python():
    table = report.table(evaluation())
    assert list(table["group"]) == list(ACCURACIES)
    for row, accuracies in zip(table.itertuples(), ACCURACIES.values(), strict=True):
        assert row.networks == len(accuracies)
        assert row.val_accuracy_mean == pytest.approx(fmean(accuracies))
        assert row.val_accuracy_std == row.test_accuracy_std == pytest.approx(pstdev(accuracies))
        assert row.val_accuracy_max == max(accuracies)
        assert row.test_accuracy_mean == pytest.approx(fmean(accuracies) - 0.01)
        assert row.test_accuracy_max == pytest.approx(max(accuracies) - 0.01)
        assert row.max_similarity_mean == pytest.approx(fmean(accuracies) - 0.1)


def test_table_skips_values_that_are_missing():
    frame = evaluation().drop(columns="test_accuracy")
    frame.loc[0, "val_accuracy"] = nan
    row = next(report.table(frame).itertuples())
    assert row.val_accuracy_mean == pytest.approx(0.93)
    assert isnan(row.test_accuracy_mean)
    assert isnan(row.test_accuracy_max)


def test_cells_are_in_percent():
    cells = report.cells(report.table(evaluation().assign(max_similarity=nan)))
    assert next(iter(cells)) == "group"
    assert list(cells.loc[1]) == ["generated", "2", "94.00 ± 1.00", "95.00", "93.00 ± 1.00", "94.00", "–"]


@pytest.mark.parametrize("column", MEASURES)
@pytest.mark.parametrize("spoil", [lambda f, c: f.assign(**{c: nan}), lambda f, c: f.drop(columns=c)])
def test_missing_measures_do_no_harm(column, spoil):
    Page(page(evaluation=spoil(evaluation(), column)))


@pytest.mark.parametrize(
    ("networks", "losses"),
    [
        (evaluation().drop(columns=MEASURES), pd.DataFrame(columns=["name", "step", "value"])),
        (evaluation()[:0], history()[:0]),
    ],
)
def test_figures_without_data_are_left_out(networks, losses):
    html = page(evaluation=networks, similarity=np.empty((0, 0)), groups=[], history=losses, trajectory=None)
    parsed = Page(html)
    assert "h2" not in parsed.texts
    assert "script" not in parsed.tags and len(html) < 10_000, "nothing to plot, no plotly.js"


def test_findings_follow_the_numbers():
    text = report.findings(SUMMARY)
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
    text = report.findings(flipped)
    assert "less accurate than the originals (94.00% against 96.00%)" in text
    assert "they beat average (93.00%); they do not beat noise_0.05 (95.00%)" in text
    assert "at least as diverse as the originals" in text


def test_findings_give_validation_before_test():
    tested = {key.replace("val_", "test_"): value for key, value in SUMMARY.items()}
    text = report.findings(tested | SUMMARY)
    assert text.index("On validation images") < text.index("On test images")


@pytest.mark.parametrize("summary", [{}, dict.fromkeys(SUMMARY, nan)])
def test_findings_without_numbers(summary):
    assert report.findings(summary) == "Too little was measured to compare the groups."


def test_report_is_one_page_that_needs_nothing_from_outside():
    html = page()
    parsed = Page(html)
    assert [script for script in parsed.texts["script"] if "plotly.js v" in script] == [
        max(parsed.texts["script"], key=len)
    ]
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in parsed.attributes}
    assert not {"link", "iframe", "img", "base"} & set(parsed.tags)
    assert "url(" not in "".join(parsed.texts["style"])
    assert "@import" not in "".join(parsed.texts["style"])
    plots = [value for name, value in parsed.attributes if name == "class" and value == "plotly-graph-div"]
    assert len(plots) == len(parsed.texts["h2"]) == len(report.READING)
    assert html.count('"modeBarButtons": [["toImage", ') == len(plots)


def test_report_escapes_what_it_is_given():
    evil = "<script>alert(1)</script>{{ title }}"
    frame = evaluation().replace({"group": {"gaussian": evil}})
    summary = SUMMARY | {"config": evil, f"val_accuracy/{evil}_mean": 0.5}
    html = page(title=evil, evaluation=frame, summary=summary)
    parsed = Page(html)
    assert "<script>alert" not in html
    assert "".join(parsed.texts["h1"]) == "".join(parsed.texts["title"]) == "".join(parsed.texts["pre"]) == evil
    assert parsed.tags.count("script") == 1 + len(report.READING)


def test_report_is_the_same_for_the_same_data():
    assert page() == page()


def test_report_shows_the_configuration_only_where_there_is_one():
    assert "details" not in Page(page()).tags
    parsed = Page(page(summary=SUMMARY | {"config": "seed: 0\n"}))
    assert parsed.texts["pre"] == ["seed: 0\n"]


PUBLISHED = {"test_accuracy/generated_mean": 0.95, "similarity/generated_generated": 0.9, "test_accuracy/x_mean": 0.5}


def test_published_numbers_stand_beside_ours():
    ours = {"test_accuracy/generated_mean": 0.93, "similarity/generated_generated": 0.95}
    rows = report.published_table(ours, PUBLISHED).to_numpy().tolist()
    assert rows == [
        ["test % generated mean", "95.00", "93.00", "-2.00"],
        ["similarity generated generated", "0.900", "0.950", "+0.050"],
        ["test % x mean", "50.00", "–", "–"],
    ]


def test_report_shows_what_was_published_and_what_was_done_otherwise():
    parsed = Page(page(published=PUBLISHED, changes={"dataset.name": "<digits>"}))
    assert "Published" in parsed.texts["h2"]
    assert any("dataset.name=<digits>" in text for text in parsed.texts["p"])
    assert "Published" not in Page(page()).texts["h2"]
