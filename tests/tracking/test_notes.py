"""The description of a run: what it did, its verdict, and a next command that can be typed."""

import re
import shlex

import pytest

from pdiff.cli.main import COMMANDS
from pdiff.experiment import config, stages
from pdiff.tracking.notes import answers, note


@pytest.mark.parametrize("stage", ["main", *(name for name in stages.STAGES if name != "audit")])
def test_descriptions(stage):
    experiment = config.load("digits_mlp", {"generate.count": "7"})
    first, *verdict, following = note(stage, experiment, "It is\n\nworse.\n").split("\n\n")
    assert first.endswith(". Experiment `digits_mlp`, with `generate.count=7`.") and verdict == ["It is", "worse."]
    (program, name, *words), *_ = (shlex.split(c) for c in re.findall("`(pdiff [^`]+)`", following))
    context = COMMANDS.commands[name].make_context(name, words)
    expected = {"pretrain": "prepare", "prepare": "train", "train": "generate", "generate": "evaluate"}
    assert name == {**expected, "originals": "evaluate"}.get(stage, "compare") and program == "pdiff"
    assert name == "compare" or context.params["tag"] == "digits_mlp"


def test_an_experiment_in_no_file_has_no_command(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: digits_mlp\n")
    assert note("train", config.load(str(path))).endswith("Next: the stage `generate`.")


def test_answers_of_a_verdict():
    sentences = [
        "Better? No difference: on average.",
        "As new? That cannot be said: none.",
        "New? They are copies: 1.",
    ]
    assert answers("\n\n".join(sentences)) == "No difference; That cannot be said; They are copies"
