"""The commands on experiments: tags, show, memory, new."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pdiff.cli.app import EXPERIMENTS, ConfigurableCommand, TagArgument, Words, command, overrides
from pdiff.cli.tables import print_frame, print_table


@command(EXPERIMENTS, "tags main cifar10 resnet18")
def tags(words: Words = None) -> None:
    """List all tags, or those whose row contains every WORD."""
    from pdiff.experiment import catalogue

    rows, problems = catalogue.table(words or [])
    print_table(catalogue.HEADER, rows)
    for problem in problems:
        print(problem)


@command(EXPERIMENTS, "show digits_mlp --generate.count 50", kind=ConfigurableCommand)
def show(ctx: typer.Context, tag: TagArgument) -> None:
    """Print the complete configuration of a tag."""
    from pdiff.experiment import config

    print(config.to_yaml(config.load(tag, overrides(ctx.args))), end="")


@command(EXPERIMENTS, "memory digits_mlp --diffusion.batch_size 64", kind=ConfigurableCommand)
def memory(
    ctx: typer.Context,
    tag: TagArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The same in bytes, for programs.")] = False,
) -> None:
    """Predict the peak memory of a tag's autoencoder and denoiser, without allocating it."""
    from pdiff.experiment import config

    experiment = config.load(tag, overrides(ctx.args))
    from pdiff.experiment import memory

    sizes = memory.sizes(experiment)
    needs = memory.needs(experiment, sizes)
    if as_json:
        found = {**sizes._asdict(), "needs": [need._asdict() | {"peak": need.peak} for need in needs]}
        print(json.dumps(found, indent=1))
    else:
        print(f"{memory.heading(experiment, sizes)}\n")
        print_frame(memory.table(needs))
        print("\nin MB (2^20 bytes); training on a GPU is in bfloat16, all else in float32")
        print(*memory.peaks(needs), sep="\n")


def complete_datasets() -> list[str]:
    """The names of data sets."""
    from pdiff.networks.datasets import DATASETS

    return list(DATASETS)


def _at_home(path: Path | str | None) -> Any:
    """A path, unless it starts in a home folder that does not exist."""
    if os.path.expanduser(path or "").startswith("~"):
        raise typer.BadParameter(f"there is no home folder {str(path).partition('/')[0]}")
    return path


@command(EXPERIMENTS, "new my_tag --checkpoints FOLDER --generate.count 100", kind=ConfigurableCommand)
def new(
    ctx: typer.Context,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the new experiment.")],
    checkpoints: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            callback=_at_home,
            help="Folder of .pth, .pt or .safetensors files, one state dict each; "
            "or a folder with them in checkpoint/ and a test.py.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            callback=_at_home,
            metavar="FOLDER",
            help="Where TAG.yaml is written. Default: experiments/own.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What the networks were trained on, if it is one of pdiff's data sets.",
            show_default=False,
            autocompletion=complete_datasets,
        ),
    ] = "",
    architecture: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of the networks: pdiff's, timm's, or file.py:function.", show_default=False),
    ] = "",
    parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN...", help="What to generate. Default: what varies.", show_default=False),
    ] = None,
    shell: Annotated[
        str,
        typer.Option(
            "--command",
            metavar="TEXT",
            help='Prints the accuracy of a file, such as "python test.py {checkpoint}".',
            show_default=False,
        ),
    ] = "",
    function: Annotated[
        str,
        typer.Option(
            callback=_at_home,
            metavar="FILE.PY:NAME",
            help="Takes a state dict, returns predictions and labels.",
            show_default=False,
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over an experiment of this name.")] = False,
) -> None:
    """Make an experiment of your checkpoint files: inspect them, propose settings, write the YAML."""
    from pdiff.experiment.new import FOLDER, new

    new(
        tag,
        checkpoints,
        out=out or FOLDER,
        dataset=dataset,
        architecture=architecture,
        parameters=parameters or [],
        command=shell,
        function=function,
        overrides=overrides(ctx.args),
        force=force,
    )
