"""The library: what `import pdiff` offers beside collections and generators.

Importing this module imports neither torch nor MLflow nor Optuna; `audit` uses neither MLflow nor Optuna, and leaves
nothing in the current folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pdiff.errors import for_users
from pdiff.experiment import config, documents

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from pdiff.experiment.history import Metrics
    from pdiff.experiment.schema import Experiment
    from pdiff.method.collection import Collection
    from pdiff.method.generators import GaussianOptions, GeneratorOptions, LatentDiffusionOptions
    from pdiff.sweeps.command import Command
    from pdiff.sweeps.leader import Result
    from pdiff.tracking.engine import Done


# -- options of generators


def LatentDiffusion(
    *, autoencoder: Mapping[str, Any] | None = None, diffusion: Mapping[str, Any] | None = None
) -> LatentDiffusionOptions:
    """Options of latent diffusion for `Generator.fit`, under the keys of a configuration.

    Args:
        autoencoder: its `kind` and the options of that kind; `pdiff show digits_mlp` prints them all.
        diffusion: likewise, `denoiser`, `prediction`, their options, and those of the training.

    Raises:
        UserError: an unknown key, or a value that it cannot have.

    Example:
        >>> LatentDiffusion(autoencoder={"latent_size": 8}, diffusion={"steps": 200, "width": 64}).denoiser
        MLPDenoiserOptions(width=64, blocks=3)
        >>> LatentDiffusion(diffusion={"stepz": 200})
        Traceback (most recent call last):
        pdiff.errors.UserError: LatentDiffusion: diffusion.stepz: unknown key; did you mean diffusion.steps or ...
    """
    sections = {"autoencoder": dict(autoencoder or {}), "diffusion": dict(diffusion or {})}
    return _options("LatentDiffusion", {"generator": {"kind": "latent_diffusion"}, **sections})


def Gaussian(**options: Any) -> GaussianOptions:
    """Options of a Gaussian for `Generator.fit`: `scale`, `diagonal`, `variance`.

    Raises:
        UserError: an unknown option, or a value that it cannot have.

    Example:
        >>> Gaussian(scale=0.5)
        GaussianOptions(scale=0.5, diagonal=False, variance=1.0)
    """
    return _options("Gaussian", {"generator": {"kind": "gaussian", **options}})


def _options(name: str, sections: config.Tree) -> GeneratorOptions:
    """The options of a generator in the sections of a configuration."""
    return config.of_tree(name, {"prepare": {"source": name}, **sections}, place=name).generator_options


# -- the audit


@dataclass(frozen=True)
class Audit:
    """What an audit has found. Its files are temporary; `save` keeps them.

    Attributes:
        verdict: better than the originals? than baselines that are as new? new, or copied? With numbers.
        frame: one row for each group of networks: how many there are, and `<metric>_<statistic>`, accuracies and
            similarities as fractions; without columns of which nothing was measured.
        metrics: `<metric>/<group>_<statistic>` -> value, as those of an MLflow run.
        folder: `report.html`, `evaluation.csv` with one row for each network, and the other artifacts of an audit.
    """

    verdict: str
    frame: pd.DataFrame
    metrics: Metrics
    folder: Path
    _temporary: TemporaryDirectory

    @property
    def report(self) -> Path:
        """The page with verdict, tables and figures; it needs no network."""
        return self.folder / "report.html"

    def save(self, folder: Path | str) -> Path:
        """Copy all files to a folder; returns the page there."""
        from pdiff.files import copy_file

        for path in self.folder.rglob("*"):
            if path.is_file():
                copy_file(path, Path(folder) / path.relative_to(self.folder))
        return Path(folder) / self.report.name

    def __str__(self) -> str:
        return self.verdict


def audit(
    collection: Collection,
    networks: Collection | Mapping[str, Collection],
    *,
    evaluate: Callable[[dict[str, Any]], Any] | None = None,
    heldout: Collection | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Audit:
    """Compare generated networks with their originals, held-out ones, and baselines that need no generator.

    Args:
        collection: what the generator was fitted on.
        networks: what it has generated; or name -> networks, of several generators.
        evaluate: takes a state dict, on the CPU; returns predicted classes and labels, (images,) each, the same images
            every time; or which predictions are right, bool (images,); or the accuracy in [0, 1]. When absent, weights
            alone are compared.
        heldout: originals that no generator was fitted on; when absent, a tenth of `collection` is set apart, which
            flatters a generator that was fitted on all of it.
        overrides: dotted key of the configuration -> value, such as {"evaluate.baseline_count": 50, "seed": 1}.

    Raises:
        UserError: networks of different layouts, numbers that are not finite, an option that cannot be used, or a
            function that fails or returns something else.

    Example:
        Copies are found out:

        >>> import pdiff, torch
        >>> collection, heldout = (pdiff.Collection({"weight": torch.randn(n, 2, 4)}) for n in (30, 10))
        >>> x, labels = torch.randn(50, 4), torch.randint(2, (50,))
        >>> def predict(state):
        ...     return (x @ state["weight"].T).argmax(1), labels
        >>> few = {"evaluate.baselines": ["average"], "evaluate.noise": 0.05}
        >>> report = audit(collection, collection.select([3, 5]), evaluate=predict, heldout=heldout, overrides=few)
        >>> print(report.verdict.splitlines()[-1].partition(":")[0])
        New, or copied? The generated networks are copies
        >>> report.frame["group"].tolist()
        ['original', 'heldout', 'generated', 'noise_0.05', 'average']
        >>> report.save("audit").name
        'report.html'
    """
    import pandas as pd

    from pdiff.experiment.audit import audit_in_memory
    from pdiff.experiment.command_options import ALONE
    from pdiff.experiment.history import STATE
    from pdiff.experiment.report import table

    given = networks if isinstance(networks, Mapping) else {ALONE: networks}
    options = {"heldout": heldout and heldout.cpu(), "evaluate": evaluate, "overrides": _texts(overrides)}
    temporary = TemporaryDirectory(prefix="pdiff-audit-")
    folder = Path(temporary.name)
    with for_users("audit"):
        metrics = audit_in_memory(folder, collection.cpu(), {n: found.cpu() for n, found in given.items()}, **options)
    rmtree(folder / STATE, ignore_errors=True)
    frame = table(pd.read_csv(folder / "evaluation.csv")).dropna(axis=1, how="all")
    return Audit((folder / "verdict.md").read_text(encoding="utf-8").strip(), frame, metrics, folder, temporary)


# -- the platform


def run(tag: str, stage: str = "main", overrides: Mapping[str, Any] | None = None, *, fresh: bool = False) -> Done:
    """Run an experiment, or one stage after what it reads, as `pdiff main` does; what is finished is reused.

    Args:
        tag: an experiment (`pdiff tags`), or a path to a YAML file.
        stage: `main` for all of them under one parent run; prepare, train, generate or evaluate.
        overrides: dotted key of the configuration -> value.
        fresh: repeat what is finished.

    Returns:
        The finished MLflow run: `run_id`, `metrics`, and `folder`, its artifacts; those of `main` are those of
        `evaluate`.

    Raises:
        UserError: a mistake in tag, stage or overrides, with all problems of a configuration in one line; or a fault
            of the world, such as a full disk.

    Example:
        >>> import pdiff
        >>> few = {"prepare.pretrain.epochs": 1, "prepare.collect.checkpoints": 20}
        >>> prepared = pdiff.run("digits_mlp", stage="prepare", overrides=few)
        pretrain: run ...
        prepare: run ...
        >>> len(pdiff.Collection.load(prepared.folder / "checkpoints.safetensors"))
        18
    """
    return execute(config.load(tag, _texts(overrides), origin="overrides"), stage, fresh=fresh)


def sweep(
    tag: str,
    name: str,
    *,
    trials: int = 0,
    overrides: Mapping[str, Any] | None = None,
    workers: int = 1,
    storage: str = "",
    study: str = "",
    launcher: str = "processes",
) -> optuna.Study:
    """Search for the best settings of an experiment with Optuna, as `pdiff sweep` does; a study goes on where it was.

    Args:
        tag: an experiment (`pdiff tags`), or a path to a YAML file.
        name: of a file in `experiments/sweeps`, or a path to one.
        trials: of the whole study; 0 for those of the sweep.
        overrides: dotted key of the configuration -> value, for all trials.
        workers: processes.
        storage: sqlite:///FILE, journal:///FILE or a database's address; by default PDIFF_STORAGE, else
            sqlite:///optuna.db.
        study: its name; `<sweep>-<tag>` when absent.
        launcher: where they run: `processes`, or `inline` for one worker that is this process, which starts sooner.

    Raises:
        UserError: a mistake in the arguments, found before the first trial, or trials that failed, every one of them.

    Example:
        >>> import pdiff
        >>> few = {"prepare.pretrain.epochs": 1, "prepare.collect.checkpoints": 20, "generate.count": 4}
        >>> study = pdiff.sweep("digits_mlp", "sweep.yaml", trials=2, overrides=few)
        trial 0: complete, val_accuracy/generated_mean 0...
        trial 1: complete, val_accuracy/generated_mean 0...
        >>> len(study.trials), list(study.best_params)
        (2, ['generator.scale'])
    """
    from pdiff.sweeps.command import Command
    from pdiff.sweeps.storage import default_storage

    asked = Command(
        tag=tag,
        sweep=name,
        overrides=_texts(overrides),
        trials=trials,
        workers=workers,
        storage=storage or default_storage(),
        study=study,
        launcher=launcher,
    )
    return lead(asked).study


def runs(tag: str = "") -> pd.DataFrame:
    """The finished runs of `main`, one row each, the oldest first: what `pdiff compare` prints, as numbers.

    Args:
        tag: of the experiment; all when absent.

    Returns:
        Columns tag, seed, metrics of the comparison (accuracies as fractions), seconds, and `run`, the MLflow id.

    Example:
        >>> import pdiff
        >>> pdiff.runs(tag="digits_mlp").columns[:3].tolist()
        ['tag', 'seed', 'test_accuracy/original_mean']
    """
    import pandas as pd

    from pdiff.tracking import queries, store

    with store.existing() as found:
        return queries.compare(tag) if found else pd.DataFrame(columns=queries.COLUMNS)


def execute(experiment: Experiment, stage: str, *, fresh: bool = False, repair: bool = False) -> Done:
    """Run a stage after what it needs, or all of them (`main`).

    Args:
        experiment: what they do.
        stage: its name, or `main`.
        fresh: repeat what is finished.
        repair: repeat what is finished, but damaged.
    """
    from pdiff.experiment import limits, stages
    from pdiff.tracking import engine

    names = stages.of(experiment) if stage == "main" else stages.needed(stage, experiment)
    limits.check(experiment, names, engine.work_folder())
    from pdiff.tracking import store  # imports MLflow

    with store.connected() as runs:
        if stage == "main":
            return engine.main(experiment, runs, fresh=fresh, repair=repair)
        return engine.Pipeline(experiment, runs, repair=repair).execute(stage, fresh=fresh)


def lead(command: Command) -> Result:
    """Lead a sweep to its end; mistakes are found before MLflow is imported."""
    from pdiff.sweeps.command import check

    check(command)
    from pdiff.sweeps import leader
    from pdiff.tracking import store

    with store.connected():
        return leader.run(command)


def _texts(overrides: Mapping[str, Any] | None) -> dict[str, str]:
    """Values of dotted keys as YAML, which configurations are overridden with."""
    return {key: documents.as_text(value) for key, value in (overrides or {}).items()}
