"""The command `benchmark`: what the parts of pdiff cost on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pdiff.cli.app import RUNS, command
from pdiff.errors import UserError


@command(RUNS, "benchmark --parts paper_autoencoder,paper_denoiser --quick")
def benchmark(
    parts: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Which, separated by commas; `scaling` is how seconds grow. Default: all.",
            show_default=False,
        ),
    ] = "",
    against: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="Another program that fits and samples on a folder of .pth files, {collection}; timed beside pdiff.",
            show_default=False,
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="Of PyTorch, or auto.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: seconds, to see that it works.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Up to 11 million numbers and 10 000 networks.")] = False,
) -> None:
    """Measure seconds, memory and the share of the machine's peak of every part, and how they grow."""
    from pdiff.experiment.benchmark import SIZES, chosen
    from pdiff.experiment.benchmark.against import parsed

    if quick and full:
        raise UserError("--quick --full: expected one of them")
    sizes = "quick" if quick else "full" if full else "default"
    names, words = chosen(parts), parsed(against) if against else []
    from pdiff.experiment.benchmark.run import run
    from pdiff.tracking import queries, store

    with store.connected():
        found = run(SIZES[sizes], names, device=device, command=words)
        shown = {"sizes": sizes, "parts": ",".join(names), "against": against, "device": device}
        done = queries.log_benchmark(found, shown)
    print(found.markdown())
    print(f"run        {done.run_id}\npage       {done.folder / 'benchmark.html'}")
