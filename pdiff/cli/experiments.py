"""The commands on experiments: tags, show, memory, new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pdiff.cli.app import (
    EXPERIMENTS,
    Architecture,
    ConfigurableCommand,
    Dataset,
    Function,
    Shell,
    TagArgument,
    Words,
    at_home,
    command,
    overrides,
)
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


@command(EXPERIMENTS, "new my_tag --checkpoints FOLDER --generate.count 100", kind=ConfigurableCommand)
def new(
    ctx: typer.Context,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="Name of the new experiment.")],
    checkpoints: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            callback=at_home,
            help="Folder of .pth, .pt or .safetensors files, one state dict each; a zoo of another format; "
            "or a folder with them in checkpoint/ and a test.py.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            callback=at_home,
            metavar="FOLDER",
            help="Where TAG.yaml is written. Default: experiments/own.",
            show_default=False,
        ),
    ] = None,
    dataset: Dataset = "",
    architecture: Architecture = "",
    parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN...", help="What to generate. Default: what varies.", show_default=False),
    ] = None,
    shell: Shell = "",
    function: Function = "",
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
