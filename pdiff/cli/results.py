"""The commands on finished runs: compare, leaderboard, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pdiff.cli.app import RESULTS, RUNS, Words, command
from pdiff.cli.tables import print_frame
from pdiff.errors import UserError

NETWORKS = {"prepare": "checkpoints", "generate": "generated"}
"""Stage -> name of the collection that it writes."""


@command(RESULTS, "compare")
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs of main, evaluate or audit, at least two.", show_default=False),
    ] = None,
) -> None:
    """Print all finished runs of main side by side: test accuracy in percent, similarity, seconds.

    With two RUNs or more, write a page that compares what they have found: accuracy against novelty, votes, costs, and
    what differs in their configurations.
    """
    if runs:
        _compare(runs)
        return
    from pdiff.experiment import metrics
    from pdiff.tracking import queries, store

    with store.existing() as found:
        table = queries.compare() if found else None
    print("no finished run of main") if table is None or table.empty else print_frame(metrics.readable(table))


def _compare(runs: list[str]) -> None:
    """Write the page that compares some runs, and print in what their configurations differ."""
    if len(runs) < 2:
        raise UserError(f"RUN {runs[0]}: a run cannot be compared alone, expected two or more")
    from pdiff.tracking import queries, store

    with store.existing() as found:
        if not found:
            raise UserError(
                f"RUN {runs[0]}: no such run, and no tracking store here (MLFLOW_TRACKING_URI names others)"
            )
        tables, differing = queries.audits(runs)
        done = queries.log_comparison(tables, differing)
    print("the configurations do not differ") if differing.empty else print_frame(differing)
    print(f"\nrun         {done.run_id}\ncomparison  {done.folder / 'comparison.html'}")


@command(RUNS, "leaderboard mlp --only ours")
def leaderboard(
    words: Words = None,
    only: Annotated[Literal["ours", "all"], typer.Option(help="`ours` leaves out what was never run here.")] = "all",
) -> None:
    """Show published results beside the latest ones of every tag, or of tags that contain a WORD."""
    from pdiff.experiment import leaderboard
    from pdiff.tracking import queries, store

    with store.existing() as found:
        ours = queries.evaluations() if found else {}
        board = leaderboard.table(queries.results(ours, words or [], only_ours=only == "ours"))
    print("no tag to show") if board.empty else print_frame(leaderboard.cells(board))
    if board.empty and not found:
        return
    with store.connected():
        done = queries.log_leaderboard(board)
    print(f"\nrun          {done.run_id}\nleaderboard  {done.folder / 'leaderboard.html'}")


@command(RESULTS, "export --run RUN --out networks --index 0 1 2")
def export(
    run_id: Annotated[
        str,
        typer.Option("--run", metavar="RUN", help="A run of prepare, generate or main, or the beginning of its id."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.")],
    form: Annotated[
        Literal["pth", "safetensors", "source"],
        typer.Option("--format", help="`source`: as the files of prepare.source, such as folders of LoRA adapters."),
    ] = "pth",
    index: Annotated[
        list[int] | None, typer.Option(metavar="K...", help="Which networks. Default: all.", show_default=False)
    ] = None,
) -> None:
    """Write networks of a run as ordinary state-dict files."""
    from pdiff.tracking import store

    with store.existing() as found:
        if not found:
            raise UserError(
                f"--run {run_id}: no such run, and no tracking store here (MLFLOW_TRACKING_URI names others)"
            )
        folder, tags = store.artifacts_of(run_id)
        if "pdiff.generate_run" in tags:
            folder, tags = store.artifacts_of(tags["pdiff.generate_run"])
    stage = tags.get("pdiff.stage", "something else")
    if stage not in NETWORKS:
        raise UserError(
            f"--run {run_id}: a run of {stage} holds no networks, expected one of prepare, generate or main"
        )
    from pdiff.experiment.export import export
    from pdiff.method.collection import Collection

    collection = Collection.load(folder / f"{NETWORKS[stage]}.safetensors")
    template = _template(run_id, folder) if form == "source" else None
    paths = export(collection, NETWORKS[stage], out, form=form, index=index, template=template)
    print(f"{len(paths)} networks in {out}")


def _template(run_id: str, folder: Path) -> Any:
    """How the checkpoints are laid out that a run began with.

    Raises:
        UserError: it began with none, or they cannot be read.
    """
    from pdiff.experiment import config, documents, source
    from pdiff.tracking.runs import CONFIG_FILE

    tree = documents.read(folder / CONFIG_FILE)
    settings = config.of_tree(str(tree.get("tag", "")), tree).prepare
    if not settings.source:
        raise UserError(
            f"--run {run_id}: was not made from files (prepare.source); --format pth or safetensors needs none"
        )
    return source.checkpoints(settings)[0].read()
