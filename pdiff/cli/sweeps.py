"""The commands of sweeps and their studies: sweep, work, studies, overhead."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pdiff.cli.app import RUNS, SWEEPS, ResumableCommand, Tag, command, complete_sweeps, overrides
from pdiff.cli.tables import print_frame
from pdiff.errors import UserError

Storage = Annotated[
    str,
    typer.Option(
        metavar="URL",
        show_default=False,
        help="sqlite:///FILE, journal:///FILE or a database's address. Default: PDIFF_STORAGE, else sqlite:///optuna.db.",
    ),
]


@command(RUNS, "sweep --tag digits_mlp --sweep accuracy_cost --trials 3", kind=ResumableCommand)
def sweep(
    ctx: typer.Context,
    tag: Tag,
    sweep: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A file in experiments/sweeps, or a path to a YAML file.",
            autocompletion=complete_sweeps,
        ),
    ],
    trials: Annotated[
        int, typer.Option(help="Trials of the whole study. Default: those of the sweep.", show_default=False)
    ] = 0,
    workers: Annotated[int, typer.Option(help="Processes of this command.")] = 1,
    storage: Storage = "",
    study: Annotated[str, typer.Option(help="Name of the study. Default: SWEEP-TAG.", show_default=False)] = "",
    launcher: Annotated[
        Literal["processes", "inline", "local", "slurm"], typer.Option(help="Where the workers run.")
    ] = "processes",
    launcher_options: Annotated[
        str,
        typer.Option(metavar="YAML", help="Options of submitit, such as {slurm_partition: gpu}.", show_default=False),
    ] = "{}",
) -> None:
    """Search for the best settings with Optuna."""
    from pdiff import library
    from pdiff.experiment import documents
    from pdiff.sweeps.command import Command
    from pdiff.sweeps.storage import default_storage, without_password

    options = documents.value(launcher_options)
    if not isinstance(options, dict):
        raise UserError(f"--launcher-options: expected a mapping in YAML, but got {launcher_options!r}")
    asked = Command(
        tag=tag,
        sweep=sweep,
        overrides=overrides(ctx.args),
        trials=trials,
        workers=workers,
        storage=storage or default_storage(),
        study=study,
        launcher=launcher,
        options=options,
    )
    result = library.lead(asked)
    if not result.final.empty:
        print(f"\n{result.final_text()}")
    print(f"\nstudy      {asked.name} in {without_password(asked.storage)}")
    print(f"best       {result.best_text()}\nreport     {result.report}\nrun        {result.run_id}")


@command(SWEEPS, "work --study accuracy_cost-digits_mlp")
def work(
    study: Annotated[str, typer.Option(metavar="NAME")],
    storage: Storage = "",
    role: Annotated[Literal["trials", "final", ""], typer.Option(hidden=True)] = "",
) -> None:
    """Add a worker to a study that a sweep leads."""
    from pdiff.sweeps.objective import ROLES
    from pdiff.sweeps.storage import default_storage

    asked_by_leader = bool(role)  # which has found the storage to answer
    ROLES[role or "trials"](study, storage or default_storage(), wait=asked_by_leader)


@command(SWEEPS, "studies --storage sqlite:///optuna.db")
def studies(storage: Storage = "") -> None:
    """List the studies of a storage."""
    from pdiff.sweeps import trials
    from pdiff.sweeps.storage import default_storage

    table = trials.studies(storage or default_storage())
    print("no study") if table.empty else print_frame(table)


@command(RUNS, "overhead --trials 50 --sampler random")
def overhead(
    storage: Storage = "",
    trials: Annotated[int, typer.Option(help="Trials of a study that is deleted afterwards.")] = 100,
    sampler: Annotated[Literal["tpe", "random"], typer.Option()] = "tpe",
) -> None:
    """Measure what a trial of a sweep costs beside its stages."""
    if trials < 1:
        raise UserError(f"--trials {trials}: expected a positive number")
    from pdiff.sweeps.overhead import measure
    from pdiff.sweeps.storage import default_storage, exists, without_password
    from pdiff.tracking import runs, store

    url = storage or default_storage()
    exists(url)  # or it is refused before there is a tracking store
    with store.connected(), runs.around("overhead") as run_id:
        shown = {"storage": without_password(url), "trials": trials, "sampler": sampler}
        runs.record(run_id, parameters={f"overhead.{name}": value for name, value in shown.items()})
        seconds = measure(url, trials=trials, sampler=sampler)
        runs.record(run_id, metrics=seconds)
    for name, value in seconds.items():
        print(f"{name:14} {1000 * value:.1f} ms")
    print(f"run            {run_id}")
