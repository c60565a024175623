"""The commands that run stages: main runs all of them; prepare, train, generate, evaluate run one and what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdiff.cli.app import RUNS, ResumableCommand, Tag, command, overrides
from pdiff.cli.tables import print_frame

if TYPE_CHECKING:
    import pandas as pd

    from pdiff.experiment.schema import Experiment

STAGES = {
    "main": ("All stages under one parent run.", "--autoencoder.latent_size 32"),
    "prepare": ("Pretrain a network and collect checkpoints.", "--prepare.collect.checkpoints 100"),
    "train": ("Fit the generator.", "--diffusion.steps 500"),
    "generate": ("Sample networks.", "--generate.count 50 --generate.seed 1"),
    "evaluate": ("Compare generated networks with the originals and the baselines.", "--evaluate.noise 0.01"),
}
"""Command -> its help, and the options of an example."""


def _stage(name: str, description: str, example: str) -> None:
    """Register the command of a stage."""

    def run(
        ctx: typer.Context,
        tag: Tag,
        fresh: Annotated[bool, typer.Option("--fresh", help="Repeat what is finished.")] = False,
        repair: Annotated[bool, typer.Option("--repair", help="Repeat what is finished, but damaged.")] = False,
    ) -> None:
        from pdiff.experiment import config

        execute(config.load(tag, overrides(ctx.args)), name, fresh=fresh, repair=repair)

    command(RUNS, f"{name} --tag digits_mlp {example}", name=name, help=description, kind=ResumableCommand)(run)


for stage, (description, example) in STAGES.items():
    _stage(stage, description, example)


def execute(experiment: Experiment, name: str, *, fresh: bool, repair: bool) -> None:
    """Run a stage, or all of them (`main`), and print what came out, and where it is."""
    from pdiff import library
    from pdiff.experiment import stages

    done = library.execute(experiment, name, fresh=fresh, repair=repair)
    if name in ("main", stages.evaluation(experiment)):
        _print_evaluation(experiment, done.folder)
    from pdiff.tracking import store  # imports MLflow, which is there by now

    with store.connected() as runs:
        print(f"\nrun        {done.run_id}\nartifacts  {done.folder}\ncompare    {runs.table(done.run_id)}")


def _print_evaluation(experiment: Experiment, folder: Path) -> None:
    """Print the table of an evaluation, and what was published for its tag beside it."""
    import pandas as pd

    from pdiff.experiment import board, config, report
    from pdiff.experiment.published import published
    from pdiff.files import read_json

    print(f"\n{(folder / 'verdict.md').read_text(encoding='utf-8')}")
    if len(experiment.generators) > 1:
        print_frame(board.cells(pd.read_csv(folder / "tables" / "board.csv")))
    else:
        print_frame(_table(experiment, pd.read_csv(folder / "evaluation.csv")))
    if not experiment.evaluator.measures:
        print("\nno accuracy: there is no data set, and neither evaluate.function nor evaluate.command to measure it")
    if there := published(experiment.tag):
        measured = {n: v for n, v in read_json(folder / "summary.json").items() if v is not None}
        print()
        print_frame(report.published_table(measured, there))
        changes = ", ".join(f"{key}={value}" for key, value in config.changes(experiment).items())
        print(f"changed    {changes or 'nothing: settings as published'}")
    print(f"\nreport     {folder / 'report.html'}")


def _table(experiment: Experiment, evaluation: pd.DataFrame) -> pd.DataFrame:
    """The table of an evaluation as text; without accuracies it shows distances."""
    from pdiff.experiment import report
    from pdiff.experiment.metrics import MISSING, find

    cells = report.cells(report.table(evaluation))
    if not experiment.evaluator.measures:
        distances = evaluation.groupby("group", sort=False)["nearest_distance"].mean()
        cells["distance to the nearest original"] = [
            find("nearest_distance").text(distances[group]) for group in cells["group"]
        ]
    return cells.loc[:, (cells != MISSING).any()]
