"""The registry of evaluators, and evaluation on images: resumable, with as few predictions as possible."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import one_by_one, perturbed, pictures
from pydantic import ValidationError

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment.stages import processes
from pdiff.method.collection import Collection
from pdiff.networks.evaluators import EVALUATORS, Context, Evaluation, EvaluatorOptions, automatic_kind, images
from pdiff.networks.evaluators.images import ImagesEvaluator
from pdiff.networks.imported.template import Template
from pdiff.networks.small import mlp


@pytest.fixture
def scene(monkeypatch):
    """A network, 25 images and two groups; an evaluator saves after each batch."""
    torch.manual_seed(0)
    network, part = mlp(classes=10, channels=1, image_size=4), pictures(25, 1, 4)
    groups = {name: perturbed(network, ["*"], count) for name, count in {"original": 3, "generated": 2}.items()}
    monkeypatch.setattr(images, "SAVE_SECONDS", -1)
    return network, part, groups


def test_error_masks_are_those_of_each_network_alone(scene, tmp_path):
    network, part, groups = scene
    evaluations = ImagesEvaluator(network, {"validation": part, "test": part}, batch_size=4)(groups, tmp_path)
    assert list(evaluations) == ["validation", "test"]
    for name, group in groups.items():
        wrong = one_by_one(network, group, part) != part.labels
        accuracy, found = evaluations["test"][name]
        assert torch.equal(found, wrong)
        assert torch.allclose(accuracy, 1 - wrong.double().mean(dim=1))


@pytest.mark.parametrize(("batch_size", "continues_at"), [(4, 12), (3, 0), (5, 0)])
def test_an_interrupted_evaluation_continues(scene, tmp_path, monkeypatch, batch_size, continues_at):
    network, part, groups = scene
    expected = ImagesEvaluator(network, {"test": part}, batch_size=4)(groups, tmp_path / "whole")
    run, starts = images.batch_predictions, []

    def interrupted(*arguments, start, **options):
        starts.append(start)
        for k, rows in enumerate(run(*arguments, start=start, **options)):
            if k == 3 and len(starts) == 1:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(images, "batch_predictions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImagesEvaluator(network, {"test": part}, batch_size=4)(groups, tmp_path)
    for _ in range(2):  # the second time everything is known
        found = ImagesEvaluator(network, {"test": part}, batch_size=batch_size)(groups, tmp_path)
        for name in groups:
            assert torch.equal(found["test"][name].wrong, expected["test"][name].wrong)
    assert starts == [0, continues_at]


def test_what_is_known_of_a_group_is_not_computed_again(scene, tmp_path, monkeypatch):
    network, part, groups = scene
    evaluator, known = ImagesEvaluator(network, {"test": part}, batch_size=4), tmp_path / "known"
    expected = evaluator(groups, tmp_path / "whole")
    known.mkdir()
    shutil.copy(tmp_path / "whole" / "original.safetensors", known)
    run, evaluated = images.batch_predictions, []
    monkeypatch.setattr(images, "batch_predictions", lambda *a, **o: evaluated.append(len(a[1])) or run(*a, **o))
    found = evaluator(groups, known)
    assert evaluated == [1], "the generated ones alone"
    for name in groups:
        assert torch.equal(found["test"][name].wrong, expected["test"][name].wrong)
    with pytest.raises(UserError, match=r"original\.safetensors: error masks are .*\(3, 25\).*, expected .*\(2, 25\)"):
        evaluator(groups | {"original": groups["original"].select([0, 1])}, known)


# -- the registry


class Norm(EvaluatorOptions):
    """A toy: the accuracy of a network is `scale` over its norm."""

    scale: float

    def make(self, context: Context):
        size = len(context.template().state["x"])

        def evaluate(groups, folder):
            norms = {name: group.tensors["x"].norm(dim=1).double() for name, group in groups.items()}
            return {"test": {name: Evaluation(self.scale * size / norm) for name, norm in norms.items()}}

        return evaluate


def unused():
    raise AssertionError("an evaluator calls for what it needs alone")


def context(**parts) -> Context:
    return Context(**{"network": unused, "images": unused, "template": unused, "device": torch.device("cpu"), **parts})


def test_an_evaluator_is_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(EVALUATORS, "norm", Norm)
    assert automatic_kind({"scale", "noise"}, images=True) == "norm"
    group = Collection({"x": torch.tensor([[3.0, 4.0], [6.0, 8.0]])})
    made = EVALUATORS["norm"](scale=1).make(context(template=lambda: Template.of(group[0])))
    assert made({"original": group}, tmp_path)["test"]["original"].accuracy.tolist() == [0.4, 0.2]


OPTIONS = {
    "images": {"test": False},
    "function": {"function": "f.py:predict"},
    "command": {"command": "python -c 'print(\"acc 0.5\")' {checkpoint}"},
    "none": {},
}
PREDICT = "import torch\ndef predict(state):\n    return torch.tensor([0, 1]), torch.tensor([0, 0])\n"


@pytest.mark.parametrize("kind", EVALUATORS)
def test_every_kind_is_made_of_its_options_and_finds_what_it_found_before(kind, scene, tmp_path, monkeypatch):
    """A second call reads the files of the groups, and needs no predictions, function or command."""
    network, part, groups = scene
    monkeypatch.chdir(tmp_path)
    Path("f.py").write_text(PREDICT)
    split = SimpleNamespace(validation=part, test=part)
    parts = {"network": lambda: network, "images": lambda: split, "template": lambda: Template.of(network.state_dict())}
    options = EVALUATORS[kind](**OPTIONS[kind])
    assert [path.name for path in options.scripts()] == (["f.py"] if kind == "function" else [])
    found = options.make(context(**parts))(groups, tmp_path / "state")
    assert options.measures == bool(found)
    assert list(found) == {"images": ["validation"], "none": []}.get(kind, ["test"])
    if kind in ("function", "command"):
        assert found["test"]["original"].accuracy.tolist() == [0.5] * 3
    Path("f.py").write_text("")
    monkeypatch.setattr(images, "batch_predictions", unused)
    monkeypatch.setattr("subprocess.Popen", unused)
    again = options.make(context(**parts))(groups, tmp_path / "state")
    for part, evaluations in found.items():
        for name, evaluation in evaluations.items():
            for value, same in zip(evaluation, again[part][name], strict=True):
                assert value is same is None or torch.equal(value, same)


def test_scripts_of_a_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.sh"):
        Path(name).touch()
    command = EVALUATORS["command"](command="sh -c 'sh b.sh | python a.py {checkpoint} -x absent.py a.py'")
    assert command.scripts() == [Path("b.sh"), Path("a.py")]
    Path("below").mkdir()
    Path("below/a.py").touch()
    assert command.model_copy(update={"folder": "below"}).scripts() == [Path("below/a.py")]


@pytest.mark.parametrize(
    ("given", "images", "kind"),
    [
        (set(), True, "images"),
        (set(), False, "none"),
        ({"function", "noise"}, True, "function"),
        ({"command", "pattern"}, False, "command"),
        ({"pattern", "workers"}, True, "images"),
        ({"command", "function"}, True, "function"),  # the schema then refuses the command
    ],
)
def test_the_automatic_kind(given, images, kind):
    assert automatic_kind(given, images=images) == kind


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("command", {"command": "python t.py"}, "command must hold {checkpoint}, but got 'python t.py'"),
        ("command", {"command": "t '{checkpoint}"}, "cannot be split into words: No closing quotation"),
        ("command", {"command": "t {checkpoint}", "pattern": "("}, "pattern '(' is no regular expression: missing )"),
        ("command", {"command": "t {checkpoint}", "pattern": "acc"}, "pattern 'acc' has 0 groups, expected one"),
        ("command", {"command": ""}, "command"),
        ("function", {"function": ""}, "function"),
        ("function", {"command": "t {checkpoint}"}, "function"),
        ("none", {"workers": 2}, "workers"),
    ],
)
def test_options_that_do_not_fit(kind, options, message):
    with pytest.raises(ValidationError) as caught:
        EVALUATORS[kind](**options)
    assert message in str(caught.value)


def test_the_registry_is_read_without_torch():
    program = (
        "import sys; import pdiff.networks.evaluators as e; e.EVALUATORS['images'](); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
