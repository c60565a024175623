"""Tables and the page of an audit, against plain Python and a plain HTML parser."""

from io import StringIO
from math import isnan, nan
from statistics import fmean, pstdev

import numpy as np
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from reports import ACCURACIES, AUDITED, FEW, MEASURES, VERDICT, Page, audit, downloads, evaluation, history, trajectory

from pdiff.experiment import report
from pdiff.experiment.metrics import SYMBOLS, styles

PUBLISHED = {"test_accuracy/generated_mean": 0.95, "similarity/generated_generated": 0.9, "test_accuracy/x_mean": 0.5}


def page(**changes: object) -> str:
    """The report on a small evaluation."""
    arguments = {
        "title": "tag",
        "verdict": VERDICT,
        "tables": {"evaluation": evaluation()},
        "similarity": np.eye(5),
        "groups": ["original"] * 3 + ["generated"] * 2,
        "history": history(),
        "trajectory": trajectory(),
    }
    return report.report(**arguments | changes)


@pytest.fixture(scope="module")
def whole() -> str:
    """The report on an audit of 22 groups, with everything that it can show."""
    groups = ["original"] * 300 + ["generated"] * 200
    return page(
        tables=audit(),
        similarity=np.full((500, 500), 0.75),
        groups=groups,
        published=report.published_table({}, PUBLISHED),
        changes={"dataset.name": "<digits>"},
        config="seed: 0\n",
        lineage=[("run", "0a1b", "http://127.0.0.1:5000/#/runs/0a1b"), ("commit", "76eeb3e", "")],
    )


def test_table_agrees_with_plain_python():
    table = report.table(evaluation())
    assert list(table["group"]) == ["original", "generated", "noise_0.05", "average", "gaussian"]
    for row in table.itertuples():
        accuracies = ACCURACIES[row.group]
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
    assert list(cells.loc[1])[:7] == ["generated", "2", "94.00 ± 1.00", "95.00", "93.00 ± 1.00", "94.00", "–"]
    assert (cells.iloc[:, 7:] == "–").all(axis=None), "nothing else was measured"


@pytest.mark.parametrize("column", MEASURES)
@pytest.mark.parametrize("spoil", [lambda f, c: f.assign(**{c: nan}), lambda f, c: f.drop(columns=c)])
def test_missing_measures_do_no_harm(column, spoil):
    Page(page(tables={"evaluation": spoil(evaluation(), column)}))


@pytest.mark.slow
def test_a_table_that_is_missing_is_a_section_less(monkeypatch):
    monkeypatch.setattr(report, "page", lambda template, *, plots, **values: [shown.heading for shown in plots])
    tables = audit(FEW)
    everything = page(tables=tables)
    for name, frame in tables.items():
        without = page(tables=tables | {name: frame[:0]})
        assert set(without) < set(everything), name


@pytest.mark.parametrize(
    ("networks", "losses"),
    [
        (evaluation().drop(columns=MEASURES), pd.DataFrame(columns=["name", "step", "value"])),
        (evaluation()[:0], history()[:0]),
    ],
)
def test_figures_without_data_are_left_out(networks, losses):
    html = page(
        tables={"evaluation": networks}, similarity=np.empty((0, 0)), groups=[], history=losses, trajectory=None
    )
    parsed = Page(html)
    assert set(parsed.texts.get("h2", ())) <= {"Groups"}
    assert "script" not in parsed.tags and len(html) < 10_000, "nothing to plot, no plotly.js"


@pytest.mark.slow
def test_report_is_one_page_that_needs_nothing_from_outside(whole):
    parsed = Page(whole)
    assert [script for script in parsed.texts["script"] if "plotly.js v" in script] == [
        max(parsed.texts["script"], key=len)
    ]
    assert not {"src", "srcset", "action"} & {name for name, _ in parsed.attributes}
    addresses = {value.partition(":")[0].partition("-")[0] for name, value in parsed.attributes if name == "href"}
    assert addresses == {"data", "#section", "http"}, "its own data and sections, and the lineage that it was given"
    assert not {"link", "iframe", "img", "base"} & set(parsed.tags)
    assert "url(" not in "".join(parsed.texts["style"])
    assert "@import" not in "".join(parsed.texts["style"])


def test_sections_stand_in_their_order(whole):
    parsed = Page(whole)
    assert parsed.texts["h2"] == [*report.READING, "Lineage"]
    plots = [value for name, value in parsed.attributes if name == "class" and value == "plotly-graph-div"]
    assert len(plots) == len(report.READING) - 4, "leaderboard, groups, warm starts, and what was published are tables"
    assert whole.count('"modeBarButtons": [["toImage", ') == len(plots)
    anchors = {value for name, value in parsed.attributes if name == "href" and value.startswith("#")}
    assert anchors <= {f"#{value}" for name, value in parsed.attributes if name == "id"}


def test_the_verdict_is_the_first_thing_on_the_page(whole):
    body = whole[whole.index("<body>") :]
    assert body.index(VERDICT[0]) < body.index(VERDICT[2]) < body.index("<nav>") < body.index("<h2>")


@pytest.mark.slow
def test_data_can_be_downloaded_from_the_page(whole):
    parsed, tables = Page(whole), audit()
    found = [pd.read_csv(StringIO(text)) for text in downloads(parsed)]
    assert len(found) == len(report.READING) - 1, "all but what was published"
    for name in ("front", "comparisons", "costs"):
        expected = tables[name].reset_index(drop=True).replace("", np.nan)
        (same,) = [frame for frame in found if list(frame) == list(expected)]
        pd.testing.assert_frame_equal(same, expected, rtol=1e-4, check_dtype=False)
    names = [value for name, value in parsed.attributes if name == "download"]
    assert len(set(names)) == len(names) and "tag-accuracy-against-novelty.csv" in names


@pytest.mark.slow
def test_a_page_of_thousands_of_networks_stays_small(whole):
    assert len(audit()["evaluation"]) > 4000
    assert len(whole.encode()) - len(get_plotlyjs().encode()) < 1_200_000


def test_groups_have_the_marks_of_their_figures(whole):
    for group, style in styles(AUDITED).items():
        assert f'style="color: {style.color}">{SYMBOLS[style.symbol]}</span> {group}</td>' in whole


@pytest.mark.slow
def test_comparisons_are_text_in_points():
    rows = report.comparisons_table(audit()["comparisons"]).query("group == 'swag' and against == 'original'")
    assert rows.iloc[0].tolist() == [
        *("swag", "original", "originals", "validation", "-0.70 [-1.05, -0.35]", "< 0.001", "worse")
    ]
    assert report.comparisons_table(audit()["comparisons"].assign(p=nan)).p.eq("–").all()


def test_warm_starts_are_text():
    found = report.warm_start_table(audit(FEW)["warm_start"])
    assert found.to_numpy().tolist() == [["generated", "89.00", "90.00"], ["fresh", "10.00", "80.00"]]
    assert list(found) == ["group", "0 steps", "10 steps"]


@pytest.mark.slow
def test_costs_are_text():
    assert report.costs_table(audit()["costs"]).iloc[-1].tolist() == [
        *("training as many originals", "12,300.0", "–", "200", "61.5", "estimated from prepare")
    ]


@pytest.mark.slow
def test_report_escapes_what_it_is_given():
    evil = "<script>alert(1)</script>{{ title }}"
    tables = {name: frame.replace(dict.fromkeys(["gaussian", "generate"], evil)) for name, frame in audit(FEW).items()}
    html = page(title=evil, verdict=[evil], tables=tables, config=evil, lineage=[(evil, evil, f'"{evil}')])
    parsed = Page(html)
    assert "<script>alert" not in html
    assert "".join(parsed.texts["h1"]) == "".join(parsed.texts["title"]) == "".join(parsed.texts["pre"]) == evil
    assert parsed.tags.count("script") == 2 + html.count('class="plotly-graph-div"')


@pytest.mark.slow
def test_report_is_the_same_for_the_same_data():
    assert page() == page()


@pytest.mark.slow
def test_report_shows_configuration_and_lineage_only_where_there_are_some(whole):
    assert not {"details", "dl"} & set(Page(page()).tags)
    parsed = Page(whole)
    assert parsed.texts["pre"] == ["seed: 0\n"]
    assert parsed.texts["dt"] == ["run", "commit"] and parsed.texts["dd"] == ["76eeb3e"]
    assert ("href", "http://127.0.0.1:5000/#/runs/0a1b") in parsed.attributes


def test_published_numbers_stand_beside_ours():
    ours = {"test_accuracy/generated_mean": 0.93, "similarity/generated_generated": 0.95}
    rows = report.published_table(ours, PUBLISHED).to_numpy().tolist()
    assert rows == [
        ["test % generated mean", "95.00", "93.00", "-2.00"],
        ["similarity generated generated", "0.900", "0.950", "+0.050"],
        ["test % x mean", "50.00", "–", "–"],
    ]


@pytest.mark.slow
def test_report_shows_what_was_published_and_what_was_done_otherwise(whole):
    assert any("dataset.name=<digits>" in text for text in Page(whole).texts["p"])
    assert "Published" not in Page(page()).texts["h2"]


@pytest.mark.slow
def test_runs_are_compared_by_their_generators_and_their_best_arms():
    few = audit(FEW)
    runs = {"a <1>": few, "b": audit(FEW, seed=5) | {"costs": few["costs"][:0]}}
    differences = pd.DataFrame({"key": ["diffusion.steps"], "a <1>": ["1000"], "b": ["2000"]})
    html = report.compare_page(runs, differences)
    parsed = Page(html)
    assert parsed.texts["h2"] == list(report.COMPARING) and {"diffusion.steps", "2000"} <= set(parsed.texts["td"])
    front, votes, costs, _ = (pd.read_csv(StringIO(text)) for text in downloads(parsed))
    best = {"generated", *few["front"].query("on_front").group}
    assert best == {"generated", "average_16", "gaussian"}
    assert set(front.group) == {f"{label}: {group}" for label in runs for group in best}
    assert set(votes.group) <= set(front.group) and set(costs.group) == {"a <1>"}


def test_runs_of_which_nothing_is_known():
    assert "h2" not in Page(report.compare_page({"a": {}, "b": {}}, pd.DataFrame())).texts
