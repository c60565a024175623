"""The command `pdiff`: runs what the command line asks for, and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType

import typer

from pdiff.cli.app import app
from pdiff.errors import Failure, ProcessError, UserError

for group in ("stages", "sweeps", "experiments", "results"):  # in the order of `pdiff --help`
    import_module(f"pdiff.cli.{group}")
COMMANDS = typer.main.get_command(app)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: those of the command line when absent.

    Returns:
        The exit code: 0; 2 for a user error, which is one line; 1 for a failure; 130 when interrupted; 141 when the
        pipe that the output goes to is closed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if "_PDIFF_COMPLETE" in os.environ:  # set by the shell: typer answers, and ends the process
        COMMANDS.main(prog_name="pdiff")
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    try:
        with COMMANDS.make_context("pdiff", words) as context:
            COMMANDS.invoke(context)
        sys.stdout.flush()
    except typer.Exit as ended:  # --help and --version
        return ended.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except typer.TyperException as error:  # not a command line of ours
        message = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
        path = f"pdiff {words[0]}" if words[0] in COMMANDS.commands else "pdiff"
        return _fail(f"{message[:1].lower()}{message[1:]} (see `{path} --help`)", 2)
    except (Failure, ProcessError) as error:
        return _fail(error, 1)
    except (UserError, OSError) as error:  # OSError: no permission, no space
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    return 0


def _fail(message: object, code: int) -> int:
    """Print one line, and return the exit code."""
    print(f"pdiff: {message}", file=sys.stderr)
    return code


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a run as Ctrl-C does, so that none stays RUNNING.

    A plain KeyboardInterrupt that passed through `exec` of a string, as in many imports, makes Python end itself by
    SIGINT at exit, whatever the exit code is.
    """


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated
