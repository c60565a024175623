"""The command line: `pdiff <entry point> --tag T [--section.key value ...]`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pdiff.errors import ProcessError, UserError

if TYPE_CHECKING:
    from pdiff.experiment.schema import Experiment

STAGES = {
    "main": "all stages under one parent run",
    "prepare": "pretrain a network and collect checkpoints",
    "train": "fit the generator: autoencoder and latent diffusion",
    "generate": "draw networks",
    "evaluate": "compare the generated networks with the originals and the baselines",
}
LAUNCHERS = ("processes", "local", "slurm")
ENTRY_POINTS = STAGES | {
    "sweep": "search for the best settings with Optuna",
    "leaderboard": "published results beside the latest ones of every tag, as a run of its own",
    "overhead": "measure what a trial of a sweep costs beside its stages",
}
NEW_CHECKPOINTS = (
    "folder of .pth, .pt or .safetensors files, one state dict each; or a folder with them in checkpoint/ and a test.py"
)


def parser() -> argparse.ArgumentParser:
    """The arguments; keys of the configuration are not among them, see `overrides`."""
    top = argparse.ArgumentParser(prog="pdiff", description="Generate neural-network weights, tracked by MLflow.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    more = (
        "any key of the configuration (`pdiff show TAG`) may follow, e.g. --autoencoder.latent_size 32 or --processes 4"
    )
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text, epilog=more, allow_abbrev=False)
        command.add_argument("--tag", required=True, help="an experiment (`pdiff tags`), or a path to a YAML file")
        command.add_argument("--fresh", nargs="?", const="true", default="false", help="repeat what is finished")
        command.set_defaults(run=_stage)
    _add_sweeps(commands)
    text = ENTRY_POINTS["leaderboard"]
    board = commands.add_parser("leaderboard", help=text, description=text, allow_abbrev=False)
    board.add_argument("words", nargs="*", metavar="WORD", help="show tags that hold one of these")
    board.add_argument("--only", choices=["ours", "all"], default="all", help="leave out what was never run here")
    board.set_defaults(run=_leaderboard)
    show = commands.add_parser(
        "show", help="print the complete configuration of a tag", epilog=more, allow_abbrev=False
    )
    show.add_argument("tag")
    show.set_defaults(run=_show)
    text = "print the parameters and the peak memory of a tag's autoencoder and denoiser, without needing either"
    memory = commands.add_parser("memory", help=text, description=text, epilog=more, allow_abbrev=False)
    memory.add_argument("tag")
    memory.add_argument("--json", action="store_true", help="the same in bytes, for programs")
    memory.set_defaults(run=_memory)
    text = "list all tags, or those in whose row some words occur"
    tags = commands.add_parser("tags", help=text, description=text)
    tags.add_argument("words", nargs="*", metavar="WORD", help="such as main, cifar10, resnet18")
    tags.set_defaults(run=_tags)
    text = "print all finished runs of main side by side: test accuracy in percent, similarity, seconds"
    commands.add_parser("compare", help=text, description=text).set_defaults(run=_compare)
    _add_new(commands)
    export = commands.add_parser("export", help="write networks of a run as ordinary state-dict files")
    export.add_argument("--run", dest="run_id", required=True, help="a run of prepare, generate or main")
    export.add_argument("--out", type=Path, required=True, help="folder to write to")
    export.add_argument("--format", choices=["pth", "safetensors"], default="pth")
    export.add_argument("--index", type=int, nargs="+", help="which networks; all when absent")
    export.set_defaults(run=_export)
    return top


def _add_sweeps(commands: argparse._SubParsersAction) -> None:
    """The commands around sweeps."""
    more = "any key of the configuration may follow, for all trials, e.g. --diffusion.steps 500"
    url = "sqlite:///FILE, journal:///FILE or a database's address; default: PDIFF_STORAGE, else sqlite:///optuna.db"
    text = ENTRY_POINTS["sweep"]
    sweep = commands.add_parser("sweep", help=text, description=text, epilog=more, allow_abbrev=False)
    sweep.add_argument("--tag", required=True, help="an experiment (`pdiff tags`), or a path to a YAML file")
    sweep.add_argument("--sweep", required=True, help="a file in experiments/sweeps, or a path to a YAML file")
    sweep.add_argument("--trials", type=int, default=0, help="of the whole study; default: the sweep's own number")
    sweep.add_argument("--workers", type=int, default=1, help="processes of this command")
    sweep.add_argument("--storage", default="", help=url)
    sweep.add_argument("--study", default="", help="its name; default: SWEEP-TAG")
    sweep.add_argument("--launcher", choices=LAUNCHERS, default="processes", help="where the workers run")
    sweep.add_argument("--launcher-options", default="{}", help="of submitit, as YAML, e.g. {slurm_partition: gpu}")
    sweep.set_defaults(run=_sweep)
    work = commands.add_parser("work", help="one more worker for a study that a sweep leads")
    work.add_argument("--study", required=True)
    work.add_argument("--storage", default="", help=url)
    work.add_argument("--role", choices=["trials", "final"], default="trials", help=argparse.SUPPRESS)
    work.set_defaults(run=_work)
    text = ENTRY_POINTS["overhead"]
    overhead = commands.add_parser("overhead", help=text, description=text, allow_abbrev=False)
    overhead.add_argument("--storage", default="", help=url)
    overhead.add_argument("--trials", type=int, default=100, help="of a study that is deleted afterwards")
    overhead.add_argument("--sampler", choices=["tpe", "random"], default="tpe")
    overhead.set_defaults(run=_overhead)
    studies = commands.add_parser("studies", help="list the studies of a storage")
    studies.add_argument("--storage", default="", help=url)
    studies.set_defaults(run=_studies)


def _add_new(commands: argparse._SubParsersAction) -> None:
    """The arguments of `pdiff new`."""
    text = "make an experiment of your own checkpoint files: look at them, propose settings, write its YAML"
    more = "any key of the configuration may follow (`pdiff show TAG`), e.g. --dataset.image_size 32"
    new = commands.add_parser("new", help=text, description=text, epilog=more, allow_abbrev=False)
    add = new.add_argument
    add("tag", help="name of the new experiment")
    add("--checkpoints", type=Path, required=True, metavar="DIR", help=NEW_CHECKPOINTS)
    add("--out", type=Path, metavar="FOLDER", help="where TAG.yaml is written (default: experiments/own)")
    add("--dataset", default="", metavar="NAME", help="what the networks were trained on, if it is one of pdiff's")
    add("--architecture", default="", metavar="NAME", help="of the networks: pdiff's, timm's, or file.py:function")
    add(
        "--parameters",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="what to generate; default: what varies",
    )
    add("--command", dest="shell", default="", help='prints the accuracy of a file: "python test.py {checkpoint}"')
    add("--function", default="", metavar="FILE.PY:NAME", help="takes a state dict, returns predictions and labels")
    add("--force", action="store_true", help="write over an experiment of this name")
    new.set_defaults(run=_new)


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


def no_overrides(rest: Sequence[str]) -> None:
    """Refuse what is left of the words of a command that runs no experiment.

    Raises:
        UserError: anything.
    """
    for key in overrides(rest):
        raise UserError(f"unknown option --{key}; `--help` lists all")


def _stage(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import config

    experiment = config.load(arguments.tag, overrides(rest))
    if arguments.fresh not in ("true", "false"):
        raise UserError(f"--fresh: expected true or false, but got {arguments.fresh!r}")
    from pdiff.tracking import engine, store

    fresh = arguments.fresh == "true"
    with store.connected() as runs:
        if arguments.command == "main":
            done = engine.main(experiment, runs, fresh=fresh)
        else:
            done = engine.Pipeline(experiment, runs).execute(arguments.command, fresh=fresh)
    if arguments.command in ("main", "evaluate"):
        _print_evaluation(experiment, done.folder)
    print(f"\nrun        {done.run_id}\nartifacts  {done.folder}\ncompare    mlflow ui   (make ui)")


def _sweep(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    import yaml

    from pdiff.sweeps import leader, storage
    from pdiff.tracking import store

    if arguments.workers < 1 or arguments.trials < 0:
        raise UserError(f"--workers {arguments.workers} --trials {arguments.trials}: expected positive numbers")
    try:
        options = yaml.safe_load(arguments.launcher_options)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--launcher-options: expected a mapping in YAML, but got {arguments.launcher_options!r}")
    command = leader.Command(
        tag=arguments.tag,
        sweep=arguments.sweep,
        overrides=overrides(rest),
        trials=arguments.trials,
        workers=arguments.workers,
        storage=arguments.storage or storage.default_storage(),
        study=arguments.study,
        launcher=arguments.launcher,
        options=options,
    )
    with store.connected():
        result = leader.run(command)
    if not result.final.empty:
        print(f"\n{leader.final_text(result.final)}")
    print(f"\nstudy      {command.name} in {storage.without_password(command.storage)}")
    print(f"best       {leader.best_text(result.study)}\nreport     {result.report}\nrun        {result.run_id}")


def _work(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.sweeps import leader, storage

    no_overrides(rest)
    role = leader.finish if arguments.role == "final" else leader.work
    role(arguments.study, arguments.storage or storage.default_storage())


def _studies(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.sweeps import search, storage

    no_overrides(rest)
    table = search.listed(arguments.storage or storage.default_storage())
    print("no study" if table.empty else table.to_string(index=False))


def _overhead(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.sweeps import overhead, storage
    from pdiff.tracking import runs, store

    no_overrides(rest)
    if arguments.trials < 1:
        raise UserError(f"--trials {arguments.trials}: expected a positive number")
    url = arguments.storage or storage.default_storage()
    with store.connected(), runs.around("overhead") as run_id:
        shown = {"storage": storage.without_password(url), "trials": arguments.trials, "sampler": arguments.sampler}
        runs.record(run_id, parameters={f"overhead.{name}": value for name, value in shown.items()})
        seconds = overhead.measure(url, trials=arguments.trials, sampler=arguments.sampler)
        runs.record(run_id, metrics=seconds)
    for name, value in seconds.items():
        print(f"{name:14} {1000 * value:.1f} ms")
    print(f"run            {run_id}")


def _print_evaluation(experiment: Experiment, folder: Path) -> None:
    """Print the table of an evaluation, and what was published of its tag beside it."""
    import pandas as pd

    from pdiff.experiment import config, figures, published
    from pdiff.files import read_json

    print(f"\n{figures.table_text(figures.table(pd.read_csv(folder / 'evaluation.csv')))}")
    if published := published.published(experiment.tag):
        measured = {n: v for n, v in read_json(folder / "summary.json").items() if v is not None}
        print(f"\n{figures.published_table(measured, published).to_string(index=False)}")
        changes = ", ".join(f"{key}={value}" for key, value in config.changes(experiment).items())
        print(f"changed    {changes or 'nothing: settings as published'}")
    print(f"\nreport     {folder / 'report.html'}")


def _show(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import config

    print(config.to_yaml(config.load(arguments.tag, overrides(rest))), end="")


def _new(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import new

    names = ("dataset", "architecture", "parameters", "function", "force")
    options = {name: getattr(arguments, name) for name in names}
    out = arguments.out or new.OWN
    changed = overrides(rest)
    new.new(arguments.tag, arguments.checkpoints, out=out, command=arguments.shell, overrides=changed, **options)


def _tags(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import catalogue

    no_overrides(rest)
    for line in catalogue.lines(arguments.words):
        print(line)


def _memory(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import config

    experiment = config.load(arguments.tag, overrides(rest))
    from pdiff.experiment import memory

    sizes = memory.sizes(experiment)
    needs = memory.needs(experiment, sizes)
    if arguments.json:
        found = {**sizes._asdict(), "needs": [need._asdict() | {"peak": need.peak} for need in needs]}
        print(json.dumps(found, indent=1))
    else:
        print(memory.text(experiment, sizes, needs))


def _leaderboard(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import leaderboard
    from pdiff.tracking import queries, store

    no_overrides(rest)
    with store.connected():
        done, board = queries.log_leaderboard(arguments.words, only_ours=arguments.only == "ours")
    print("no tag to show" if board.empty else leaderboard.text(board))
    print(f"\nrun          {done.run_id}\nleaderboard  {done.folder / 'leaderboard.html'}")


def _compare(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.tracking import queries, store

    no_overrides(rest)
    with store.connected():
        table = queries.compare()
    print("no finished run of main" if table.empty else table.to_string(index=False, float_format=_rounded))


def _rounded(value: float) -> str:
    """A number with as many decimals as it needs beside the others."""
    return f"{value:.3f}" if value <= 1 else f"{value:.2f}"


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pdiff.experiment import export
    from pdiff.method.collection import Collection
    from pdiff.tracking import store

    no_overrides(rest)
    with store.connected():
        folder, tags = store.artifacts_of(arguments.run_id)
        if "pdiff.generate_run" in tags:
            folder, _ = store.artifacts_of(tags["pdiff.generate_run"])
    for name in ("generated", "checkpoints"):
        if (folder / f"{name}.safetensors").exists():
            collection = Collection.load(folder / f"{name}.safetensors")
            paths = export.export(collection, name, arguments.out, form=arguments.format, index=arguments.index)
            print(f"{len(paths)} networks in {arguments.out}")
            return
    raise UserError(f"--run {arguments.run_id}: a {tags.get('pdiff.stage', 'foreign')} run holds no networks")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does, so that none stays RUNNING."""
    raise KeyboardInterrupt


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 2 for a mistake of the user's, 1 for a failure, 130 when interrupted,
    141 when nobody reads the output any more."""
    signal.signal(signal.SIGTERM, _interrupt)
    arguments, rest = parser().parse_known_args(words)
    run: Callable[[argparse.Namespace, Sequence[str]], None] = arguments.run
    try:
        run(arguments, rest)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
