"""The stages of an experiment, and all of them: main, prepare, train, generate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdiff.cli.app import RUNS, Tag, command, overrides
from pdiff.cli.tables import print_frame

if TYPE_CHECKING:
    from pdiff.experiment.schema import Experiment

STAGES = {
    "main": "All stages under one parent run.",
    "prepare": "Pretrain a network and collect checkpoints.",
    "train": "Fit the generator: autoencoder and latent diffusion.",
    "generate": "Sample networks.",
    "evaluate": "Compare the generated networks with the originals and the baselines.",
}
EXAMPLES = {
    "main": "main --tag digits_mlp --autoencoder.latent_size 32",
    "prepare": "prepare --tag digits_mlp --prepare.collect.checkpoints 100",
    "train": "train --tag digits_mlp --diffusion.steps 500",
    "generate": "generate --tag digits_mlp --generate.count 50 --generate.seed 1",
    "evaluate": "evaluate --tag digits_mlp --evaluate.noise 0.01",
}


def _stage(name: str) -> None:
    """Register the command of a stage."""

    def run(
        ctx: typer.Context,
        tag: Tag,
        fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what is finished.")] = False,
    ) -> None:
        from pdiff.experiment import config

        experiment = config.load(tag, overrides(ctx.args))
        from pdiff.tracking import engine, store

        with store.connected() as runs:
            if name == "main":
                done = engine.main(experiment, runs, fresh=fresh)
            else:
                done = engine.Pipeline(experiment, runs).execute(name, fresh=fresh)
        if name in ("main", "evaluate"):
            _print_evaluation(experiment, done.folder)
        print(f"\nrun        {done.run_id}\nartifacts  {done.folder}\ncompare    mlflow ui   (make ui)")

    command(RUNS, EXAMPLES[name], name=name, help=STAGES[name], keys=True)(run)


for stage in STAGES:
    _stage(stage)


def _print_evaluation(experiment: Experiment, folder: Path) -> None:
    """Print the table of an evaluation, and what was published for its tag beside it."""
    import pandas as pd

    from pdiff.experiment import config, report
    from pdiff.experiment.published import published
    from pdiff.files import read_json

    print()
    print_frame(report.cells(report.table(pd.read_csv(folder / "evaluation.csv"))))
    if there := published(experiment.tag):
        measured = {n: v for n, v in read_json(folder / "summary.json").items() if v is not None}
        print()
        print_frame(report.published_table(measured, there))
        changes = ", ".join(f"{key}={value}" for key, value in config.changes(experiment).items())
        print(f"changed    {changes or 'nothing: settings as published'}")
    print(f"\nreport     {folder / 'report.html'}")
