"""The table of metrics: one entry is enough everywhere, and what is computed from predictions, against plain Python."""

import subprocess
import sys
from itertools import product
from statistics import fmean, pstdev

import numpy as np
import pandas as pd
import pytest
import torch
from reports import AUDITED, Page, history
from tracked import TINY

from pdiff.errors import UserError
from pdiff.experiment import config, documents, leaderboard, metrics, report, stages, summary
from pdiff.experiment.leaderboard import Result
from pdiff.experiment.metrics import Metric
from pdiff.method import vectors
from pdiff.method.collection import Collection
from pdiff.method.standardize import Standardizer
from pdiff.method.vectors import Vectors
from pdiff.networks.evaluators import Evaluation
from pdiff.sweeps import schema

SIZES = {"original": 4, "generated": 3, "noise_0.05": 2, "average": 1}


@pytest.fixture
def groups() -> dict[str, Collection]:
    """Small networks of two tensors."""
    g = torch.Generator().manual_seed(0)
    tensors = lambda n: {"weight": torch.randn(n, 3, 2, generator=g), "bias": torch.randn(n, 2, generator=g)}  # noqa: E731
    return {name: Collection(tensors(count)) for name, count in SIZES.items()}


@pytest.fixture
def results() -> dict[str, dict[str, Evaluation]]:
    """Errors on 9 validation and 11 test images; the first original makes none."""
    g = torch.Generator().manual_seed(1)
    found = {}
    for part, images in {"validation": 9, "test": 11}.items():
        wrong = {name: torch.rand(count, images, generator=g) < 0.4 for name, count in SIZES.items()}
        wrong["original"][0] = False
        found[part] = {name: Evaluation.of(rows) for name, rows in wrong.items()}
    return found


def compared(groups, results) -> tuple[pd.DataFrame, dict[str, torch.Tensor], dict[str, float]]:
    found = summary.evaluated(groups, results, Standardizer.fit(groups["original"]))
    evaluation, matrices = summary.evaluation_table(found), summary.similarity_matrices(found)
    return evaluation, matrices, summary.summary(found, evaluation, matrices)


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    """The oracle: sets of images."""
    one, other = ({k for k, wrong in enumerate(row) if wrong} for row in (a.tolist(), b.tolist()))
    return len(one & other) / len(one | other) if one | other else 1.0


def test_networks_are_measured_as_in_plain_python(groups, results):
    evaluation, matrices, _ = compared(groups, results)
    measured = ["val_accuracy", "test_accuracy", "max_similarity", "nearest_distance", "nearest_ratio", "outside_span"]
    assert list(evaluation.columns) == ["group", "index", *measured]
    assert evaluation.groupby("group", sort=False).size().to_dict() == SIZES
    wrong = {name: found.wrong for name, found in results["test"].items()}
    for row in evaluation.to_dict("records"):
        errors = wrong[row["group"]][row["index"]]
        assert row["test_accuracy"] == pytest.approx(1 - errors.double().mean().item())
        others = [k for k in range(4) if (row["group"], row["index"]) != ("original", k)]
        assert row["max_similarity"] == pytest.approx(max(iou(errors, wrong["original"][k]) for k in others))
    for part, matrix in matrices.items():
        rows = torch.cat([results[part][name].wrong for name in ("original", "generated")])
        expected = [[iou(a, b) for b in rows] for a in rows]
        assert np.allclose(matrix, expected)


def test_the_summary_agrees_with_plain_python(groups, results):
    evaluation, matrices, found = compared(groups, results)
    for name, part in product(SIZES, ("val", "test")):
        values = evaluation[evaluation.group == name][f"{part}_accuracy"].tolist()
        expected = {"mean": fmean(values), "max": max(values), "min": min(values), "std": pstdev(values)}
        for statistic, value in expected.items():
            assert found[f"{part}_accuracy/{name}_{statistic}"] == pytest.approx(value)
    matrix = matrices["validation"].tolist()
    pairs = [matrix[a][b] for a, b in product(range(4), range(4)) if a != b]
    assert found["val_similarity/original_original"] == pytest.approx(fmean(pairs))
    nearest = [max(matrix[a][:4]) for a in range(4, 7)]
    assert found["val_similarity/original_generated_max"] == pytest.approx(fmean(nearest))
    assert found.keys() >= {f"similarity/{pair}" for pair in metrics.PAIRS}


def test_what_cannot_be_measured_is_left_out(groups, results):
    accuracies = {name: Evaluation(evaluation.accuracy) for name, evaluation in results["test"].items()}
    evaluation, matrices, found = compared(groups, {"test": accuracies})  # as a command that prints accuracies
    in_weights = ["nearest_distance", "nearest_ratio", "outside_span"]
    assert list(evaluation.columns) == ["group", "index", "test_accuracy", *in_weights]
    assert not matrices
    assert not any("similarity" in name or name.startswith("val_") for name in found)
    assert list(compared(groups, {})[0].columns) == ["group", "index", *in_weights]


def test_every_group_is_encoded_once(groups, results, monkeypatch):
    encoded, encode = [], Standardizer.vectors
    monkeypatch.setattr(Standardizer, "vectors", lambda self, x, **o: encoded.append(len(x)) or encode(self, x, **o))
    compared(groups, results)
    assert encoded == list(SIZES.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_diffusion", "gaussian"])
def test_stages_log_what_they_say(tmp_path, kind):
    """Sweeps refuse every other metric."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    experiment, folders = config.load(str(tmp_path / "tiny.yaml"), {"generator.kind": kind}), {}
    for name in stages.of(experiment):
        points, out = [], tmp_path / name
        out.mkdir()
        upstream = {other: folders[other] for other in stages.reads(name, experiment)}
        final = stages.run(name, experiment, out, log=points.append, **upstream)
        assert {point.name for point in points} | final.keys() <= set(stages.STAGES[name].logs(experiment)), name
        folders[name] = out


# -- a new metric is one entry


@pytest.fixture
def loudness(monkeypatch) -> None:
    """A metric that pdiff does not have."""
    entry = Metric(
        "loudness",
        part="test",
        heading="loud",
        unit="%",
        better="lower",
        digits=1,
        measure=lambda group: group.networks.tensors["bias"].abs().mean(dim=1),
        statistics=("mean", "min"),
        columns=("mean ± std", "min"),
    )
    monkeypatch.setitem(metrics.METRICS, "loudness", entry)
    monkeypatch.setitem(metrics.COMPARED, "generated loudness", "loudness/generated_mean")


@pytest.mark.slow
def test_a_new_metric_is_measured_and_shown(groups, results, loudness):
    evaluation, matrices, found = compared(groups, results)
    values = groups["generated"].tensors["bias"].abs().mean(dim=1).tolist()
    assert evaluation[evaluation.group == "generated"]["loudness"].tolist() == pytest.approx(values)
    assert found["loudness/generated_mean"] == pytest.approx(fmean(values))
    assert "loudness/original_min" in found and "loudness/original_max" not in found

    expected = f"{100 * fmean(values):.1f} ± {100 * pstdev(values):.1f}"
    cells = report.cells(report.table(evaluation)).set_index("group")  # what the terminal prints
    assert cells.loc["generated", "loud %"] == expected and "min loud" in cells

    page = Page(
        report.report(
            title="tag",
            verdict=[],
            tables={"evaluation": evaluation},
            similarity=matrices["test"].numpy(),
            groups=["original"] * 4 + ["generated"] * 3,
            history=history(),
            published=report.published_table(found, {"loudness/generated_mean": 0.5}),
        )
    )
    assert "loud %" in page.texts["th"] and "min loud" not in page.texts["th"]  # headlines alone
    assert expected in page.texts["td"]
    assert ("title", "test loudness, lower is better") in page.attributes
    assert "loud % generated mean" in page.texts["td"]
    assert any("test loudness %{customdata[" in script for script in page.texts["script"])


def test_a_new_metric_is_compared_in_its_unit(loudness):
    name = "loudness/generated_mean"
    board = leaderboard.table([Result("a", {name: 0.5}, {name: 0.4})])
    assert "40.0 (50.0)" in leaderboard.cells(board).iloc[0].tolist()
    assert "generated loudness, %" in Page(leaderboard.page(board)).texts["th"]
    table = metrics.readable(pd.DataFrame({"tag": ["a"], name: [0.4], "run": ["id"]}))
    assert table.to_dict("records") == [{"tag": "a", "generated loudness": "40.0", "run": "id"}]


def test_nothing_is_selected_by_a_new_metric_of_test_images(tmp_path, loudness):
    path = tmp_path / "sweep.yaml"
    parameters = {"diffusion.steps": {"kind": "int", "low": 1, "high": 9}}
    path.write_text(
        documents.as_text({"objectives": {"loudness/generated_mean": "minimize"}, "parameters": parameters})
    )
    with pytest.raises(UserError, match="loudness/generated_mean is measured on test images"):
        schema.load(str(path))


def test_the_parts_of_the_table_agree():
    for name in metrics.COMPARED.values():
        assert metrics.find(name) is metrics.METRICS[name.partition("/")[0]]
    assert set(metrics.OFF_BOARD) < set(metrics.COMPARED)
    assert metrics.by_part("accuracy") == {"validation": "val_accuracy", "test": "test_accuracy"}
    assert metrics.on_validation("similarity/original_original") == "val_similarity/original_original"
    for metric in metrics.METRICS.values():
        columns = {statistic for column in metric.columns for statistic in column.split(" ± ")}
        assert columns | set(metric.statistics) <= set(metrics.STATISTICS)


# -- styles of groups


def test_groups_keep_their_style_whatever_stands_beside_them():
    everything = metrics.styles([*AUDITED, "theirs", "noise_0.3", "average_8"])
    for group, style in everything.items():
        if group not in ("theirs", "noise_0.3", "average_8"):
            assert metrics.styles([group, "another"])[group] == style
    assert len(set(everything.values())) == len(everything), "no two look the same"
    assert {style.symbol for style in everything.values()} <= set(metrics.SYMBOLS)


def test_arms_share_the_colour_of_their_family_and_stand_together():
    found = metrics.styles(["average_8", "theirs", "recombined_2", "noise_0.3", "average", "generated", "original"])
    assert list(found) == ["original", "generated", "theirs", "noise_0.3", "average", "average_8", "recombined_2"]
    assert found["average_8"].color == found["average"].color and found["average_8"] != found["average"]
    assert [group for group in found if metrics.is_null_arm(group)] == list(found)[3:]


@pytest.mark.parametrize(
    ("group", "family"),
    [
        ("gaussian", "gaussians"),
        ("gaussian_2", "named"),
        ("noise_1e-05", "noise"),
        ("originals", "named"),
        ("", "named"),
    ],
)
def test_families(group, family):
    assert metrics.family(group) == family


IMPORTS = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(f"pdiff.experiment.{module}")
    print(module, *sorted({"torch", "plotly", "pandas"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_what_is_imported_is_what_is_needed():
    """One after the other in one process: what a module needs, the next ones may have."""
    needed = {"metrics": "", "report": " pandas", "leaderboard": " pandas", "figures": " pandas plotly"}
    words = [sys.executable, "-c", IMPORTS, *needed]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [module + libraries for module, libraries in needed.items()]


def test_groups_that_are_large_together_are_measured_as_small_ones(groups, results, monkeypatch) -> None:
    """In memory or not, with inner products in one pass over all groups or in one for each."""
    standardizer = Standardizer.fit(groups["original"])
    size = 4 * sum(SIZES.values()) * standardizer.size
    found = []
    for least, kind, together in ((size, torch.Tensor, True), (size - 1, Vectors, True), (size, torch.Tensor, False)):
        monkeypatch.setattr(vectors, "IN_MEMORY", least)
        evaluated = summary.evaluated(groups, results, standardizer)
        assert all(isinstance(group.vectors, kind) for group in evaluated.values())
        for group in evaluated.values() if not together else ():
            group.beside = {}
        found.append(summary.summary(evaluated, summary.evaluation_table(evaluated), {}))
    assert any(name.startswith("dispersion/") for name in found[0])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6, abs=1e-6)
