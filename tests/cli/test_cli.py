"""The command line itself: help, and arguments that name configuration keys."""

import os
import sys

import pytest

from pdiff.cli.main import ENTRY_POINTS, main, overrides
from pdiff.errors import UserError


@pytest.mark.parametrize(
    "command", [[], *([name] for name in [*ENTRY_POINTS, "show", "tags", "compare", "new", "export"])]
)
def test_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: pdiff" in printed and all(name in printed for name in (command or ENTRY_POINTS))


def test_tags_and_show(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["tags", "resnet18", "cifar100", "main"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [
        ["main", "cifar100_resnet18", "cifar100", "resnet18", "2", "048", "76.72", "->", "77.24"]
    ]
    assert main(["show", "digits_mlp", "--generate.count=7"]) == 0
    assert "  count: 7\n" in capsys.readouterr().out


def test_overrides() -> None:
    assert overrides(["--a.b", "1", "--c=2=3", "--d", "--e"]) == {"a.b": "1", "c": "2=3", "d": "--e"}
    for bad in (["x"], ["--a"], ["-a", "1"]):
        with pytest.raises(UserError):
            overrides(bad)


@pytest.mark.parametrize("command", [["tags"], ["studies"], ["compare"], ["leaderboard"], ["overhead"]])
def test_what_takes_no_settings_refuses_them(command, capsys) -> None:
    assert main([*command, "--olny=ours"]) == 2
    assert "unknown option --olny" in capsys.readouterr().err


def test_nobody_reads_on(monkeypatch, capsys) -> None:
    """`pdiff show digits_mlp | true` says nothing."""
    read, written = os.pipe()
    os.close(read)
    with open(written, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["show", "digits_mlp"]) == 141
    assert capsys.readouterr().err == ""
