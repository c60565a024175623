"""The stages: each maps directories to a directory, and tells a log what it measures. STAGES is their table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pdiff import baselines, config, datasets, figures
from pdiff.adopt import adopt, first_state
from pdiff.architectures import build
from pdiff.checkpoints import collect, generated_names, pretrain
from pdiff.datasets import Images, Part
from pdiff.diffusion import sample_seed
from pdiff.distributed import rank_zero_first
from pdiff.errors import UserError
from pdiff.evaluation import accuracy, network_accuracy, predictions
from pdiff.files import append_line, read_tensors, whole, write_json, write_state, write_tensors, write_text
from pdiff.generator import Generator, fit_autoencoder, fit_denoiser, heldout_split, latent_scale, make_diffusion
from pdiff.log import Log, Point, measured
from pdiff.settings import Experiment
from pdiff.similarity import maxima_without_self, mean_between, nearest_distance, wrong_iou
from pdiff.training import resolve_device
from pdiff.weights import Collection, Standardizer, StateDict, not_finite

STATE = ".state"  # folder of a stage's own, for resuming; not an artifact
RECONSTRUCTED = 16  # checkpoints whose reconstruction is evaluated
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
    "std": partial(torch.std, correction=0),
    "median": partial(torch.quantile, q=0.5),
}

Metrics = dict[str, float]


class History:
    """A log that also keeps its points in a file, and tells those of an interrupted run again."""

    def __init__(self, out: Path, log: Log) -> None:
        self.log, self.path, self.points = log, out / STATE / "history.jsonl", {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                if line.endswith("]"):  # a killed run may have torn the last one
                    self._keep(Point(*json.loads(line)))
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
    return build(experiment.network.architecture, pretrained=pretrained, **sizes)


def _base_network(experiment: Experiment, images: Images, prepared: Path) -> nn.Module:
    """The base network that `prepare` wrote."""
    network = _network(experiment, images)
    network.load_state_dict(read_tensors(prepared / "network.safetensors"))
    return network


def prepare(experiment: Experiment, out: Path, log: Log) -> Metrics:
    """Pretrain a network and collect checkpoints of its generated parameters, or adopt somebody's.

    Writes `checkpoints.safetensors` and `.json`, `network.safetensors`, `dataset.json`, `history.csv`.
    """
    history, device = History(out, log), resolve_device(experiment.device)
    with rank_zero_first():  # it may download
        images = datasets.load(experiment.dataset)
        network = _network(experiment, images, pretrained=experiment.network.pretrained).to(device)
    validate = partial(network_accuracy, images=images.validation, batch_size=500, device=device)
    if experiment.prepare.source:
        source = Path(experiment.prepare.source).expanduser()
        collection = adopt(source, experiment.prepare.parameters)
        _load_into(network, first_state(source), source, complete=not experiment.network.pretrained)
    else:
        collection = _collected(experiment, network, images, validate, out, history)
    if not (out / "network.safetensors").exists():
        write_tensors(out / "network.safetensors", network.state_dict())
    collection.save(out / "checkpoints.safetensors")
    _describe(experiment, images, out / "dataset.json")
    history.save(out / "history.csv")
    return {"checkpoints": len(collection), "generated_parameters": Standardizer.fit(collection).size}


def _collected(
    experiment: Experiment, network: nn.Module, images: Images, validate: Callable, out: Path, log: Log
) -> Collection:
    """Pretrain (unless an interrupted run has done so), write the base network, collect."""
    settings, state = experiment.prepare, out / STATE
    names = generated_names(network, settings.parameters)
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
    collection = Collection.load(prepare / "checkpoints.safetensors")
    seeds = [sample_seed(experiment.seed, k) for k in range(2, 5)]
    fitted, held = heldout_split(len(collection), experiment.diffusion.heldout_fraction, seed=seeds[0])
    standardizer = Standardizer.fit(collection.select(fitted))
    vectors = standardizer.encode(collection)
    common = {"log": history, "device": device}
    with measured(history, "autoencoder"):
        path = state / "autoencoder.pt"
        autoencoder = fit_autoencoder(vectors[fitted], experiment.autoencoder, seed=seeds[1], path=path, **common)
    _check_reconstruction(experiment, collection, standardizer, autoencoder, prepare, history)
    latents = _encoded(autoencoder, vectors, device)
    mean, std = latent_scale(latents[fitted], standardize=experiment.diffusion.standardize_latents)
    latents, diffusion = (latents - mean) / std, make_diffusion(experiment.diffusion)
    with measured(history, "diffusion"):
        parts = {"latents": latents[fitted], "heldout": latents[held]}
        path = state / "diffusion.pt"
        denoiser = fit_denoiser(diffusion, **parts, settings=experiment.diffusion, seed=seeds[2], path=path, **common)
    Generator(standardizer, autoencoder, mean, std, denoiser, diffusion).save(out / "generator")
    history.save(out / "history.csv")
    return {"latent_size": latents.shape[1]}


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
    """Draw networks. Writes `generated.safetensors` and `.json`."""
    history, settings = History(out, log), experiment.generate
    generator, device = Generator.load(train / "generator"), resolve_device(experiment.device)
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
    history.save(out / "history.csv")
    return {"generated": settings.count}


def _drawn(generator: Generator, experiment: Experiment, rows: range, device: torch.device, path: Path) -> Collection:
    """One batch of networks; read, if an interrupted run has drawn it.

    Raises:
        UserError: a network with NaN or infinity in it, which `Collection.load` would refuse.
    """
    if path.exists():
        return Collection.load(path)
    bar = partial(tqdm, desc=f"generate {rows.stop}/{experiment.generate.count}", unit="step", disable=None)
    seeds = [sample_seed(experiment.generate.seed, k) for k in rows]
    options = {"sampler": experiment.sampler, "steps": experiment.sampling_steps}
    drawn = generator.sample(seeds, device=device, progress=bar, **options)
    if name := not_finite(drawn.tensors):
        raise UserError(f"generate: {name} of a generated network holds NaN or infinity; the generator diverged")
    drawn.save(path)
    return drawn


def evaluate(experiment: Experiment, out: Path, log: Log, *, prepare: Path, train: Path, generate: Path) -> Metrics:
    """Compare groups of networks. Writes `evaluation.csv`, `similarity.safetensors`, `summary.json`, `report.html`."""
    history, images = History(out, log), datasets.load(experiment.dataset)
    network = _base_network(experiment, images, prepare)
    groups = _groups(experiment, prepare, generate)
    with measured(history, "evaluate"):
        wrong = {
            part: {
                name: _wrong(experiment, network, group, getattr(images, part), out / STATE / f"{part}_{name}")
                for name, group in groups.items()
            }
            for part in ("validation", "test")
        }
    with measured(history, "similarity"):
        evaluation, matrix = _compared(groups, wrong)
        metrics = _summary(evaluation, matrix, len(groups["original"]))
    with whole(out / "evaluation.csv") as temporary:
        evaluation.to_csv(temporary, index=False)
    write_tensors(out / "similarity.safetensors", {"matrix": matrix})
    history.save(out / "history.csv")
    write_json(out / "summary.json", {n: v if math.isfinite(v) else None for n, v in metrics.items()})
    _report(experiment, out, evaluation, matrix, metrics, [prepare, train, generate])
    return metrics


def _groups(experiment: Experiment, prepared: Path, generated: Path) -> dict[str, Collection]:
    """Name -> networks to evaluate; the first two are `original` and `generated`."""
    settings = experiment.evaluate
    original = Collection.load(prepared / "checkpoints.safetensors")
    groups = {"original": original, "generated": Collection.load(generated / "generated.safetensors")}
    standardizer, some = Standardizer.fit(original), _spread(original, settings.noise_count)
    for k, scale in enumerate(settings.noise):
        seed = sample_seed(experiment.seed, 5 + k)
        groups[f"noise_{scale:g}"] = baselines.noisy(some, standardizer, scale=scale, seed=seed)
    if "average" in settings.baselines:
        groups["average"] = baselines.average(original)
    return groups


def _wrong(experiment: Experiment, network: nn.Module, group: Collection, part: Part, path: Path) -> Tensor:
    """Which images every network of a group gets wrong, bool (N, images); read, if an interrupted run knew it."""
    path = path.with_name(f"{path.name}.safetensors")
    if path.exists():
        return read_tensors(path)["wrong"]
    device, batch_size = resolve_device(experiment.device), experiment.evaluate.batch_size
    label = path.stem.replace("_", " ", 1)
    wrong = predictions(network, group, part, batch_size=batch_size, device=device, label=label) != part.labels
    write_tensors(path, {"wrong": wrong})
    return wrong


def _compared(groups: dict[str, Collection], wrong: dict[str, dict[str, Tensor]]) -> tuple[pd.DataFrame, Tensor]:
    """One row a network, and the similarity matrix of originals and generated ones (n, n)."""
    standardizer = Standardizer.fit(groups["original"])
    originals, missed = standardizer.encode(groups["original"]), wrong["test"]["original"]
    frames = []
    for name, group in groups.items():
        own = name == "original"
        similarity = wrong_iou(wrong["test"][name], missed)
        columns = {
            "val_accuracy": 1 - wrong["validation"][name].double().mean(dim=1),
            "test_accuracy": 1 - wrong["test"][name].double().mean(dim=1),
            "max_similarity": maxima_without_self(similarity) if own else similarity.amax(dim=1),
            "nearest_distance": nearest_distance(standardizer.encode(group), originals, same=own),
        }
        frames.append(pd.DataFrame({"group": name, "index": range(len(group)), **columns}))
    both = torch.cat([wrong["test"]["original"], wrong["test"]["generated"]])
    return pd.concat(frames, ignore_index=True), wrong_iou(both, both)


def _summary(evaluation: pd.DataFrame, matrix: Tensor, originals: int) -> Metrics:
    """Accuracy statistics of every group, and the four similarities (method, section 5)."""
    metrics = {}
    for name, rows in evaluation.groupby("group", sort=False):
        for part in ("val_accuracy", "test_accuracy"):
            values = torch.tensor(rows[part].to_numpy())
            metrics |= {f"{part}/{name}_{stat}": float(of(values)) for stat, of in STATISTICS.items()}
    between = matrix[originals:, :originals]
    return metrics | {
        "similarity/original_original": mean_between(matrix[:originals, :originals]),
        "similarity/generated_generated": mean_between(matrix[originals:, originals:]),
        "similarity/original_generated": between.mean().item(),
        "similarity/original_generated_max": between.amax(dim=1).mean().item(),
    }


def _report(
    experiment: Experiment, out: Path, evaluation: pd.DataFrame, matrix: Tensor, metrics: Metrics, upstream: list[Path]
) -> None:
    """Write the HTML report."""
    histories = [pd.read_csv(folder / "history.csv") for folder in upstream]
    html = figures.report(
        title=experiment.tag,
        summary={**metrics, "config": config.to_yaml(experiment)},
        evaluation=evaluation,
        similarity=matrix.numpy(),
        groups=evaluation["group"][: len(matrix)].tolist(),
        history=pd.concat(histories, ignore_index=True),
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


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, which stages it reads, which sections of the configuration decide its result."""

    run: Callable[..., Metrics]
    reads: tuple[str, ...]
    sections: tuple[str, ...]


PREPARED = ("dataset", "network", "prepare")
TRAINED = (*PREPARED, "autoencoder", "diffusion")
GENERATED = (*TRAINED, "generate")
STAGES = {
    "prepare": Stage(prepare, (), PREPARED),
    "train": Stage(train, ("prepare",), TRAINED),
    "generate": Stage(generate, ("train",), GENERATED),
    "evaluate": Stage(evaluate, ("prepare", "train", "generate"), (*GENERATED, "evaluate")),
}


def processes(stage: str, experiment: Experiment) -> int:
    """How many processes share a stage: those of the experiment, where it trains or evaluates."""
    alone = stage == "generate" or (stage == "prepare" and experiment.prepare.source)
    return 1 if alone else experiment.processes
