"""The stage `audit`: networks of other people's generators, compared as those of a generator that is fitted here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pdiff.errors import UserError
from pdiff.experiment import command_options, limits, source, summary
from pdiff.experiment.evaluate import aligned, baselines, matched_to_originals, results_of, write_audit
from pdiff.experiment.history import STATE, History, Metrics
from pdiff.experiment.prepared import heldout_networks, original_networks, reference
from pdiff.experiment.schema import Experiment
from pdiff.method.alignment.reference import Reference
from pdiff.method.collection import Collection, generated_numbers, heldout_split, not_finite
from pdiff.method.log import Log, ignore, measured
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluations
from pdiff.networks.evaluators.function import FunctionEvaluator
from pdiff.networks.imported.plain import check_state, check_varying, read_like
from pdiff.parallel import ranks
from pdiff.seeds import stream

IN_MEMORY = "in memory"  # takes the place of a folder in the configuration of an audit that reads no files


def audit(experiment: Experiment, out: Path, log: Log, *, prepare: Path, originals: Path | None = None) -> Metrics:
    """Compare networks from files with the originals, and with baselines that are made of those.

    Writes what the stage `evaluate` writes.

    Args:
        experiment: what to compare; the files are those of its section `audit`.
        out: folder to write to.
        log: receives seconds and memory.
        prepare: folder of the original networks.
        originals: folder with their evaluation, where there is one.

    Raises:
        UserError: a file that cannot be used, or is of another layout than the originals; with file and tensor.
    """
    history, settings = History(out, log), experiment.audit
    fitted, apart = original_networks(experiment, prepare), heldout_networks(prepare)
    limits.check(experiment, ["audit"], out, size=generated_numbers(fitted[0]))
    places = {"heldout": settings.heldout} if settings.heldout else {}
    keys = {name: f"audit.generated.{name}" for name in settings.generated} | {"heldout": "audit.heldout"}
    places |= settings.generated
    found = {name: read(experiment, place, fitted, keys[name]) for name, place in places.items()}
    groups = {"original": fitted} | ({"heldout": apart} if apart else {})
    groups |= aligned(to := reference(experiment, prepare), found, history)

    def evaluate(groups: Mapping[str, Collection]) -> Evaluations:
        return results_of(experiment, groups, out / STATE, prepare, originals)

    upstream = {"prepare": prepare} | ({"originals": originals} if originals else {})
    return _compared(experiment, out, history, groups, evaluate, upstream, apart=len(apart or ()), to=to)


def audit_in_memory(
    out: Path,
    originals: Collection,
    generated: Mapping[str, Collection],
    *,
    heldout: Collection | None = None,
    evaluate: Callable | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Metrics:
    """The audit of collections, without files and stages before it.

    Args:
        out: an empty folder to write to.
        originals: what the generators were fitted on.
        generated: name of a generator -> its networks.
        heldout: originals that no generator was fitted on; when absent, a part of the originals is set apart.
        evaluate: measures one network, see `run_function`; when absent, weights alone are compared.
        overrides: dotted key of the configuration -> value as text, in YAML.

    Raises:
        UserError: networks of different layouts, numbers that are not finite, or an option that cannot be used.
    """
    given = {
        "dataset": {},
        "network": {},
        "prepare": {"source": IN_MEMORY, **({"heldout": 0} if heldout else {})},
        "evaluate": {"function": getattr(evaluate, "__qualname__", type(evaluate).__name__) if evaluate else ""},
        "audit": {"generated": dict.fromkeys(generated, IN_MEMORY), "heldout": IN_MEMORY if heldout else ""},
    }
    tree = command_options.tree(given, overrides or {})
    experiment = command_options.experiment("audit", tree, place="audit")
    for name, networks in {"originals": originals, "heldout": heldout, **generated}.items():
        if networks:
            check_state(networks[0], name, like=originals[0], named="the originals")
            if tensor := not_finite(networks.tensors):
                raise UserError(f"{name}: {tensor} holds NaN or infinity, expected finite numbers")
    check_varying(originals.varying(), originals[0], f"the {len(originals)} originals")
    limits.check(experiment, ["audit"], out, size=generated_numbers(originals[0]))
    split = heldout_split(len(originals), experiment.prepare.heldout, seed=stream(experiment.seed, "split"))
    fitted, apart = (originals.select(index) if len(index) else None for index in split)
    held = heldout or apart
    groups = {"original": fitted} | ({"heldout": held} if held else {}) | dict(generated)

    def results(groups: Mapping[str, Collection]) -> Evaluations:
        return FunctionEvaluator(evaluate)(groups, out / STATE) if evaluate else {}

    history = History(out, ignore)
    return _compared(experiment, out, history, groups, results, {}, apart=len(apart or ()))


def _compared(
    experiment: Experiment,
    out: Path,
    history: History,
    groups: dict[str, Collection],
    evaluate: Callable[[Mapping[str, Collection]], Evaluations],
    upstream: Mapping[str, Path],
    *,
    apart: int,
    to: Reference | None = None,
) -> Metrics:
    """Add baselines to originals, held-out and generated networks; evaluate and compare all.

    Args:
        experiment: what to compare.
        out: folder to write to.
        history: receives seconds and memory.
        groups: name -> networks.
        evaluate: measures them.
        upstream: stage -> its folder, of those before this one; `prepare` among them where the network is known.
        apart: originals that were set apart to be held out.
        to: what the networks are aligned to, if they are.
    """
    originals = groups["original"]
    standardizer = Standardizer.fit(originals)
    with measured(history, "baselines"):  # one of them is matched to the first generator
        first = groups[experiment.generators[0]]
        arms = baselines(experiment, upstream.get("prepare"), originals, standardizer, first)
        groups = {**groups, **aligned(to, arms)}
    matched = matched_to_originals(to, groups, standardizer, history)
    with measured(history, "evaluate"):
        results = evaluate(groups)
    if ranks.rank():  # rank 0 has the results of all
        return {}
    largest = max(len(groups[name]) for name in experiment.generators)
    notes = [cost_of_a_split(len(originals), apart, largest)] if apart else []
    found = summary.evaluated(groups, results, standardizer, matched)
    return write_audit(experiment, out, history, found, experiment.generators, upstream, notes)


def read(experiment: Experiment, place: str, originals: Collection, key: str) -> Collection:
    """The networks in a folder or file, which must have the layout of the originals.

    Raises:
        UserError: nothing to read, an unusable file, or another layout; with file and tensor.
    """
    settings = experiment.prepare
    first = source.checkpoints(settings)[0].place
    options = {"named": str(first), "key": key, "patterns": settings.parameters}
    return read_like(Path(place).expanduser(), originals[0], **options)


def cost_of_a_split(fitted: int, apart: int, generated: int) -> str:
    """What it costs that held-out networks were taken from the originals, for the reader of the verdict.

    Args:
        fitted: originals that are left.
        apart: originals that were set apart.
        generated: networks of the largest generator.
    """
    text = (
        f"Held out: none were given, so {apart} of the {fitted + apart} originals were set apart. A generator that was "
        f"fitted on all of them is flattered: its copies of those {apart} count as new, and the null arms are made of "
        f"{apart} originals fewer than it has seen."
    )
    if generated > 1:
        pairs = generated * apart
        least = -pairs / 2 / (pairs * (generated + apart + 1) / 12) ** 0.5  # all distances below those of held-out ones
        text += f" With {apart} held-out networks Z_U cannot fall below {least:.1f}, whatever was copied."
    return f"{text} Originals that no generator has seen, given as audit.heldout, avoid this."
