"""The commands on finished runs: compare, leaderboard, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pdiff.cli.app import RESULTS, RUNS, Words, command
from pdiff.cli.tables import print_frame
from pdiff.errors import UserError


@command(RESULTS, "compare")
def compare() -> None:
    """Print all finished runs of main side by side: test accuracy in percent, similarity, seconds."""
    from pdiff.experiment import metrics
    from pdiff.tracking import queries, store

    with store.connected():
        table = queries.compare()
    print("no finished run of main") if table.empty else print_frame(metrics.readable(table))


@command(RUNS, "leaderboard mlp --only ours")
def leaderboard(
    words: Words = None,
    only: Annotated[Literal["ours", "all"], typer.Option(help="`ours` leaves out what was never run here.")] = "all",
) -> None:
    """Show published results beside the latest ones of every tag, or of tags that contain a WORD."""
    from pdiff.experiment import leaderboard
    from pdiff.tracking import queries, store

    with store.connected():
        done, board = queries.log_leaderboard(words or [], only_ours=only == "ours")
    print("no tag to show") if board.empty else print_frame(leaderboard.cells(board))
    print(f"\nrun          {done.run_id}\nleaderboard  {done.folder / 'leaderboard.html'}")


@command(RESULTS, "export --run RUN --out networks --index 0 1 2")
def export(
    run_id: Annotated[str, typer.Option("--run", metavar="RUN", help="A run of prepare, generate or main.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.")],
    form: Annotated[Literal["pth", "safetensors"], typer.Option("--format")] = "pth",
    index: Annotated[
        list[int] | None, typer.Option(metavar="K...", help="Which networks. Default: all.", show_default=False)
    ] = None,
) -> None:
    """Write networks of a run as ordinary state-dict files."""
    from pdiff.tracking import store

    with store.connected():
        folder, tags = store.artifacts_of(run_id)
        if "pdiff.generate_run" in tags:
            folder, tags = store.artifacts_of(tags["pdiff.generate_run"])
    from pdiff.experiment.export import export
    from pdiff.method.collection import Collection

    stage = tags.get("pdiff.stage", "something else")
    name = {"prepare": "checkpoints", "generate": "generated"}.get(stage)
    if not name:
        raise UserError(
            f"--run {run_id}: a run of {stage} holds no networks, expected one of prepare, generate or main"
        )
    path = folder / f"{name}.safetensors"
    if not path.exists():
        again = f"`pdiff {stage} --tag {tags['pdiff.tag']} --fresh` makes them again"
        raise UserError(f"--run {run_id}: its networks are gone: {path} is not there; {again}")
    try:
        collection = Collection.load(path)
    except ValueError as error:
        raise UserError(f"--run {run_id}: {error}") from None
    paths = export(collection, name, out, form=form, index=index)
    print(f"{len(paths)} networks in {out}")
