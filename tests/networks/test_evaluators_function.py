"""Evaluation by a function: predictions in the order of the networks, in processes too, errors in one line."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pdiff.errors import UserError
from pdiff.method.collection import Collection
from pdiff.networks.evaluators import function
from pdiff.networks.evaluators.function import FunctionEvaluator, run_function
from pdiff.networks.imported.template import Template

LABELS = torch.arange(40) % 10
USER = """
from dataclasses import dataclass
import torch
import helper_beside
labels = torch.arange(40) % 10

@dataclass
class Thing:
    x: "int"

def classes(state):
    return (labels + state["shift"].long().sum()) % 10, labels

def right(state):
    return classes(state)[0] == labels

def lists(state):
    return [c.tolist() for c in classes(state)]

def arrays(state):
    return tuple(c.numpy().astype("float32") for c in classes(state))

def changes(state):
    state["shift"] += 1
    return classes(state)

def fails(state):
    raise ValueError("no\\nsuch layer")

def leaves(state):
    raise SystemExit("bye")

def logits(state):
    return torch.zeros(40, 10), labels

def fewer(state):
    return labels[:3], labels

def negative(state):
    return labels - 1, labels

def halves(state):
    return labels + 0.5, labels

def nothing(state):
    return None

def percent(state):
    return 93.0

def count(state):
    return 93

def accuracy(state):
    return classes(state)[0].eq(labels).float().mean().item()

def other_labels(state):
    return labels, labels + state["shift"].long().sum()

def process(state):
    import os
    return torch.cat([torch.tensor([os.getpid()]), classes(state)[0][1:]]), labels

def dies(state):
    import os
    if state["shift"].sum() > 2: os._exit(3)
    return classes(state)

no_function = 3
"""


@pytest.fixture
def user(tmp_path) -> str:
    (tmp_path / "helper_beside.py").write_text("")
    (tmp_path / "test.py").write_text(USER)
    return str(tmp_path / "test.py")


def states(count: int) -> Collection:
    """Network k shifts all classes by k."""
    return Collection({"shift": torch.arange(count).float()[:, None]})


@pytest.mark.parametrize("name", ["classes", "lists", "arrays"])
def test_predictions(user, name):
    predictions, labels = run_function(f"{user}:{name}", states(5)).values()
    assert predictions.dtype == torch.uint8
    assert torch.equal(labels, LABELS)
    expected = (np.arange(40)[None] + np.arange(5)[:, None]) % 10
    assert np.array_equal(predictions.numpy(), expected)


def test_what_is_right(user):
    predictions, labels = run_function(f"{user}:right", states(11)).values()
    assert (predictions == labels).double().mean(dim=1).tolist() == [1.0, *[0.0] * 9, 1.0]


def test_a_function_may_change_what_it_gets(user):
    own = states(3)
    predictions = run_function(f"{user}:changes", own)["predicted"]
    assert own.tensors["shift"].flatten().tolist() == [0, 1, 2]
    assert torch.equal(predictions[0].long(), (LABELS + 1) % 10)


def test_an_accuracy(user, tmp_path):
    evaluator = FunctionEvaluator(f"{user}:accuracy")
    evaluation = evaluator({"a": states(11)}, tmp_path / "found")["test"]["a"]
    assert evaluation.accuracy.tolist() == [1.0, *[0.0] * 9, 1.0]
    assert evaluation.wrong is evaluation.predicted is None


def test_a_function_that_is_in_no_file(tmp_path):
    evaluator = FunctionEvaluator(lambda state: (LABELS + state["shift"].long()) % 10 == LABELS)
    assert evaluator({"a": states(3)}, tmp_path / "found")["test"]["a"].accuracy.tolist() == [1, 0, 0]
    with pytest.raises(UserError, match=r"^evaluate .*<lambda>: network 0: KeyError: 'absent'"):
        FunctionEvaluator(lambda state: state["absent"])({"a": states(3)}, tmp_path / "other")


def test_functions_get_complete_networks(tmp_path, user):
    torch.save({"shift": torch.tensor([5.0, 0.0]), "other": torch.ones(2)}, tmp_path / "0.pth")
    Path(user).write_text(USER + "\ndef both(state):\n    return state['other'].long(), state['shift'].long()\n")
    own = Collection({"other": torch.tensor([[2.0, 3.0], [4.0, 300.0]])})
    predictions, labels = run_function(f"{user}:both", own, template=Template.read(tmp_path / "0.pth")).values()
    assert predictions.tolist() == [[2, 3], [4, 300]] and labels.tolist() == [5, 0]
    assert predictions.dtype == torch.int16


@pytest.mark.slow
def test_processes_give_the_same(user, monkeypatch):
    monkeypatch.setattr(function, "PROCESS_SECONDS", 0.0)
    predictions, labels = run_function(f"{user}:process", states(7), workers=2).values()
    assert (predictions[:, 1:] == (LABELS[None, 1:] + torch.arange(7)[:, None]) % 10).all()
    assert torch.equal(labels, LABELS)
    ids = predictions[:, 0]
    assert (ids[:2] == os.getpid()).all() and not (ids[2:] == os.getpid()).any()


@pytest.mark.slow
def test_a_process_that_dies(user, monkeypatch):
    monkeypatch.setattr(function, "PROCESS_SECONDS", 0.0)
    with pytest.raises(UserError, match="a process of 2 died"):
        run_function(f"{user}:dies", states(9), workers=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "network 0: ValueError: no such layer"),
        ("leaves", "network 0: SystemExit: bye"),
        ("logits", r"network 0: predictions are float32 \(40, 10\), expected classes .*argmax\(1\)"),
        ("fewer", "network 0: 3 predictions and 40 labels"),
        ("negative", "network 0: predictions hold -1, expected classes from 0"),
        ("halves", r"network 0: predictions are float32 \(40,\), expected .*whole numbers"),
        ("nothing", "network 0: what it returns: NoneType, expected a tensor"),
        ("percent", r"network 0: returns the accuracy 93, expected a number in \[0, 1\]"),
        ("count", r"network 0: returns int64 \(\), expected predictions and labels, bool \(images,\), or an accuracy"),
        ("other_labels", "network 1 has other labels than the first one"),
        ("no_function", "has no function 'no_function'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_errors_of_functions(user, name, message):
    with pytest.raises(UserError, match=message) as caught:
        run_function(f"{user}:{name}", states(3))
    assert str(caught.value).startswith("evaluate.function") and "\n" not in str(caught.value)


def test_files_without_functions(tmp_path):
    with pytest.raises(UserError, match=r"absent\.py is not a file"):
        run_function(f"{tmp_path}/absent.py:predict", states(2))
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(UserError, match=r"broken\.py cannot be run: ZeroDivisionError: division by zero"):
        run_function(f"{tmp_path}/broken.py:predict", states(2))


def test_groups_with_other_labels_cannot_be_compared(tmp_path):
    source = "import torch\ndef f(state):\n    n = int(state['x'][0])\n    return torch.zeros(4), torch.arange(4) * n\n"
    (tmp_path / "f.py").write_text(source)
    groups = {name: Collection({"x": torch.full((3, 2), value)}) for name, value in {"a": 1.0, "b": 1.0}.items()}
    evaluator = FunctionEvaluator(f"{tmp_path}/f.py:f", Template.of(groups["a"][0]), workers=1)
    found = evaluator(groups, tmp_path / "same")["test"]
    assert [evaluation.accuracy.tolist() for evaluation in found.values()] == [[0.25] * 3] * 2
    groups["b"] = Collection({"x": torch.full((3, 2), 2.0)})
    with pytest.raises(UserError, match="the labels of b are not those of a"):
        evaluator(groups, tmp_path / "other")
