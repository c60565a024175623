"""The command line itself: help, and arguments that name configuration keys."""

import pytest

from pdiff.__main__ import ENTRY_POINTS, main, overrides
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


def test_tags_and_show(capsys) -> None:
    assert main(["tags"]) == 0
    assert {"digits_mlp", "cifar100_resnet18"} <= set(capsys.readouterr().out.split())
    assert main(["show", "digits_mlp", "--generate.count=7"]) == 0
    assert "  count: 7\n" in capsys.readouterr().out


def test_overrides() -> None:
    assert overrides(["--a.b", "1", "--c=2=3", "--d", "--e"]) == {"a.b": "1", "c": "2=3", "d": "--e"}
    for bad in (["x"], ["--a"], ["-a", "1"]):
        with pytest.raises(UserError):
            overrides(bad)
