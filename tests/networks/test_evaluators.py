"""The registry of evaluators, and evaluation on images: resumable, with as few predictions as possible."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import one_by_one, perturbed, pictures, softmax_one_by_one
from pydantic import ValidationError

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.experiment.stages import processes
from pdiff.files import read_tensors, write_tensors
from pdiff.method.collection import Collection
from pdiff.networks.evaluators import EVALUATORS, Context, Evaluation, EvaluatorOptions, automatic_kind, images
from pdiff.networks.evaluators.images import ImagesEvaluator
from pdiff.networks.imported.template import Template
from pdiff.networks.predict import vote_subsets
from pdiff.networks.small import mlp


@pytest.fixture
def scene(monkeypatch):
    """A network, 25 images and two groups; an evaluator saves after each batch."""
    torch.manual_seed(0)
    network, part = mlp(classes=10, channels=1, image_size=4), pictures(25, 1, 4)
    groups = {name: perturbed(network, ["*"], count) for name, count in {"original": 3, "generated": 2}.items()}
    monkeypatch.setattr(images, "SAVE_SECONDS", -1)
    return network, part, groups


def assert_same(found: Evaluation, expected: Evaluation, *, exact: bool = True) -> None:
    """Whether two evaluations agree, to the last bit or up to rounding."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-7}
    for name, value in expected._asdict().items():
        same = getattr(found, name)
        assert (value is None) == (same is None), name
        if name == "votes" and value is not None:
            assert same.keys() == value.keys()
            value, same = ([tensor for votes in v.values() for tensor in votes] for v in (value, same))
        if value is not None:
            torch.testing.assert_close(same, value, equal_nan=True, **tolerance)


def brute_force_error(confidence: list[float], right: list[bool]) -> float:
    """The oracle: expected calibration error with 15 bins, prediction by prediction."""
    total = 0.0
    for low, high in ((b / 15, (b + 1) / 15) for b in range(15)):
        some = [(c, r) for c, r in zip(confidence, right, strict=True) if low < c <= high]
        total += abs(sum(r for _, r in some) - sum(c for c, _ in some))
    return total / len(confidence)


def test_likelihoods_calibration_and_votes_are_those_of_each_network_alone(scene, tmp_path):
    network, part, groups = scene
    found = ImagesEvaluator(network, {"test": part}, batch_size=4)(groups, tmp_path)["test"]
    for name, group in groups.items():
        p = softmax_one_by_one(network, group, part).double()
        best, predicted = p.max(dim=-1)
        assert torch.equal(found[name].predicted.long(), predicted)
        nll = torch.stack([F.nll_loss(rows.log(), part.labels) for rows in p])
        torch.testing.assert_close(found[name].nll, nll, rtol=1e-5, atol=1e-6)
        right = predicted == part.labels
        ece = [brute_force_error(*rows) for rows in zip(best.tolist(), right.tolist(), strict=True)]
        assert found[name].ece.tolist() == pytest.approx(ece, abs=1e-6)
        count, confidence, accuracy = found[name].reliability.unbind(dim=1)
        assert count.sum() == right.numel() and (count * accuracy).nansum() == right.sum()
        assert (count * confidence).nansum().item() == pytest.approx(best.sum().item(), rel=1e-6)
        assert list(found[name].votes) == [1, 2]
        for value, same in zip(found[name].votes[1], (found[name].accuracy, nll, found[name].ece), strict=True):
            torch.testing.assert_close(value, same, rtol=1e-5, atol=1e-6)
        means = torch.stack([p[members].mean(dim=0) for members in vote_subsets(len(group))[2]])
        votes = found[name].votes[2]
        right = means.argmax(dim=-1) == part.labels
        assert votes.accuracy.tolist() == pytest.approx(right.double().mean(dim=1).tolist())
        nll = torch.stack([F.nll_loss(rows.log(), part.labels) for rows in means])
        torch.testing.assert_close(votes.nll, nll, rtol=1e-5, atol=1e-6)
        ece = [brute_force_error(*rows) for rows in zip(means.amax(dim=-1).tolist(), right.tolist(), strict=True)]
        assert votes.ece.tolist() == pytest.approx(ece, abs=1e-6)


def test_a_file_of_another_form_is_refused(scene, tmp_path):
    network, part, groups = scene
    evaluator = ImagesEvaluator(network, {"test": part}, batch_size=4)
    path = tmp_path / "original.safetensors"
    write_tensors(path, {"test": torch.zeros(3, 25, dtype=torch.bool)})
    with pytest.raises(UserError, match=r"original\.safetensors: holds test bool \(3, 25\), expected test\.nll"):
        evaluator(groups, tmp_path)
    path.unlink()
    evaluator(groups, tmp_path)
    write_tensors(path, read_tensors(path) | {"test.predicted": torch.full((3, 25), torch.nan)})
    with pytest.raises(UserError, match=r"test\.predicted float32 \(3, 25\).*expected.*classes \(3, 25\)"):
        evaluator(groups, tmp_path)


@pytest.mark.parametrize(("confidence", "right", "error"), [([1.0, 1.0], [1, 0], 0.5), ([0.75, 0.75], [1, 1], 0.25)])
def test_calibration_in_closed_form(confidence, right, error):
    sums = images.reliability(torch.tensor([confidence]), torch.tensor([right]).bool())
    assert sums.shape == (1, 15, 3) and sums[0, :, 0].sum() == 2
    assert images.calibration_error(sums).tolist() == [error]


def test_error_masks_are_those_of_each_network_alone(scene, tmp_path):
    network, part, groups = scene
    evaluations = ImagesEvaluator(network, {"validation": part, "test": part}, batch_size=4)(groups, tmp_path)
    assert list(evaluations) == ["validation", "test"]
    for name, group in groups.items():
        wrong = one_by_one(network, group, part) != part.labels
        accuracy, found, *_ = evaluations["test"][name]
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
            assert_same(found["test"][name], expected["test"][name], exact=batch_size == 4)
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
        assert_same(found["test"][name], expected["test"][name])
    message = r"original\.safetensors: holds .*predicted classes \(3, 25\).*, expected .*predicted classes \(2, 25\)"
    with pytest.raises(UserError, match=message):
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
            assert_same(evaluation, again[part][name])


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
        ("prepare", {"prepare.source": "folder"}, 3),  # their alignment
        ("prepare", {"prepare.source": "folder", "prepare.align": "none"}, 1),
        ("generate", {}, 1),
    ],
)
def test_who_shares_a_stage(stage, changes, count):
    """Not commands: each process would run all of them, on files that the first one alone writes and deletes."""
    assert processes(stage, config.load("digits_mlp", {"processes": "3", **changes})) == count
