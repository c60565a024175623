"""The stages: each maps directories to a directory, and tells a log what it measures. STAGES is their table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff import baselines, config, datasets, distributed, figures, judges
from pdiff.adopt import Template, adopt, first_file
from pdiff.architectures import build
from pdiff.checkpoints import collect, generated_names, pretrain
from pdiff.comparison import COLUMNS, evaluation_table, similarity_matrices, summary
from pdiff.datasets import Images
from pdiff.diffusion import sample_seed
from pdiff.distributed import rank_zero_first
from pdiff.errors import UserError
from pdiff.evaluation import accuracy, network_accuracy, predictions
from pdiff.files import (
    append_line,
    copy_file,
    read_tensors,
    whole_lines,
    write_json,
    write_state,
    write_tensors,
    write_text,
)
from pdiff.generator import Generator, fit_autoencoder, fit_denoiser, heldout_split, latent_scale, make_diffusion
from pdiff.judges import Judge, Verdicts
from pdiff.log import Log, Point, measured
from pdiff.settings import Experiment
from pdiff.training import resolve_device
from pdiff.weights import Collection, Standardizer, StateDict, generated_numbers, not_finite

STATE = ".state"  # folder of a stage's own, for resuming; not an artifact
HISTORY = "history.jsonl"  # in it: points of the log
VERDICTS = "verdicts"  # folder of an evaluation with what is known of the originals
RECONSTRUCTED = 16  # checkpoints whose reconstruction is evaluated
Metrics = dict[str, float]


class History:
    """A log that also keeps its points in a file, and tells those of an interrupted run again."""

    def __init__(self, out: Path, log: Log) -> None:
        self.log, self.path, self.points = log, out / STATE / HISTORY, {}
        for point in whole_lines(self.path):
            self._keep(Point(*point))
        write_text(self.path, "".join(json.dumps(point) + "\n" for point in self.points.values()))

    def _keep(self, point: Point) -> None:
        self.points[point.name, point.step] = point
        self.log(point)

    def __call__(self, point: Point) -> None:
        before = self.points.get((point.name, point.step))
        if before and point.name.startswith("seconds/"):  # of an interrupted run
            point = point._replace(value=point.value + before.value)
        append_line(self.path, json.dumps(point))
        self._keep(point)

    def save(self, path: Path) -> None:
        """Write all points as CSV: name, step, value."""
        frame = pd.DataFrame(self.points.values(), columns=["name", "value", "step"])
        write_text(path, frame[["name", "step", "value"]].to_csv(index=False))


def _network(experiment: Experiment, images: Images, *, pretrained: bool = False) -> nn.Module:
    """A freshly initialised network for the data set of an experiment."""
    torch.manual_seed(experiment.seed)
    sizes = {"classes": images.classes, "channels": images.channels, "image_size": images.image_size}
    network = experiment.network
    return build(network.architecture, pretrained=pretrained, weights=network.weights, **sizes)


def _base_network(experiment: Experiment, images: Images, prepared: Path) -> nn.Module:
    """The base network that `prepare` wrote."""
    network = _network(experiment, images)
    network.load_state_dict(read_tensors(prepared / "network.safetensors"))
    return network


def prepare(experiment: Experiment, out: Path, log: Log) -> Metrics:
    """Pretrain a network and collect checkpoints of its generated parameters, or adopt somebody's.

    Writes `checkpoints.safetensors` and `.json`, `history.csv`; where data set and network are known also
    `network.safetensors`, `dataset.json`.
    """
    history = History(out, log)
    with rank_zero_first():  # it may download
        images = datasets.load(experiment.dataset) if experiment.dataset else None
    make = _adopted if experiment.prepare.source else _collected
    collection = make(experiment, images, out, history)
    if images:
        _describe(experiment, images, out / "dataset.json")
    collection.save(out / "checkpoints.safetensors")
    history.save(out / "history.csv")
    return {"checkpoints": len(collection), "generated_parameters": generated_numbers(collection[0])}


def _adopted(experiment: Experiment, images: Images | None, out: Path, log: Log) -> Collection:
    """Read somebody's checkpoints; where their architecture is known, write the base network."""
    source, exclude = Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude
    collection = adopt(source, experiment.prepare.parameters, exclude)
    if images:
        pretrained = experiment.network.pretrained
        network = _network(experiment, images, pretrained=pretrained)
        _load_into(network, first_file(source, exclude).state, source, complete=not pretrained)
        write_tensors(out / "network.safetensors", network.state_dict())
    return collection


def _collected(experiment: Experiment, images: Images, out: Path, log: Log) -> Collection:
    """Pretrain (unless an earlier run has done so), write the base network, collect."""
    settings, state, device = experiment.prepare, out / STATE, resolve_device(experiment.device)
    with rank_zero_first():  # it may download, too
        network = _network(experiment, images, pretrained=experiment.network.pretrained).to(device)
    names = generated_names(network, settings.parameters)
    validate = partial(network_accuracy, images=images.validation, batch_size=500, device=device)
    seeds = [sample_seed(experiment.seed, k) for k in range(2)]
    if (out / "network.safetensors").exists():
        network.load_state_dict(read_tensors(out / "network.safetensors"))
    else:
        with measured(log, "pretrain"):
            path = state / "pretrain.pt"
            pretrain(network, images, settings.pretrain, seed=seeds[0], accuracy=validate, log=log, path=path)
        write_tensors(out / "network.safetensors", network.state_dict())
    with measured(log, "collect"):
        return collect(network, images, settings.collect, names, seed=seeds[1], log=log, path=state / "collect.pt")


def _load_into(network: nn.Module, state: StateDict, source: Path, *, complete: bool) -> None:
    """Put a checkpoint into the base network; where it must be `complete`, it holds all of the network's parameters.

    Raises:
        UserError: tensors that the network has not, or has in another shape or kind; or that the checkpoint lacks.
    """
    own = network.state_dict()
    for name, tensor in state.items():
        fits = name in own and own[name].shape == tensor.shape
        if not fits or own[name].is_floating_point() != tensor.is_floating_point():
            expected = f"{tuple(own[name].shape)} {own[name].dtype}" if name in own else "no such tensor"
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"prepare.source {source}: {name} is {found}, but the network has {expected}")
    missing = [name for name, _ in network.named_parameters() if name not in state]
    if complete and missing:
        raise UserError(
            f"prepare.source {source}: the files lack {len(missing)} parameters of the network, such as {missing[0]}; "
            f"the rest of the network would be random (network.pretrained is false)"
        )
    network.load_state_dict(state, strict=False)


def _describe(experiment: Experiment, images: Images, path: Path) -> None:
    """Write what the data set is, for whoever tracks it."""
    parts = {part: len(getattr(images, part)) for part in ("train", "validation", "test")}
    write_json(path, {"name": experiment.dataset.name, "digest": images.digest(), "classes": images.classes, **parts})


def train(experiment: Experiment, out: Path, log: Log, *, prepare: Path) -> Metrics:
    """Fit the generator on the collection. Writes `generator/`, `history.csv`."""
    history, device, state = History(out, log), resolve_device(experiment.device), out / STATE
    collection = _originals(experiment, prepare)
    seeds = [sample_seed(experiment.seed, k) for k in range(2, 5)]
    fitted, held = heldout_split(len(collection), experiment.diffusion.heldout_fraction, seed=seeds[0])
    standardizer = Standardizer.fit(collection.select(fitted))
    vectors = standardizer.encode(collection)
    common = {"log": history, "device": device}
    with measured(history, "autoencoder"):
        path = state / "autoencoder.pt"
        autoencoder = fit_autoencoder(vectors[fitted], experiment.autoencoder, seed=seeds[1], path=path, **common)
    if experiment.dataset:
        _check_reconstruction(experiment, collection, standardizer, autoencoder, prepare, history)
    latents = _encoded(autoencoder, vectors, device)
    mean, std = latent_scale(latents[fitted], standardize=experiment.diffusion.standardize_latents)
    latents, diffusion = (latents - mean) / std, make_diffusion(experiment.diffusion)
    denoiser = None
    if experiment.diffusion.steps:
        with measured(history, "diffusion"):
            parts = {"latents": latents[fitted], "heldout": latents[held], "settings": experiment.diffusion}
            denoiser = fit_denoiser(diffusion, **parts, seed=seeds[2], path=state / "diffusion.pt", **common)
    Generator(standardizer, autoencoder, mean, std, denoiser, diffusion).save(out / "generator")
    history.save(out / "history.csv")
    return {"latent_size": latents.shape[1]}


def _originals(experiment: Experiment, prepared: Path) -> Collection:
    """The checkpoints that `prepare` wrote, as many of them as the experiment uses.

    Raises:
        UserError: it uses more than there are.
    """
    collection, wanted = Collection.load(prepared / "checkpoints.safetensors"), experiment.autoencoder.checkpoints
    if wanted > len(collection):
        raise UserError(f"autoencoder.checkpoints {wanted}: the collection holds {len(collection)}")
    return collection.select(range(wanted)) if wanted else collection


def _spread(collection: Collection, count: int) -> Collection:
    """At most `count` checkpoints, evenly spread over a collection."""
    return collection.select(torch.linspace(0, len(collection) - 1, min(count, len(collection))).long())


@torch.inference_mode()
def _encoded(autoencoder: nn.Module, vectors: Tensor, device: torch.device) -> Tensor:
    """Latents of vectors, (N, L), on the CPU."""
    return torch.cat([autoencoder.encode(rows.to(device)).cpu() for rows in vectors.split(256)])


@torch.inference_mode()
def _check_reconstruction(
    experiment: Experiment,
    collection: Collection,
    standardizer: Standardizer,
    autoencoder: nn.Module,
    prepared: Path,
    log: Log,
) -> None:
    """Accuracy on validation images of a few checkpoints, before and after the autoencoder; a large drop is told."""
    settings, device = experiment.autoencoder, resolve_device(experiment.device)
    images = datasets.load(experiment.dataset)
    network = _base_network(experiment, images, prepared)
    some = _spread(collection, RECONSTRUCTED)
    decoded = standardizer.decode(autoencoder(standardizer.encode(some).to(device)).cpu())
    before, after = (
        accuracy(
            predictions(network, group, images.validation, device=device, label="reconstruction"),
            images.validation.labels,
        ).mean()
        for group in (some, decoded)
    )
    log(Point("autoencoder/original_val_accuracy", before.item()))
    log(Point("autoencoder/reconstruction_val_accuracy", after.item()))
    if before - after > settings.max_accuracy_drop:
        message = (
            f"autoencoder: reconstructed networks reach {after:.2%} on validation images, {before:.2%} before; "
            f"autoencoder.max_accuracy_drop is {settings.max_accuracy_drop}"
        )
        if settings.on_accuracy_drop == "stop":
            raise UserError(message)
        tqdm.write(f"warning: {message}")


def generate(experiment: Experiment, out: Path, log: Log, *, train: Path) -> Metrics:
    """Draw networks. Writes `generated.safetensors` and `.json`, and where they are wanted `trajectory.safetensors`
    and `.json`: the first draws on their way, each named by its timestep and its number."""
    history, settings = History(out, log), experiment.generate
    generator, device = Generator.load(train / "generator"), resolve_device(experiment.device)
    if generator.denoiser:
        generator.diffusion.scheduler(experiment.sampler)  # imports diffusers now, so that the measure is of the draw
    batches = [
        range(settings.count)[k : k + settings.batch_size] for k in range(0, settings.count, settings.batch_size)
    ]
    drawn = []
    with measured(history, "generate"):
        for rows in batches:
            drawn.append(
                _drawn(generator, experiment, rows, device, out / STATE / f"{rows.start}_{rows.stop}.safetensors")
            )
    tensors = {name: torch.cat([part.tensors[name] for part in drawn]) for name in drawn[0].tensors}
    Collection(tensors).save(out / "generated.safetensors")
    if settings.trajectory_every:
        _trajectory(generator, experiment, device).save(out / "trajectory.safetensors")
    history.save(out / "history.csv")
    return {"generated": settings.count}


def _draw_options(experiment: Experiment, device: torch.device, label: str) -> dict:
    """How the generator of an experiment samples."""
    bar = partial(tqdm, desc=label, unit="step", disable=None)
    return {"sampler": experiment.sampler, "steps": experiment.sampling_steps, "device": device, "progress": bar}


def _trajectory(generator: Generator, experiment: Experiment, device: torch.device) -> Collection:
    """The first draws at intermediate timesteps."""
    settings = experiment.generate
    count = min(settings.trajectory_count, settings.count)
    seeds = [sample_seed(settings.seed, k) for k in range(count)]
    options = _draw_options(experiment, device, "trajectory")
    passed = generator.trajectory(seeds, every=settings.trajectory_every, **options)
    names = [f"{t:g} {k}" for t, _ in passed for k in range(count)]
    collections = [collection for _, collection in passed]
    return Collection({n: torch.cat([c.tensors[n] for c in collections]) for n in collections[0].tensors}, names)


def _drawn(generator: Generator, experiment: Experiment, rows: range, device: torch.device, path: Path) -> Collection:
    """One batch of networks; read, if an interrupted run has drawn it.

    Raises:
        UserError: a network with NaN or infinity in it, which `Collection.load` would refuse.
    """
    if path.exists():
        return Collection.load(path)
    seeds = [sample_seed(experiment.generate.seed, k) for k in rows]
    label = f"generate {rows.stop}/{experiment.generate.count}"
    drawn = generator.sample(seeds, **_draw_options(experiment, device, label))
    if name := not_finite(drawn.tensors):
        raise UserError(f"generate: {name} of a generated network holds NaN or infinity; the generator diverged")
    drawn.save(path)
    return drawn


def evaluate(experiment: Experiment, out: Path, log: Log, *, prepare: Path, train: Path, generate: Path) -> Metrics:
    """Compare groups of networks.

    Writes `evaluation.csv`, `similarity.safetensors`, `summary.json`, `report.html`, the verdicts on the originals, and
    `trajectory.csv` where `generate` looked at draws on their way.
    """
    history = History(out, log)
    originals = _originals(experiment, prepare)
    standardizer = Standardizer.fit(originals)
    groups = {"original": originals, "generated": Collection.load(generate / "generated.safetensors")}
    groups |= _baselines(experiment, originals, standardizer)
    on_the_way = generate / "trajectory.safetensors"
    judged = groups | ({"trajectory": Collection.load(on_the_way)} if on_the_way.exists() else {})
    with measured(history, "evaluate"):
        verdicts = _verdicts(_judge(experiment, prepare), judged, out)
    if distributed.rank():  # these have judged their networks, and the first one has all verdicts
        return {}
    with measured(history, "similarity"):
        evaluation, matrices = evaluation_table(groups, verdicts, standardizer), similarity_matrices(verdicts)
        metrics = summary(evaluation, matrices)
    write_text(out / "evaluation.csv", evaluation.to_csv(index=False))
    if on_the_way.exists():
        write_text(out / "trajectory.csv", _trajectory_table(judged["trajectory"], verdicts).to_csv(index=False))
    if matrices:
        write_tensors(out / "similarity.safetensors", matrices)
    history.save(out / "history.csv")
    write_json(out / "summary.json", {n: v if math.isfinite(v) else None for n, v in metrics.items()})
    _report(experiment, out, evaluation, matrices, metrics, [prepare, train, generate])
    return metrics


def _verdicts(judge: Judge, groups: dict[str, Collection], out: Path) -> dict[str, Verdicts]:
    """Verdicts on all groups; those on the originals are kept for other evaluations, or come from one."""
    state, kept = out / STATE, out / VERDICTS
    with rank_zero_first():
        for path in sorted(kept.glob("original.*")):
            copy_file(path, state / path.name)
    verdicts = judge(groups, state)
    for path in sorted(state.glob("original.*")):
        if not (kept / path.name).exists():
            copy_file(path, kept / path.name)
    return verdicts


def _judge(experiment: Experiment, prepared: Path) -> Judge:
    """Who tells how good the networks of an experiment are."""
    settings = experiment.evaluate
    if settings.function or settings.command:
        template = _template(experiment, prepared)
        if settings.function:
            return judges.by_function(settings.function, template, workers=settings.workers)
        options = {"folder": Path(settings.folder).expanduser().absolute(), "pattern": settings.pattern}
        return judges.by_command(settings.command, template, workers=settings.workers, **options)
    if not experiment.dataset:
        return judges.unknown
    images = datasets.load(experiment.dataset)
    parts = {"validation": images.validation} | ({"test": images.test} if settings.test else {})
    options = {"batch_size": settings.batch_size, "device": resolve_device(experiment.device)}
    return judges.on_images(_base_network(experiment, images, prepared), parts, **options)


def _template(experiment: Experiment, prepared: Path) -> Template:
    """How files of the networks are laid out: as somebody's own, or plainly with all tensors of the base network."""
    if experiment.prepare.source:
        return first_file(Path(experiment.prepare.source).expanduser(), experiment.prepare.exclude)
    return Template.of(read_tensors(prepared / "network.safetensors"))


def _baselines(experiment: Experiment, originals: Collection, standardizer: Standardizer) -> dict[str, Collection]:
    """Name -> networks that need no generator."""
    settings, some = experiment.evaluate, _spread(originals, experiment.evaluate.noise_count)
    groups = {}
    for k, scale in enumerate(settings.noise):
        seed = sample_seed(experiment.seed, 5 + k)
        groups[f"noise_{scale:g}"] = baselines.noisy(some, standardizer, scale=scale, seed=seed)
    if "average" in settings.baselines:
        groups["average"] = baselines.average(originals)
    return groups


def _trajectory_table(trajectory: Collection, verdicts: dict[str, Verdicts]) -> pd.DataFrame:
    """One row for each look at a draw on its way: timestep, draw, accuracies."""
    timesteps, draws = zip(*(name.split() for name in trajectory.names), strict=True)
    columns = {COLUMNS[part]: verdict["trajectory"].accuracy for part, verdict in verdicts.items()}
    return pd.DataFrame({"timestep": map(float, timesteps), "draw": map(int, draws), **columns})


def _report(
    experiment: Experiment,
    out: Path,
    evaluation: pd.DataFrame,
    matrices: dict[str, Tensor],
    metrics: Metrics,
    upstream: list[Path],
) -> None:
    """Write the HTML report."""
    histories = [pd.read_csv(folder / "history.csv") for folder in upstream]
    matrix = next(reversed(matrices.values()), torch.zeros(0, 0))
    trajectory = out / "trajectory.csv"
    html = figures.report(
        title=experiment.tag,
        summary={**metrics, "config": config.to_yaml(experiment)},
        evaluation=evaluation,
        similarity=matrix.numpy(),
        groups=evaluation["group"][: len(matrix)].tolist(),
        history=pd.concat(histories, ignore_index=True),
        trajectory=pd.read_csv(trajectory) if trajectory.exists() else None,
        published=config.published(experiment.tag),
        changes=config.changes(experiment),
    )
    write_text(out / "report.html", html)


def export(collection: Collection, base: Path, out: Path, *, form: str, index: list[int] | None = None) -> list[Path]:
    """Write networks of a collection as ordinary state-dict files.

    Args:
        collection: what to write.
        base: path stem of the file names, e.g. `generated`.
        out: folder to write to.
        form: "pth" or "safetensors".
        index: which networks; all when absent.
    """
    paths = []
    for k in tqdm(range(len(collection)) if index is None else index, desc="export", unit="file", disable=None):
        if not 0 <= k < len(collection):
            raise UserError(f"--index: {k} is not in 0 .. {len(collection) - 1}")
        path = out / f"{base}_{k:05d}.{form}"
        state = {name: tensor.clone() for name, tensor in collection[k].items()}
        if form == "safetensors":
            write_tensors(path, state)
        else:
            write_state(path, state)
        paths.append(path)
    return paths


class Shared(NamedTuple):
    """A file or a folder that a stage takes from a finished run, where that has one of the same digest and has read
    the same runs."""

    name: str
    digest: Callable[[Experiment], str]  # empty: there is nothing to share
    reads: tuple[str, ...] = ()  # stages that it depends on


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, which stages it reads, which sections of the configuration decide its result, and what
    of it depends on less."""

    run: Callable[..., Metrics]
    reads: tuple[str, ...]
    sections: tuple[str, ...]
    shared: Shared | None = None


PREPARED = ("dataset", "network", "prepare")
TRAINED = (*PREPARED, "autoencoder", "diffusion")
GENERATED = (*TRAINED, "generate")
STAGES = {
    "prepare": Stage(prepare, (), PREPARED, Shared("network.safetensors", config.pretraining_digest)),
    "train": Stage(train, ("prepare",), TRAINED),
    "generate": Stage(generate, ("train",), GENERATED),
    "evaluate": Stage(
        evaluate,
        ("prepare", "train", "generate"),
        (*GENERATED, "evaluate"),
        Shared(VERDICTS, config.verdict_digest, ("prepare",)),
    ),
}


def processes(stage: str, experiment: Experiment) -> int:
    """How many processes share a stage: those of the experiment, where it trains or evaluates on images; a function
    and a command of somebody's have `evaluate.workers` of their own."""
    own = experiment.evaluate.function or experiment.evaluate.command or not experiment.dataset
    alone = {"prepare": experiment.prepare.source, "generate": True, "evaluate": own}
    return 1 if alone.get(stage) else experiment.processes
