"""Evaluation by a command: accuracies in the order of the networks, in parallel, resumable, errors in one line."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pdiff.errors import UserError
from pdiff.method.collection import Collection
from pdiff.networks.evaluators import ByCommand
from pdiff.networks.evaluators.command import CommandEvaluator, fractions, run_command
from pdiff.networks.imported.template import Template

PATTERN = ByCommand.model_fields["pattern"].default


class Texts:
    """A template of files that hold a text, and nothing else."""

    suffix = ".txt"

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def run(home: Path, texts: list[str], command: str = "python echo.py {checkpoint}", **options) -> list[float]:
    """Run a command on files with an unusual path; `echo.py` prints what is in one."""
    (home / "echo.py").write_text("import sys\nprint(open(sys.argv[1]).read())\n")
    places = {"template": Texts(), "scratch": home / "it's; $HOME", "folder": home, "pattern": PATTERN}
    return fractions(run_command(command, texts, **places | options))


@pytest.mark.slow
def test_results_come_in_order_whatever_takes_longest(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import sys, time\nk = int(open(sys.argv[1]).read())\ntime.sleep(0.3 if k == 0 else 0)\nprint('acc', k / 10)\n"
    )
    found = run(tmp_path, [str(k) for k in range(11)], "python slow.py {checkpoint}", workers=2)
    assert found == pytest.approx([k / 10 for k in range(11)])


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Loss: 1.0834 | Acc: 0.7321"], [0.7321]),
        (["accuracy = 73.21"], [0.7321]),
        (["Accuracy: 73.21 %"], [0.7321]),
        (["Test: Acc@1 76.13 Acc@5 92.86"], [0.7613]),
        (["acc1 = 0.761, acc5 = 0.928"], [0.761]),
        (["val_accuracy: 76.1%"], [0.761]),
        (["acc: 0.5%", "acc: 80%"], [0.005, 0.8]),
        (["acc 0.9", "acc 90.5"], [0.009, 0.905]),  # the same script: both are percentages
        (["acc 0.9", "acc 90%"], [0.9, 0.9]),
        (["epoch 1 acc 0.1\nepoch 2 acc 0.2\nbye"], [0.2]),
        (["acc 1.0"], [1.0]),
        (["acc 0"], [0.0]),
        (["acc: 9.1e-1"], [0.91]),
    ],
)
def test_what_is_an_accuracy(tmp_path, texts, expected):
    assert run(tmp_path, texts, workers=2) == pytest.approx(expected)


def test_standard_output_counts_before_standard_error(tmp_path):
    (tmp_path / "both.py").write_text(
        "import sys\nprint('acc 0.5', file=sys.stderr)\nif len(sys.argv) > 2: print('acc 0.25')\n"
    )
    assert run(tmp_path, [""], "python both.py {checkpoint} more") == [0.25]
    assert run(tmp_path, [""], "python both.py {checkpoint}") == [0.5]


def test_the_command_gets_its_folder_interpreter_path_and_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    script = tmp_path / "home" / "t.py"
    script.parent.mkdir()
    script.write_text(
        "import os, sys\nfrom shutil import which\n"
        "print(sys.executable, os.getcwd(), os.environ['OMP_NUM_THREADS'], which('python'), sys.argv[1], sep='|')\n"
        "print('acc 1')\n"
    )
    pattern = r"(?s)(.*)acc"
    with pytest.raises(UserError) as caught:  # the whole output is in the message
        run(tmp_path, [""], "python t.py {checkpoint}", folder=script.parent, pattern=pattern, workers=4)
    printed = str(caught.value).split("accuracy of ")[1]
    for expected in (sys.executable, str(script.parent), "|3|", f"|{Path(sys.executable).parent}"):
        assert expected in printed
    path = f"{tmp_path}/it's; $HOME/00000.txt"
    assert path.replace("'", "\\'") in printed or path in printed


def test_a_command_line_in_a_word_gets_a_quoted_path(tmp_path):
    assert run(tmp_path, ["acc 0.5"], "sh -c 'cat {checkpoint}'") == [0.5]
    assert run(tmp_path, ["acc 0.5"], "cat {checkpoint}") == [0.5]


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        ("", "python absent.py {checkpoint}", r"absent\.py .* ends with exit code 2: .*No such file"),
        ("hi\nlast words\n", "python echo.py {checkpoint}", r"prints nothing that evaluate\.pattern .*: last words$"),
        ("acc 173", "python echo.py {checkpoint}", r"prints an accuracy of '173', expected 0 \.\. 1 or 0 \.\. 100 %"),
        ("", "no_such_program {checkpoint}", "no_such_program cannot be run: No such file or directory"),
    ],
)
def test_errors_of_commands(tmp_path, text, command, message):
    with pytest.raises(UserError, match=f"^evaluate\\.command: .*{message}") as caught:
        run(tmp_path, [text], command)
    assert "\n" not in str(caught.value)


def test_the_last_line_of_a_failing_script_is_in_the_message(tmp_path):
    (tmp_path / "bad.py").write_text("print('acc 0.5')\nraise RuntimeError('size mismatch for fc.weight')\n")
    with pytest.raises(UserError, match=r"exit code 1: RuntimeError: size mismatch for fc\.weight$"):
        run(tmp_path, ["", ""], "python bad.py {checkpoint}")


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.folder: .*absent is not a folder"):
        run(tmp_path, [], "true {checkpoint}", folder=tmp_path / "absent")


def test_interrupted_evaluations_go_on(tmp_path):
    kept = tmp_path / "state" / "kept.jsonl"
    options = {"workers": 1, "path": kept}
    with pytest.raises(UserError, match="prints nothing"):
        run(tmp_path, ["acc 0.1", "acc 0.2", "nothing", "acc 40"], **options)
    with kept.open("a") as file:
        file.write('[2, "0.')  # torn by kill -9
    with pytest.raises(UserError, match="prints nothing"):
        run(tmp_path, ["acc 0.1", "acc 0.2", "acc 30", "nothing"], **options)
    assert [json.loads(line)[0] for line in kept.read_text().splitlines()] == [0, 1, 2]
    found = run(tmp_path, ["would fail", "would fail", "would fail", "acc 40"], **options)
    assert found == pytest.approx([0.001, 0.002, 0.3, 0.4])


def test_an_interrupt_ends_the_commands_and_their_children(tmp_path):
    (tmp_path / "sleep.sh").write_text(f"echo $$ > '{tmp_path}/pid'\nsleep 60 & echo $! > '{tmp_path}/child'\nwait\n")

    def interrupt() -> None:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["", "", ""], "sh sleep.sh {checkpoint}", workers=1)
    assert time.monotonic() - begin < 20
    for name in ("pid", "child"):
        status = Path(f"/proc/{(tmp_path / name).read_text().strip()}/stat")
        deadline = time.monotonic() + 5
        while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.slow
def test_networks_are_written_as_the_users_files_are_and_deleted(tmp_path):
    first = tmp_path / "0.safetensors"
    save_file({"module.w": torch.zeros(3).half(), "module.n": torch.tensor(7)}, first, {"format": "pt"})
    (tmp_path / "t.py").write_text(
        "import sys\nfrom safetensors.numpy import load_file\nn = load_file(sys.argv[1])\n"
        "assert sorted(n) == ['module.n', 'module.w'] and n['module.w'].dtype == 'float16'\n"
        "print('acc', n['module.w'].sum() + n['module.n'] - 7)\n"
    )
    states = Collection({"w": torch.tensor([[0.25, 0.25, 0], [0.5, 0, 0.25], [0, 0, 0.125]])})
    options = {"template": Template.read(first), "scratch": tmp_path / "scratch", "folder": tmp_path}
    found = run_command("python t.py {checkpoint}", states, pattern=PATTERN, workers=2, **options)
    assert found == ["0.5", "0.75", "0.125"]
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_percentages_up_to_one_are_recognised_by_the_other_groups(tmp_path):
    """Networks of chance level among 100 classes print 1.00, as perfect ones do that print fractions."""
    script = "import sys\nfrom safetensors.numpy import load_file\nprint('acc', load_file(sys.argv[1])['x'][0])\n"
    (tmp_path / "t.py").write_text(script)
    groups = {
        name: Collection({"x": torch.tensor([[value, 0.0]])}) for name, value in {"a": 75.5, "b": 1.0, "c": 0.5}.items()
    }
    template = replace(Template.of(groups["a"][0]), suffix=".safetensors")
    evaluator = CommandEvaluator("python t.py {checkpoint}", template, tmp_path, PATTERN, workers=2)
    found = evaluator(groups, tmp_path / "state")["test"]
    assert [evaluation.accuracy.item() for evaluation in found.values()] == pytest.approx([0.755, 0.01, 0.005])
    assert list(found) == list(groups)
