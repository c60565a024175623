"""The command `audit`: networks of anybody's generator, compared with what they were generated from."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pdiff.cli.app import (
    RUNS,
    Architecture,
    Dataset,
    Function,
    ResumableCommand,
    Shell,
    at_home,
    command,
    overrides,
)
from pdiff.cli.stages import execute

EXAMPLE = "audit --originals trained --generated ours=made theirs=others"


@command(RUNS, EXAMPLE, kind=ResumableCommand)
def audit(
    ctx: typer.Context,
    originals: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            callback=at_home,
            help="Folder of .pth, .pt or .safetensors files, one state dict each: what the generators were fitted on.",
        ),
    ],
    generated: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR...",
            help="Files of the same layout that a generator made; several generators by name make a leaderboard.",
        ),
    ],
    heldout: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            callback=at_home,
            help="Originals that no generator was fitted on. Default: a tenth of --originals is set apart.",
            show_default=False,
        ),
    ] = "",
    dataset: Dataset = "",
    architecture: Architecture = "",
    function: Function = "",
    command: Shell = "",
    align: Annotated[
        Literal["auto", "none", "weights"],
        typer.Option(help="`weights` permutes units to match a reference; `auto` does so for independent seeds."),
    ] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what is finished.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Repeat what is finished, but damaged.")] = False,
) -> None:
    """Compare networks of any generator with its originals, held-out networks, and baselines: new, or copies?"""
    from pdiff.experiment import command_options

    experiment = command_options.audit(
        originals,
        generated,
        heldout=heldout,
        dataset=dataset,
        architecture=architecture,
        function=function,
        command=command,
        align=align,
        overrides=overrides(ctx.args),
    )
    execute(experiment, "audit", fresh=fresh, repair=repair)
