"""Judging on images: the same verdicts, whatever was interrupted, and as few predictions as possible."""

import shutil
from dataclasses import replace

import pytest
import torch
from oracle import one_by_one, perturbed, pictures

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment.schema import Evaluate
from pdiff.experiment.stages import processes
from pdiff.method.collection import Collection
from pdiff.networks import evaluators
from pdiff.networks.imported.plain import Template
from pdiff.networks.small import mlp


@pytest.fixture
def scene(monkeypatch):
    """A judge of 25 images in batches of 4 that saves after each, its network, groups and images."""
    torch.manual_seed(0)
    network, part = mlp(classes=10, channels=1, image_size=4), pictures(25, 1, 4)
    groups = {name: perturbed(network, ["*"], count) for name, count in {"original": 3, "generated": 2}.items()}
    monkeypatch.setattr(evaluators, "SAVE_SECONDS", -1)
    return network, part, groups


def test_verdicts_are_those_of_each_network_alone(scene, tmp_path):
    network, part, groups = scene
    verdicts = evaluators.on_images(network, {"validation": part, "test": part}, batch_size=4)(groups, tmp_path)
    assert list(verdicts) == ["validation", "test"]
    for name, group in groups.items():
        wrong = one_by_one(network, group, part) != part.labels
        accuracy, found = verdicts["test"][name]
        assert torch.equal(found, wrong)
        assert torch.allclose(accuracy, 1 - wrong.double().mean(dim=1))


@pytest.mark.parametrize(("batch_size", "goes_on_at"), [(4, 12), (3, 0), (5, 0)])
def test_an_interrupted_judge_goes_on(scene, tmp_path, monkeypatch, batch_size, goes_on_at):
    network, part, groups = scene
    expected = evaluators.on_images(network, {"test": part}, batch_size=4)(groups, tmp_path / "whole")
    run, starts = evaluators.batch_predictions, []

    def interrupted(*arguments, start, **options):
        starts.append(start)
        for k, rows in enumerate(run(*arguments, start=start, **options)):
            if k == 3 and len(starts) == 1:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(evaluators, "batch_predictions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluators.on_images(network, {"test": part}, batch_size=4)(groups, tmp_path)
    for _ in range(2):  # the second time everything is known
        found = evaluators.on_images(network, {"test": part}, batch_size=batch_size)(groups, tmp_path)
        for name in groups:
            assert torch.equal(found["test"][name].wrong, expected["test"][name].wrong)
    assert starts == [0, goes_on_at]


def test_what_is_known_of_a_group_is_not_computed_again(scene, tmp_path, monkeypatch):
    network, part, groups = scene
    judge, known = evaluators.on_images(network, {"test": part}, batch_size=4), tmp_path / "known"
    expected = judge(groups, tmp_path / "whole")
    known.mkdir()
    shutil.copy(tmp_path / "whole" / "original.safetensors", known)
    run, judged = evaluators.batch_predictions, []
    monkeypatch.setattr(evaluators, "batch_predictions", lambda *a, **o: judged.append(len(a[1])) or run(*a, **o))
    found = judge(groups, known)
    assert judged == [1], "the generated ones alone"
    for name in groups:
        assert torch.equal(found["test"][name].wrong, expected["test"][name].wrong)
    with pytest.raises(UserError, match=r"original\.safetensors: holds verdicts .*\(3, 25\).*, expected .*\(2, 25\)"):
        judge(groups | {"original": groups["original"].select([0, 1])}, known)


def test_percentages_up_to_one_are_told_by_the_other_groups(tmp_path):
    """Networks of chance level among 100 classes print 1.00, as perfect ones do that print fractions."""
    script = "import sys\nfrom safetensors.numpy import load_file\nprint('acc', load_file(sys.argv[1])['x'][0])\n"
    (tmp_path / "t.py").write_text(script)
    groups = {
        name: Collection({"x": torch.tensor([[value, 0.0]])}) for name, value in {"a": 75.5, "b": 1.0, "c": 0.5}.items()
    }
    template, pattern = replace(Template.of(groups["a"][0]), suffix=".safetensors"), Evaluate().pattern
    judge = evaluators.by_command("python t.py {checkpoint}", template, folder=tmp_path, pattern=pattern, workers=2)
    found = judge(groups, tmp_path / "state")["test"]
    assert [verdict.accuracy.item() for verdict in found.values()] == pytest.approx([0.755, 0.01, 0.005])
    assert list(found) == list(groups)


def test_groups_with_other_labels_cannot_be_compared(tmp_path):
    source = "import torch\ndef f(state):\n    n = int(state['x'][0])\n    return torch.zeros(4), torch.arange(4) * n\n"
    (tmp_path / "f.py").write_text(source)
    groups = {name: Collection({"x": torch.full((3, 2), value)}) for name, value in {"a": 1.0, "b": 1.0}.items()}
    judge = evaluators.by_function(f"{tmp_path}/f.py:f", Template.of(groups["a"][0]), workers=1)
    found = judge(groups, tmp_path / "same")["test"]
    assert [verdict.accuracy.tolist() for verdict in found.values()] == [[0.25] * 3] * 2
    groups["b"] = Collection({"x": torch.full((3, 2), 2.0)})
    with pytest.raises(UserError, match="the labels of b are not those of a"):
        judge(groups, tmp_path / "other")


@pytest.mark.parametrize(
    ("stage", "changes", "count"),
    [
        ("evaluate", {}, 3),
        ("evaluate", {"evaluate.function": "f.py:g"}, 1),
        ("evaluate", {"evaluate.command": "c {checkpoint}"}, 1),
        ("train", {"evaluate.command": "c {checkpoint}"}, 3),
        ("prepare", {}, 3),
        ("prepare", {"prepare.source": "folder"}, 1),
        ("generate", {}, 1),
    ],
)
def test_who_shares_a_stage(stage, changes, count):
    """Not commands: each process would run all of them, on files that the first one alone writes and deletes."""
    assert processes(stage, config.load("digits_mlp", {"processes": "3", **changes})) == count
