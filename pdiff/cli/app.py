"""The application, and what its commands share: keys of the configuration as options, examples, completion."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import pdiff
from pdiff.errors import UserError

RUNS = "Runs, also as `mlflow run . -e COMMAND -P key=value`"
EXPERIMENTS = "Experiments"
RESULTS = "Results"
SWEEPS = "Studies"
KEYS = "Any key of the configuration may follow, as --section.key value; `pdiff show TAG` prints all of them."

app = typer.Typer(
    name="pdiff",
    help="Generate neural-network weights, tracked by MLflow.",
    epilog="Example: pdiff main --tag digits_mlp",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(TyperCommand):
    """A command; words that none of its options takes are keys of the configuration, or else a mistake.

    Two notations are understood beside typer's: `--index 0 1 2`, and flags with a value, `--fresh true`, which is how
    MLflow passes them.
    """

    allow_extra_args = True
    takes_keys = False
    resumes = False

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the words of the command; those of keys are left in `ctx.args`."""
        for word in args:  # in completion nothing is a mistake
            if not ctx.resilient_parsing and any("\ud800" <= letter <= "\udfff" for letter in word):
                raise UserError(f"argument {word!r}: not UTF-8")
        words, keys = self._sorted(ctx, args)
        super().parse_args(ctx, words)
        ctx.args += keys
        if not self.takes_keys and not ctx.resilient_parsing:
            for key in overrides(ctx.args):
                raise UserError(f"unknown option --{key}; `{ctx.command_path} --help` lists all")
        return ctx.args

    def _sorted(self, ctx: typer.Context, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words of the command's own options and arguments, as typer parses them, and those of keys."""
        options: dict[str, Any] = {name: option for option in self.get_params(ctx) for name in option.opts}
        words: list[str] = []
        keys: list[str] = []
        rest, given = list(args), {}
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            option = options.get(name)
            if not word.startswith("--"):
                words.append(word)
            elif option and option.is_flag:
                if rest[:1] in (["true"], ["false"]) and not equals:
                    value = rest.pop(0)
                words += {"": [name], "true": [name], "false": []}.get(value, [word])
            elif option and option.multiple and not equals:
                if not ctx.resilient_parsing and (not rest or rest[0].startswith("--")):
                    raise UserError(f"{name}: a value is missing")
                while rest and not rest[0].startswith("--"):
                    words += [name, rest.pop(0)]
            else:
                values = [] if equals else rest[:1]
                del rest[: len(values)]
                if option and not (option.multiple or ctx.resilient_parsing):
                    _put_once(given, name[2:], value if equals else "".join(values))
                (words if option else keys).extend([word, *values])
        return words, keys


class ConfigurableCommand(Command):
    """A command that takes keys of the configuration, see `overrides`."""

    takes_keys = True


class ResumableCommand(ConfigurableCommand):
    """A command on an experiment that goes on where it was when it is given again after an interruption."""

    resumes = True


def command(
    panel: str, example: str, *, kind: type[Command] = Command, name: str | None = None, help: str | None = None
) -> Any:
    """Register a function as a command.

    Args:
        panel: group of commands in `pdiff --help`.
        example: words after `pdiff` that work; the last line of the command's help.
        kind: a function whose kind takes keys of the configuration finds them in `overrides(ctx.args)`.
        name: that of the function when absent.
        help: its docstring when absent.
    """
    epilog = f"{KEYS}\n\nExample: pdiff {example}" if kind.takes_keys else f"Example: pdiff {example}"
    return app.command(name, cls=kind, help=help, rich_help_panel=panel, epilog=epilog)


def overrides(words: Sequence[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value`, as key -> value.

    Raises:
        UserError: anything else; a key that stands twice, or whose section stands after it and would replace it.
    """
    found: dict[str, str] = {}
    sections: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}, expected --section.key value")
        key, equals, value = word[2:].partition("=")
        value = value if equals else next(rest, None)
        if value is None:
            raise UserError(f"--{key}: a value is missing")
        _put_once(found, key, value)
        if key in sections:
            raise UserError(f"--{key} would replace --{sections[key]}, expected it before that")
        sections |= {key[: dot.start()]: key for dot in re.finditer(r"\.", key)}
    return found


def _put_once(found: dict[str, str], name: str, value: str) -> None:
    """Record what is given as --name.

    Raises:
        UserError: it has been given before.
    """
    if name in found:
        raise UserError(f"--{name}: given twice, as {found[name]!r} and {value!r}")
    found[name] = value


def complete_tags() -> Iterator[tuple[str, str]]:
    """The tags that can be run, each with its category."""
    from pdiff.experiment import config

    yield from ((tag, path.parent.name) for tag, path in sorted(config.runnable().items()))


def complete_sweeps() -> list[str]:
    """The names of sweeps."""
    from pdiff.sweeps import schema

    return sorted(schema.sweeps())


TAG: dict[str, Any] = {
    "metavar": "TAG",
    "help": "An experiment (`pdiff tags`), or a path to a YAML file.",
    "autocompletion": complete_tags,
}
Tag = Annotated[str, typer.Option(**TAG)]
TagArgument = Annotated[str, typer.Argument(**TAG)]


def complete_datasets() -> list[str]:
    """The names of data sets."""
    from pdiff.networks.datasets import DATASETS

    return list(DATASETS)


def at_home(path: Path | str | None) -> Any:
    """A path, unless it starts in a home folder that does not exist."""
    if os.path.expanduser(path or "").startswith("~"):
        raise typer.BadParameter(f"there is no home folder {str(path).partition('/')[0]}")
    return path


Dataset = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What the networks were trained on, if it is one of pdiff's data sets.",
        show_default=False,
        autocompletion=complete_datasets,
    ),
]
Architecture = Annotated[
    str, typer.Option(metavar="NAME", help="Of the networks: pdiff's, timm's, or file.py:function.", show_default=False)
]
Shell = Annotated[
    str,
    typer.Option(
        "--command",
        metavar="TEXT",
        help='Prints the accuracy of a file, such as "python test.py {checkpoint}".',
        show_default=False,
    ),
]
Function = Annotated[
    str,
    typer.Option(
        callback=at_home,
        metavar="FILE.PY:NAME",
        help="Takes a state dict, returns predictions and labels.",
        show_default=False,
    ),
]
Words = Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", show_default=False)]


def _print_version(value: bool) -> None:
    if value:
        print(f"pdiff {pdiff.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of pdiff itself."""
