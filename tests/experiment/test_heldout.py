"""Held-out originals: split off before anything is fitted, and read by nothing that is judged."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tracked import TINY

from pdiff.experiment import config, prepared, stages
from pdiff.experiment.evaluate import baselines
from pdiff.files import read_json
from pdiff.method.collection import Collection
from pdiff.method.generators.base import Generator
from pdiff.method.standardize import Standardizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An experiment, and the folders of its pretrained network and of its collection."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(TINY)
    experiment = config.load(str(folder / "tiny.yaml"), {"evaluate.baselines": "auto"})
    return experiment, run(experiment, {}, folder, "pretrain", "prepare")


def run(experiment, folders, out, *names) -> dict:
    """The folders of some more stages."""
    folders = dict(folders)
    for name in names:
        (out / name).mkdir(parents=True)
        read = {other: folders[other] for other in stages.reads(name, experiment)}
        stages.run(name, experiment, out / name, log=lambda point: None, **read)
        folders[name] = out / name
    return folders


def test_the_split_is_a_partition_in_the_order_of_collection(tiny):
    _, folders = tiny
    fitted, heldout = (read_json(folders["prepare"] / f"{name}.json") for name in ("checkpoints", "heldout"))
    assert (fitted["count"], heldout["count"]) == (18, 2)
    assert sorted(fitted["checkpoints"] + heldout["checkpoints"]) == [f"{k:05d}" for k in range(20)]
    assert fitted["checkpoints"] == sorted(fitted["checkpoints"])


def test_poison_in_the_heldout_networks_changes_nothing_that_is_judged(tiny, tmp_path):
    experiment, folders = tiny
    poisoned = tmp_path / "poisoned"
    shutil.copytree(folders["prepare"], poisoned)
    tensors = load_file(poisoned / "heldout.safetensors")
    save_file({name: torch.full_like(t, 1e6) for name, t in tensors.items()}, poisoned / "heldout.safetensors")

    found = []
    for place, prepare in {"clean": folders["prepare"], "poison": poisoned}.items():
        made = run(experiment, folders | {"prepare": prepare}, tmp_path / place, "train", "generate")
        generated, originals = (
            Collection.load(made["generate"] / "generated.safetensors"),
            prepared.original_networks(experiment, prepare),
        )
        generator = Generator.load(made["train"] / "generator")
        arms = baselines(experiment, prepare, originals, Standardizer.fit(originals), generated, generator)
        found.append({"generated": generated, **arms})
    clean, poison = found
    assert {"reconstruction", "average_16", "gaussian", "noise_matched", "noise_0.05", "recombined_4"} < clean.keys()
    for name, networks in clean.items():
        for tensor, stacked in networks.tensors.items():
            assert torch.equal(stacked, poison[name].tensors[tensor]), (name, tensor)


def test_a_collection_may_be_fitted_whole(tiny, tmp_path):
    experiment, folders = tiny
    whole = experiment.model_copy(update={"prepare": experiment.prepare.model_copy(update={"heldout": 0.0})})
    made = run(whole, folders, tmp_path, "prepare")
    assert len(prepared.original_networks(whole, made["prepare"])) == 20
    assert prepared.heldout_networks(made["prepare"]) is None
