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
from pdiff.errors import ProcessError, UserError, one_line, out_of_memory

for group in ("stages", "audit", "sweeps", "experiments", "results", "benchmark"):  # in the order of `pdiff --help`
    import_module(f"pdiff.cli.{group}")
COMMANDS = typer.main.get_command(app)
LONGEST = 4000  # characters of a message


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: those of the command line when absent.

    Returns:
        The exit code: 0; 2 for a mistake of the user and 1 for a fault of the world, each of them one line; 130 when
        interrupted; 141 when the pipe that the output goes to is closed.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    _open_stdout()
    if not (sys.stderr and sys.stderr.isatty()):
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries; tqdm reads it when it is imported
    if "_PDIFF_COMPLETE" in os.environ:  # set by the shell: typer answers, and ends the process
        COMMANDS.main(prog_name="pdiff")
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    try:
        code = _invoke(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except typer.TyperException as error:  # not a command line of ours
        message = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
        path = f"pdiff {words[0]}" if words[0] in COMMANDS.commands else "pdiff"
        return _fail(f"{message[:1].lower()}{message[1:]} (see `{path} --help`)", 2)
    except UserError as error:
        return _fail(error, error.exit_code)
    except (ProcessError, OSError) as error:  # OSError: no permission, no space
        return _fail(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}", 1)
    except KeyboardInterrupt:
        resumes = getattr(COMMANDS.commands.get(words[0]), "resumes", False)
        return _fail("interrupted; the same command goes on from here" if resumes else "interrupted", 130)


def _invoke(words: Sequence[str]) -> int:
    """Run one command, and return its exit code."""
    try:
        with COMMANDS.make_context("pdiff", words) as context:
            COMMANDS.invoke(context)
    except typer.Exit as ended:  # --help and --version
        return ended.exit_code
    except SystemExit as ended:  # rich ends the process where its output goes to a closed pipe
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        raise
    return 0


def _open_stdout() -> None:
    """Let a standard output that the caller closed be a pipe that nobody reads, for Python and for child processes."""
    if sys.stdout is None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")


def _fail(message: object, code: int) -> int:
    """Print one line, and return the exit code."""
    text = message if isinstance(message, ProcessError) else one_line(str(message), LONGEST)
    print(f"pdiff: {text}", file=sys.stderr)
    return code


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a run as Ctrl-C does, so that none stays RUNNING.

    A plain KeyboardInterrupt that passed through `exec` of a string, as in many imports, makes Python end itself by
    SIGINT at exit, whatever the exit code is.
    """


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated
