"""The cost ledger, from histories of stages."""

import pytest

from pdiff.experiment.costs import costs_table
from pdiff.experiment.history import HEADER

HISTORIES = {
    "pretrain": [("seconds/pretrain", 0, 0.0), ("seconds/pretrain", 1, 40.0), ("memory_mb/pretrain", 0, 300.0)],
    "prepare": [("seconds/collect", 1, 20.0), ("collect/loss", 7, 0.5), ("memory_mb/collect", 0, 200.0)],
    "train": [
        *(("seconds/autoencoder", 1, 2.0), ("memory_mb/autoencoder", 0, 500.0)),
        *(("seconds/diffusion", 1, 3.0), ("memory_mb/diffusion", 0, 400.0)),
    ],
    "generate": [("seconds/generate", 1, 1.0), ("memory_mb/generate", 0, 100.0)],
}


def ledger(tmp_path, names, networks):
    for name in names:
        (tmp_path / name).mkdir()
        lines = [f"{metric},{step},{value},0" for metric, step, value in HISTORIES[name]]
        (tmp_path / name / "history.csv").write_text("\n".join([HEADER, *lines, ""]))
    return costs_table({name: tmp_path / name for name in names}, networks).set_index("stage")


def test_every_stage_and_as_many_originals(tmp_path):
    table = ledger(tmp_path, HISTORIES, {"prepare": 30, "generate": 10})
    assert table["seconds"].to_dict() == {
        "pretrain": 40,
        "prepare": 20,
        "train": 5,
        "generate": 1,
        "training as many originals": 20,  # a third of 60 seconds
    }
    assert table["memory_mb"].dropna().to_dict() == {"pretrain": 300, "prepare": 200, "train": 500, "generate": 100}
    assert table.loc["generate", "seconds_per_network"] == 0.1
    assert table.loc["prepare", "seconds_per_network"] == pytest.approx(2 / 3)
    assert table.loc["train", "note"] == "autoencoder 2.0 s, diffusion 3.0 s"
    assert table.loc["training as many originals", "note"].endswith("fitting and sampling took 6.0 s")


def test_originals_from_files_cost_nothing_here(tmp_path):
    table = ledger(tmp_path, ["generate"], {"generate": 10})
    assert list(table.index) == ["generate"]
