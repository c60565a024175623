"""The leaderboard: what counts as a tag's result, and what the board says of it."""

import csv
import shutil
from math import isnan, nan
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from reports import Page

from pdiff.cli.main import main
from pdiff.experiment import config, figures, leaderboard
from pdiff.experiment import published as published_module
from pdiff.experiment.leaderboard import Result

PUBLISHED = """tag,metric,value
digits_mlp,test_accuracy/original_mean,0.95
digits_mlp,test_accuracy/generated_mean,0.96
digits_mlp,similarity/original_original,0.75
cifar100_resnet18,test_accuracy/original_mean,0.7672
cifar100_resnet18,test_accuracy/generated_mean,0.7724
"""
MEASURES = leaderboard.shown()
OURS = {metric: 0.9 + k / 100 for k, metric in enumerate(MEASURES.values())}


def published(tag: str) -> dict[str, float]:
    rows = csv.DictReader(PUBLISHED.splitlines())
    return {row["metric"]: float(row["value"]) for row in rows if row["tag"] == tag}


@pytest.fixture(scope="module")
def store(tmp_path_factory, tracking_store):
    """A tracking store with finished evaluations of every kind, made at seconds 1, 2, ..."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "PDIFF_WORK"):
            patch.delenv(name, raising=False)
        patch.setattr(published_module, "published", published)
        shutil.copy(tracking_store, folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        evaluated("digits_mlp", 1, "main", gain=0.01)
        evaluated("digits_mlp", 2, "evaluate", gain=0.02, device="cpu")  # the device changes no result
        evaluated("digits_mlp", 3, "main", gain=0.03, overrides={"seed": "1", "dataset.name": "fashion_mnist"})
        evaluated("digits_mlp", 4, "main", gain=0.04, status="FAILED")
        evaluated("digits_mlp", 5, "prepare", gain=0.05)
        evaluated("digits_cnn", 6, "main", gain=0.06, overrides={"generate.count": "7"})
        evaluated("digits_cnn", 7, "main", gain=0.07, overrides={"generate.count": "8"})
        evaluated("mine", 8, "main", gain=0.08, like="digits_mlp")
        yield folder
        mlflow.set_tracking_uri(None)


def evaluated(tag, second, stage, *, gain, status="FINISHED", overrides=None, device="auto", like=None):
    """Log a run as the platform does, with metrics of its own."""
    client, experiment = MlflowClient(), config.load(like or tag, {**(overrides or {}), "device": device})
    run = client.create_run("0", start_time=1000 * second, tags={"pdiff.stage": stage, "pdiff.tag": tag})
    parameters = [Param(f"config.{key}", str(value)) for key, value in config.flat(experiment).items()]
    metrics = [Metric(metric, value + gain, 0, 0) for metric, value in OURS.items()]
    client.log_batch(run.info.run_id, metrics, parameters)
    client.set_terminated(run.info.run_id, status, end_time=1000 * second + 1)


def boards() -> list[tuple[Path, pd.DataFrame]]:
    """Every leaderboard in the store, the latest first: the folder of its artifacts, its table."""
    ids = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    runs = mlflow.search_runs(ids, "tags.`pdiff.stage` = 'leaderboard'", output_format="list")
    assert {run.info.status for run in runs} == {"FINISHED"}
    folders = [Path(run.info.artifact_uri) for run in runs]
    return [(folder, pd.read_csv(folder / "leaderboard.csv").fillna({"changed": "", "run": ""})) for folder in folders]


@pytest.mark.slow
def test_the_latest_evaluation_counts_and_one_without_changes_before_any_other(store, capsys):
    assert main(["leaderboard"]) == 0
    printed = capsys.readouterr().out
    folder, board = boards()[0]
    rows = {row["tag"]: row for row in board.to_dict("records")}
    expected = {"digits_mlp": (0.02, ""), "digits_cnn": (0.07, "generate.count=8"), "mine": (0.08, "")}
    for tag, (gain, changed) in expected.items():
        assert rows[tag]["changed"] == changed
        for name, metric in MEASURES.items():
            ours, theirs = rows[tag][f"{name} ours"], published(tag).get(metric, nan)
            assert ours == pytest.approx(OURS[metric] + gain)
            assert rows[tag][f"{name} published"] == pytest.approx(theirs, nan_ok=True)
            assert rows[tag][f"{name} difference"] == pytest.approx(ours - theirs, nan_ok=True)
    never = rows["cifar100_resnet18"]
    assert (never["original mean published"], never["run"]) == (0.7672, "")
    assert isnan(never["original mean ours"]) and isnan(never["original mean difference"])
    assert set(rows) == {*config.runnable(), "mine"}
    assert list(rows)[:4] == ["digits_mlp", "digits_cnn", "mine", "cifar100_resnet18"]
    assert "92.00 (95.00)" in printed and "generate.count=8" in printed and str(folder) in printed


@pytest.mark.slow
def test_a_run_with_changes_stands_for_its_tag_where_there_is_no_other(store):
    client = MlflowClient()
    kept = mlflow.search_runs(["0"], "tags.`pdiff.tag` = 'digits_mlp'", output_format="list")
    hidden = [run.info.run_id for run in kept if run.info.start_time < 3000]
    for run_id in hidden:
        client.delete_run(run_id)
    try:
        assert main(["leaderboard", "mlp", "--only", "ours"]) == 0
    finally:
        for run_id in hidden:
            client.restore_run(run_id)
    (row,) = boards()[0][1].to_dict("records")
    assert (row["tag"], row["changed"]) == ("digits_mlp", "seed=1; dataset.name=fashion_mnist")
    assert row["original mean ours"] == pytest.approx(0.93)


@pytest.mark.slow
def test_words_and_only_ours_choose_tags(store):
    assert main(["leaderboard", "cnn", "resnet18", "--only=ours"]) == 0
    assert list(boards()[0][1]["tag"]) == ["digits_cnn"]
    assert main(["leaderboard", "cnn", "cifar100_resnet18"]) == 0
    assert set(boards()[0][1]["tag"]) >= {"digits_cnn", "fashion_cnn", "cifar100_resnet18"}
    assert main(["leaderboard", "no_such_tag"]) == 0
    assert boards()[0][1].empty


RESULTS = [
    Result("a", {MEASURES["original mean"]: 0.5, MEASURES["generated mean"]: 0.6}),
    Result("b", {}, {MEASURES["original mean"]: 0.7, MEASURES["generated mean"]: 0.65}, {"x.y": "<b>", "z": 1}, "id"),
    Result("c"),
]


def test_the_page_says_what_the_numbers_say_and_needs_nothing_from_outside():
    html = leaderboard.page(leaderboard.table(RESULTS))
    page = Page(html)
    text = "".join(text for tag, texts in page.texts.items() if tag != "script" for text in texts)
    assert not {"src", "href", "srcset"} & {name for name, _ in page.attributes}
    assert "1 of 3 tags were run here, 1 of them with changes." in text
    assert "In 1 of 1 published results generated networks are on average more accurate" in text
    assert "In 0 of 1 runs of ours" in text and "the mean difference is -5.00 points" in text
    assert "x.y=<b> +1" in text and "x.y=<b>; z=1" in text  # short in the table, all of it below
    assert [value for _, value in page.attributes].count("plotly-graph-div") == 1  # no similarity, no figure of it


def test_every_pair_is_plotted_once_with_its_difference():
    figure = figures.dumbbells(leaderboard.table(RESULTS), "original mean", "generated mean")
    points = {trace.name: (*trace.x, *trace.customdata[:, 0]) for trace in figure.data if trace.mode == "markers"}
    expected = {
        "published: original mean": (50, "a"),
        "published: generated mean": (60, "a"),
        "published: difference": (10, "a"),
        "ours: original mean": (70, "b"),
        "ours: generated mean": (65, "b"),
        "ours: difference": (-5, "b"),
    }
    assert points.keys() == expected.keys()
    for name, (value, tag) in expected.items():
        assert points[name] == (pytest.approx(value), tag)
    lines = [[x for x in trace.x if x == x] for trace in figure.data if trace.mode == "lines"]
    assert lines == [pytest.approx([50, 60]), pytest.approx([70, 65])]
    assert list(figure.layout.yaxis.ticktext) == ["a", "b *"]  # c has nothing to show


def test_an_empty_board():
    board = leaderboard.table([])
    assert "0 of 0 tags" in leaderboard.page(board)


def test_changes_of_an_experiment(tmp_path):
    assert config.changes(config.load("digits_mlp")) == {}
    assert config.changes(config.load("digits_mlp", {"device": "cpu", "generate.batch_size": "3"})) == {}
    overridden = config.load("digits_mlp", {"evaluate.noise": "[0.1]", "seed": "0", "generate.count": "3"})
    assert config.changes(overridden) == {"evaluate.noise": [0.1], "generate.count": 3}
    own = tmp_path / "mine.yaml"
    own.write_text("extends: digits_mlp\nseed: 3\n")
    assert config.changes(config.load(str(own))) == {}
    namesake = tmp_path / "digits_mlp.yaml"
    namesake.write_text("extends: digits_cnn\n")
    assert config.changes(config.load(str(namesake)))["network.architecture"] == "cnn_small"


def test_changes_of_what_was_logged_by_another_version():
    own = config.load("digits_mlp")
    logged = {key: str(value) for key, value in config.flat(own).items()}
    assert config.changed(own, logged) == {}
    assert config.changed(own, logged | {"evaluate.gone": "1"}) == {"evaluate.gone": "1"}
