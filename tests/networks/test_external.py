"""Somebody's own measurements: commands and functions, in order, in parallel, with errors of one line."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pdiff.errors import UserError
from pdiff.experiment.schema import Evaluate
from pdiff.method.collection import Collection
from pdiff.networks import external
from pdiff.networks.external import fractions, run_command, run_function
from pdiff.networks.imported.plain import Template

PATTERN = Evaluate().pattern


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


def test_the_last_line_of_a_failing_script_is_told(tmp_path):
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

def number(state):
    return 0.93

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
    predictions, labels = run_function(f"{user}:{name}", states(5))
    assert labels.dtype == predictions.dtype == torch.uint8
    assert torch.equal(labels.long(), LABELS)
    expected = (np.arange(40)[None] + np.arange(5)[:, None]) % 10
    assert np.array_equal(predictions.numpy(), expected)


def test_what_is_right(user):
    predictions, labels = run_function(f"{user}:right", states(11))
    assert (predictions == labels).double().mean(dim=1).tolist() == [1.0, *[0.0] * 9, 1.0]


def test_a_function_may_change_what_it_gets(user):
    own = states(3)
    predictions, _ = run_function(f"{user}:changes", own)
    assert own.tensors["shift"].flatten().tolist() == [0, 1, 2]
    assert torch.equal(predictions[0].long(), (LABELS + 1) % 10)


def test_functions_get_complete_networks(tmp_path, user):
    torch.save({"shift": torch.tensor([5.0, 0.0]), "other": torch.ones(2)}, tmp_path / "0.pth")
    Path(user).write_text(USER + "\ndef both(state):\n    return state['other'].long(), state['shift'].long()\n")
    own = Collection({"other": torch.tensor([[2.0, 3.0], [4.0, 300.0]])})
    predictions, labels = run_function(f"{user}:both", own, template=Template.read(tmp_path / "0.pth"))
    assert predictions.tolist() == [[2, 3], [4, 300]] and labels.tolist() == [5, 0]
    assert predictions.dtype == torch.int16


def test_processes_give_the_same(user, monkeypatch):
    monkeypatch.setattr(external, "PROCESS_SECONDS", 0.0)
    predictions, labels = run_function(f"{user}:process", states(7), workers=2)
    assert (predictions[:, 1:] == (LABELS[None, 1:] + torch.arange(7)[:, None]) % 10).all()
    assert torch.equal(labels.long(), LABELS)
    ids = predictions[:, 0]
    assert (ids[:2] == os.getpid()).all() and not (ids[2:] == os.getpid()).any()


def test_a_process_that_dies(user, monkeypatch):
    monkeypatch.setattr(external, "PROCESS_SECONDS", 0.0)
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
        ("number", r"network 0: returns float32 \(\), expected predictions and labels, or bool"),
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
