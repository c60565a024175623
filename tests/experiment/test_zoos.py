"""Zoos of other people, from `pdiff new` to their prepared collection and to networks as their files are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from zoos import LORA, adapter, hugging_face, lora, ray_tune, small_cnn

from pdiff.cli.main import main
from pdiff.errors import UserError
from pdiff.experiment import config, digests, stages
from pdiff.experiment.new import new
from pdiff.experiment.population import Population
from pdiff.method.collection import Collection


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_new_says_which_format_it_is_and_writes_it(here, capsys):
    path = new("zoo", ray_tune(here / "zoo"), overrides={"prepare.source_select.epochs": "last"})
    assert "format      ray_tune: 2 checkpoints of 2 networks" in capsys.readouterr().out
    settings = config.load(str(path)).prepare
    assert (settings.format, settings.source_select.epochs) == ("ray_tune", "last")
    assert main(["show", "zoo"]) == 0
    assert "epochs: last" in capsys.readouterr().out


def test_a_checkpoint_of_a_zoo_that_cannot_be_used_is_left_out(here):
    damaged = next(ray_tune(here / "zoo").glob("*00000*/checkpoint_000025/checkpoints"))
    damaged.write_bytes(b"")
    excluded = config.load(str(new("zoo", here / "zoo"))).prepare.exclude
    assert len(excluded) == 1 and excluded[0].endswith("/checkpoint_000025")


def test_a_format_that_was_asked_for_is_taken(here):
    hugging_face(here / "zoo")
    with pytest.raises(UserError, match="holds 0 usable checkpoint files"):
        new("zoo", here / "zoo", overrides={"prepare.format": "lora"})
    with pytest.raises(UserError, match=r"prepare\.format"):
        new("zoo", here / "zoo", overrides={"prepare.format": "onnx"})


def test_a_selection_needs_files(here):
    with pytest.raises(UserError, match=r"prepare\.source_select: needs prepare\.source"):
        config.load("digits_mlp", {"prepare.source_select.epochs": "last"})


def test_digests_see_files_and_selection_and_those_of_plain_folders_are_as_ever(here):
    def digest(**overrides: str) -> str:
        return digests.fingerprint(digests.collected(config.load("digits_mlp", {"prepare.source": "zoo", **overrides})))

    ray_tune(here / "zoo")
    before = digest()
    assert digest(**{"prepare.format": "ray_tune"}) == before
    assert digest(**{"prepare.source_select.epochs": "last"}) != before
    path = next((here / "zoo").glob("*/result.json"))
    path.write_text(path.read_text() + "\n".join(path.read_text().splitlines()[-1:]) + "\n")
    assert digest() != before

    (here / "plain").mkdir()
    for k in range(2):
        torch.save(small_cnn(k), here / "plain" / f"{k}.pth")
    content = digests.collected(config.load("digits_mlp", {"prepare.source": "plain"}))
    assert [name for name, *_ in content["files"]] == ["0.pth", "1.pth"]
    assert not {"format", "select"} & content.keys() and not {"format", "source_select"} & content["prepare"].keys()


@pytest.mark.slow
def test_a_zoo_is_prepared_and_whole_networks_are_held_out(here):
    ray_tune(here / "zoo", trials=6)
    new("zoo", here / "zoo", overrides={"prepare.heldout": "0.35"})
    experiment, out = config.load("zoo"), here / "prepare"
    out.mkdir()
    sizes = stages.run("prepare", experiment, out, log=lambda point: None)
    assert (sizes["checkpoints"], sizes["heldout_checkpoints"]) == (12, 6)
    population, heldout = Population.load(out), Collection.load(out / "heldout.safetensors")
    assert population.describe() == "6 networks from independent seeds, 3 checkpoints of each"
    assert not set(population.column("network")) & set(population.column("network", heldout=True))
    assert population.column("name", heldout=True) == heldout.names
    for k, seed in enumerate(population.column("seed", heldout=True)):
        expected = small_cnn(100 * seed + population.column("epoch", heldout=True)[k])
        assert all(torch.equal(heldout[k][name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_adapters_are_generated_and_exported_as_they_came(workspace, capsys):
    lora(workspace / "zoo", [adapter(seed) for seed in range(8)])
    assert main(["new", "adapters", "--checkpoints", "zoo", "--generate.count", "3", "--diffusion.steps", "20"]) == 0
    assert "format      lora: 8 checkpoints of 8 networks" in capsys.readouterr().out
    assert main(["main", "--tag", "adapters", "--log_models", "false"]) == 0
    printed = capsys.readouterr().out
    run = next(line.split()[1] for line in printed.splitlines() if line.startswith("run "))
    assert main(["export", "--run", run, "--out", "made", "--format", "source"]) == 0
    folders = sorted((workspace / "made").iterdir())
    assert [folder.name for folder in folders] == [f"generated_{k:05d}" for k in range(3)]
    for folder in folders:
        assert json.loads((folder / "adapter_config.json").read_text()) == LORA
        written = load_file(folder / "adapter_model.safetensors")
        assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in adapter(0).items()}
        assert all(tensor.isfinite().all() for tensor in written.values())
    assert main(["audit", "--originals", "zoo", "--generated", "made"]) == 0
