"""The command line: `pdiff <entry point> --tag T [--section.key value ...]`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from pdiff.errors import ProcessError, UserError

ENTRY_POINTS = {
    "main": "all stages under one parent run",
    "prepare": "pretrain a network and collect checkpoints",
    "train": "fit the generator: autoencoder and latent diffusion",
    "generate": "draw networks",
    "evaluate": "compare the generated networks with the originals and the baselines",
}


def parser() -> argparse.ArgumentParser:
    """The arguments; keys of the configuration are not among them, see `overrides`."""
    top = argparse.ArgumentParser(prog="pdiff", description="Generate neural-network weights, tracked by MLflow.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    more = (
        "any key of the configuration (`pdiff show TAG`) may follow, e.g. --autoencoder.latent_size 32 or --processes 4"
    )
    for name, text in ENTRY_POINTS.items():
        command = commands.add_parser(name, help=text, description=text, epilog=more, allow_abbrev=False)
        command.add_argument("--tag", required=True, help="an experiment (`pdiff tags`), or a path to a YAML file")
        command.add_argument("--fresh", nargs="?", const="true", default="false", help="repeat what is finished")
        command.set_defaults(run=_stage)
    show = commands.add_parser(
        "show", help="print the complete configuration of a tag", epilog=more, allow_abbrev=False
    )
    show.add_argument("tag")
    show.set_defaults(run=_show)
    commands.add_parser("tags", help="list all tags").set_defaults(run=_tags)
    text = "print all finished runs of main side by side: test accuracy in percent, similarity, seconds"
    commands.add_parser("compare", help=text, description=text).set_defaults(run=_compare)
    export = commands.add_parser("export", help="write networks of a run as ordinary state-dict files")
    export.add_argument("--run", dest="run_id", required=True, help="a run of prepare, generate or main")
    export.add_argument("--out", type=Path, required=True, help="folder to write to")
    export.add_argument("--format", choices=["pth", "safetensors"], default="pth")
    export.add_argument("--index", type=int, nargs="+", help="which networks; all when absent")
    export.set_defaults(run=_export)
    return top


def overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--section.key value` and `--section.key=value`, as key -> value.

    Raises:
        UserError: anything else.
    """
    found, words = {}, iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}, expected --section.key value")
        key, equals, value = word[2:].partition("=")
        value = value if equals else next(words, None)
        if value is None:
            raise UserError(f"--{key}: a value is missing")
        found[key] = value
    return found


def _stage(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff import config

    experiment = config.load(arguments.tag, overrides(rest))
    if arguments.fresh not in ("true", "false"):
        raise UserError(f"--fresh: expected true or false, but got {arguments.fresh!r}")
    from pdiff import tracking

    fresh = arguments.fresh == "true"
    with tracking.connected():
        if arguments.command == "main":
            done = tracking.main(experiment, fresh=fresh)
        else:
            done = tracking.execute(arguments.command, experiment, fresh=fresh)
    if arguments.command in ("main", "evaluate"):
        _print_evaluation(done.folder)
    print(f"\nrun        {done.run_id}\nartifacts  {done.folder}\ncompare    mlflow ui   (make ui)")


def _print_evaluation(folder: Path) -> None:
    """Print the table of an evaluation."""
    import pandas as pd

    from pdiff import figures

    print(f"\n{figures.table_text(figures.table(pd.read_csv(folder / 'evaluation.csv')))}")
    print(f"\nreport     {folder / 'report.html'}")


def _show(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff import config

    print(config.to_yaml(config.load(arguments.tag, overrides(rest))), end="")


def _tags(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff import config

    overrides(rest)
    for tag, path in sorted(config.tags().items(), key=lambda item: (item[1].parent.name, item[0])):
        if path.parent.name != "experiments":  # what stands there is for `extends` alone
            experiment = config.load(tag)
            print(f"{path.parent.name:10} {tag:28} {experiment.dataset.name:15} {experiment.network.architecture}")


def _compare(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff import tracking

    overrides(rest)
    with tracking.connected():
        table = tracking.compare()
    print("no finished run of main" if table.empty else table.to_string(index=False, float_format=_rounded))


def _rounded(value: float) -> str:
    """A number with as many decimals as it needs beside the others."""
    return f"{value:.3f}" if value <= 1 else f"{value:.2f}"


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff import stages, tracking
    from pdiff.weights import Collection

    overrides(rest)
    with tracking.connected():
        folder, tags = tracking.artifacts_of(arguments.run_id)
        if "pdiff.generate_run" in tags:
            folder, _ = tracking.artifacts_of(tags["pdiff.generate_run"])
    for name in ("generated", "checkpoints"):
        if (folder / f"{name}.safetensors").exists():
            collection = Collection.load(folder / f"{name}.safetensors")
            paths = stages.export(collection, name, arguments.out, form=arguments.format, index=arguments.index)
            print(f"{len(paths)} networks in {arguments.out}")
            return
    raise UserError(f"--run {arguments.run_id}: a {tags.get('pdiff.stage', 'foreign')} run holds no networks")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does, so that none stays RUNNING."""
    raise KeyboardInterrupt


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for a mistake of the user's, 1 for a failure, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    arguments, rest = parser().parse_known_args(words)
    run: Callable[[argparse.Namespace, Sequence[str]], None] = arguments.run
    try:
        run(arguments, rest)
    except UserError as error:
        print(f"pdiff: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no permission, no space
        print(f"pdiff: {error}", file=sys.stderr)
        return 2
    except ProcessError as error:
        print(f"pdiff: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pdiff: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
