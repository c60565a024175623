"""The command line itself: help, examples, words that name configuration keys, mistakes, completion."""

import os
import shlex
import subprocess
import sys

import pytest

import pdiff
from pdiff.cli.app import overrides
from pdiff.cli.main import COMMANDS, main
from pdiff.errors import UserError
from pdiff.experiment import config

NAMES = list(COMMANDS.commands)


def words(command: str) -> list[str]:
    """The words of an example after `pdiff`."""
    program, *found = shlex.split(COMMANDS.commands[command].epilog.rpartition("Example: ")[2])
    assert program == "pdiff"
    return found


@pytest.mark.parametrize("command", [[], *([name] for name in NAMES)])
def test_help(command, capsys) -> None:
    assert main([*command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Usage: pdiff" in printed and all(name in printed for name in (command or NAMES))
    *_, example = printed.strip().splitlines()
    assert example.strip() == "Example: pdiff " + (" ".join(words(command[0])) if command else "main --tag digits_mlp")


def test_commands_are_grouped() -> None:
    panels = {command.rich_help_panel for command in COMMANDS.commands.values()}
    assert len(panels) == 4 and all(isinstance(panel, str) for panel in panels)


@pytest.mark.parametrize("command", NAMES)
def test_examples(command) -> None:
    """Every word of an example is understood, and its experiment can be loaded."""
    name, *rest = words(command)
    assert name == command
    context = COMMANDS.commands[command].make_context(name, rest)
    changed = overrides(context.args)
    if "tag" in context.params and command != "new":
        config.load(context.params["tag"], changed)
    else:
        config.load("digits_mlp", changed)


SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in ("memory", "compare", "leaderboard")]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tags", "show", "studies", *SLOW])
def test_examples_run(command, workspace, capsys) -> None:
    assert main(words(command)) == 0
    printed = capsys.readouterr()
    assert printed.out and not printed.err.startswith("pdiff:")


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pdiff {pdiff.__version__}\n"


def test_without_words(capsys) -> None:
    assert main([]) == 0
    assert "Usage: pdiff" in capsys.readouterr().out


@pytest.mark.slow
def test_tags_and_show(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["tags", "resnet18", "cifar100", "main"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [
        ["main", "cifar100_resnet18", "cifar100", "resnet18", "2", "048", "76.72", "->", "77.24"]
    ]
    assert main(["show", "digits_mlp", "--generate.count=7"]) == 0
    assert "  count: 7\n" in capsys.readouterr().out
    assert main(["show", "--generate.count", "7", "--evaluate.noise", "[-1e-3]", "digits_mlp"]) == 2
    assert "evaluate.noise" in capsys.readouterr().err


def test_overrides() -> None:
    assert overrides(["--a.b", "1", "--c=2=3", "--d", "--e"]) == {"a.b": "1", "c": "2=3", "d": "--e"}
    for bad in (["x"], ["--a"], ["-a", "1"]):
        with pytest.raises(UserError):
            overrides(bad)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("main --tag t", {"tag": "t", "fresh": False}),
        ("main --tag t --fresh", {"fresh": True}),
        ("main --fresh true --tag t", {"tag": "t", "fresh": True}),
        ("main --fresh false --tag t", {"tag": "t", "fresh": False}),
        ("main --tag=t --fresh=true --a.b c", {"tag": "t", "fresh": True}),
        ("main --a.b --fresh --tag t", {"fresh": False}),
        ("sweep --tag t --sweep s --storage '' --study ''", {"storage": "", "study": "", "trials": 0}),
        ("export --run r --out o --index 0 1 2 --format safetensors", {"index": [0, 1, 2], "form": "safetensors"}),
        ("export --run r --out o --index=3", {"index": [3]}),
        ("export --run r --out o", {"run_id": "r", "form": "pth"}),
        ("new t --parameters a.* b --checkpoints c --force", {"tag": "t", "parameters": ["a.*", "b"], "force": True}),
        ("work --study s --role final", {"role": "final"}),
        ("audit --originals o --generated a=x b=y --fresh", {"generated": ["a=x", "b=y"], "fresh": True}),
        ("audit --originals o --generated=a=x --generated=b=y --align weights", {"generated": ["a=x", "b=y"]}),
        ("audit --originals o --generated x --heldout '' --command ''", {"generated": ["x"], "command": ""}),
        ("tags main cifar10", {"words": ["main", "cifar10"]}),
    ],
)  # fmt: skip
def test_words(line, expected) -> None:
    name, *rest = shlex.split(line)
    context = COMMANDS.commands[name].make_context(name, rest)
    assert expected.items() <= context.params.items()


@pytest.mark.parametrize("command", [["tags"], ["studies"], ["compare"], ["leaderboard"], ["overhead"]])
def test_what_takes_no_settings_refuses_them(command, capsys) -> None:
    assert main([*command, "--olny=ours"]) == 2
    assert "unknown option --olny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("shwo", "no such command 'shwo'. Did you mean 'show'? (see `pdiff --help`)"),
        ("show", "missing argument 'TAG' (see `pdiff show --help`)"),
        ("main", "missing option '--tag' (see `pdiff main --help`)"),
        ("main --tag", "option '--tag' requires an argument"),
        ("main --tag digits_mlp --fresh=maybe", "option '--fresh' does not take a value (see `pdiff main --help`)"),
        ("main --tag digits_mlp maybe", "unexpected argument 'maybe', expected --section.key value"),
        ("main --tag digits_mlp --sed 1", "command line: sed: unknown key; did you mean seed?"),
        ("main --tag digits_mlp --seed", "--seed: a value is missing"),
        ("show digits_mlp -x", "no such option: -x"),
        ("compare now", "RUN now: a run cannot be compared alone"),
        ("overhead --trials many", "invalid value for '--trials'"),
        ("sweep --tag digits_mlp --sweep layers --launcher moon", "'moon' is not one of 'processes'"),
        ("sweep --tag digits_mlp --sweep layer", "unknown sweep 'layer'; did you mean layers?"),
        ("sweep --tag digits_mpl --sweep layers", "unknown tag 'digits_mpl'; did you mean digits_mlp"),
    ],
)
def test_mistakes_are_one_line(line, expected, capsys) -> None:
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("pdiff: ") and printed.err.count("\n") == 1
    assert expected in printed.err


@pytest.mark.slow
def test_a_closed_pipe(monkeypatch, capsys) -> None:
    """`pdiff show digits_mlp | true` prints nothing."""
    for command in ("show", "tags"):
        read, written = os.pipe()
        os.close(read)
        with open(written, "w") as pipe, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", pipe)
            assert main(words(command)) == 141
        assert capsys.readouterr().err == ""


TERMINATED = """
import os, signal
exec("os.kill(os.getpid(), signal.SIGTERM)\\nwhile True: pass")
"""


@pytest.mark.slow
def test_a_terminated_command_ends_with_130(workspace) -> None:
    """Also inside `exec` of a string, which many modules call when they are imported: there Python prefers SIGINT."""
    (workspace / "net.py").write_text(TERMINATED)
    words = ["memory", "tiny.yaml", "--network.architecture", "net.py:net"]
    done = subprocess.run([sys.executable, "-m", "pdiff", *words], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "pdiff: interrupted\n"


# -- completion


def offered(shell: str, line: str, names: list[str]) -> list[str]:
    """What a shell is offered at the end of a line: the longest of some names in each row, or else the row."""
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    variables = {**os.environ, "_PDIFF_COMPLETE": f"complete_{shell}", **asked[shell]}
    done = subprocess.run([sys.executable, "-m", "pdiff"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = [[name for name in names if name in row] for row in done.stdout.splitlines()]
    return [max(row, key=len) if row else done.stdout for row in found]


FASHION = [
    *("fashion_branches", "fashion_cnn", "fashion_cnn_paper", "fashion_resnet18", "fashion_resnet18_paper"),
    "fashion_seeds",
]


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(shell, marks=pytest.mark.slow) for shell in ("zsh", "fish"))])
def test_tags_are_completed(shell) -> None:
    assert offered(shell, "pdiff show fashion_", FASHION) == FASHION


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pdiff sho", ["show"]),
        ("pdiff main --a.b 1 --tag digits_c", ["digits_cnn"]),
        ("pdiff sweep --tag digits_mlp --sweep la", ["latent_noise_timesteps", "layers"]),
        ("pdiff new t --dataset cifar", ["cifar10", "cifar100"]),
        ("pdiff leaderboard --only ou", ["ours"]),
    ],
)
def test_completion(line, expected) -> None:
    assert offered("bash", line, expected) == expected
