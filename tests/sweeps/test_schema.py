"""Sweep files: what they hold, what is refused, and what a trial samples."""

import itertools
from pathlib import Path

import optuna
import pytest

from pdiff.errors import UserError
from pdiff.experiment import config, documents
from pdiff.sweeps import schema
from pdiff.sweeps.command import Command, check
from pdiff.sweeps.schema import Sweep, Threshold

FOLDER = Path(__file__).parents[2] / "experiments" / "sweeps"
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TINY = """
dataset: {name: digits}
network: {architecture: mlp}
"""
MINIMAL = {
    "objectives": {"val_accuracy/generated_mean": "maximize"},
    "parameters": {"diffusion.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True}},
}


def made(**more) -> Sweep:
    return Sweep.model_validate(MINIMAL | more)


def written(path: Path, tree: dict) -> str:
    path.write_text(documents.as_text(tree))
    return str(path)


def refusal(path: Path, tree: dict, tag: str = "digits_mlp") -> str:
    """The one line that refuses a sweep file."""
    name = written(path, tree)
    with pytest.raises(UserError) as caught:
        check(Command(tag, name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sampled(sweep: Sweep, tag: str, overrides: dict, trials: int = 30) -> list[dict[str, str]]:
    """The configurations of so many random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    given = config.flat(config.load(tag, overrides))
    return [sweep.suggest(study.ask(), given) for _ in range(trials)]


@pytest.mark.parametrize(("name", "tag"), itertools.product(SWEEPS, ["digits_mlp", "digits_mlp_paper"]))
def test_sweeps_of_the_repository_are_valid_for_both_generators(name, tag):
    sweep = schema.load(name)
    if (name, tag) == ("noise_scale", "digits_mlp") or name == "layers":  # PCA takes no noise; an MLP is no ResNet
        with pytest.raises(UserError, match="no parameter applies"):
            check(Command(tag, name))
        tag = "fashion_resnet18_paper"
    base = check(Command(tag, name)).experiment
    for chosen in sampled(sweep, tag, {key: documents.as_text(value) for key, value in sweep.set.items()}):
        assert chosen
        experiment = config.load(tag, {key: documents.as_text(value) for key, value in sweep.set.items()} | chosen)
        assert experiment != base or sweep.sampler.kind == "grid"


@pytest.mark.parametrize(
    ("pruner", "goal"),
    [
        ({"metric": "diffusion/heldout_loss"}, "minimize"),
        ({"metric": "autoencoder/reconstruction_val_accuracy"}, "maximize"),
        ({"metric": "autoencoder/reconstruction_val_accuracy", "direction": "minimize"}, "minimize"),
        ({"metric": "some/score"}, "minimize"),
        ({"metric": "some/score", "direction": "maximize"}, "maximize"),
    ],
)
def test_a_pruner_knows_which_values_are_better(pruner, goal):
    assert made(pruner={"kind": "median", **pruner}).pruner.goal == goal


def test_the_ones_that_were_promised_are_there():
    assert {"latent_noise_timesteps", "accuracy_diversity", "accuracy_cost", "number_of_checkpoints"} <= set(SWEEPS)
    assert {"noise_scale", "timesteps", "layers", "optimizer", "collect_learning_rate"} <= set(SWEEPS)
    assert set(SWEEPS) <= set(schema.sweeps()) and set(SWEEPS).isdisjoint(config.tags())


@pytest.mark.parametrize(
    ("change", "hints"),
    [
        ({"objectives": {"test_accuracy/generated_mean": "maximize"}}, ["test images", "val_accuracy/generated_mean"]),
        ({"objectives": {"similarity/generated_generated": "minimize"}}, ["test images", "val_similarity/generated"]),
        ({"objectives": {"both": {"sum": ["test_accuracy/average_mean"], "direction": "maximize"}}}, ["test images"]),
        (
            {"prune_if": [{"metric": "test_accuracy/generated_mean", "below": 0.5}]},
            ["prune_if.0.metric", "on test"],
        ),
        ({"pruner": {"kind": "median", "metric": "similarity/generated_generated"}}, ["pruner.metric", "test images"]),
        ({"objectives": {"val_accuracy/generated_mean": "up"}}, ["maximize", "'up'"]),
        ({"objectives": {}}, ["objectives"]),
        ({"paramters": {}}, ["paramters: unknown key", "did you mean parameters"]),
        ({"trials": 0}, ["trials", "0"]),
        ({"sampler": {"kind": "tpee"}}, ["sampler.kind", "'tpe'", "'tpee'"]),
        ({"pruner": {"kind": "median"}}, ["pruner", "needs a metric"]),
        ({"prune_if": [{"metric": "diffusion/loss"}]}, ["prune_if.0", "below or above"]),
        ({"prune_if": [{"metric": "first_batch/val_accuracy/generated_mean", "below": 1}]}, ["first_batch"]),
    ],
)
def test_mistakes_in_a_sweep(change, hints, tmp_path):
    message = refusal(tmp_path / "s.yaml", MINIMAL | change)
    assert str(tmp_path / "s.yaml") in message and all(hint in message for hint in hints), message


@pytest.mark.parametrize(
    ("name", "parameter", "hints"),
    [
        ("diffusion.stesp", {"kind": "int", "low": 1, "high": 9}, ["diffusion.stesp: unknown key", "diffusion.steps"]),
        ("diffusion.ema", {"kind": "float", "low": 0.9, "high": 1.5}, ["diffusion.ema", "less than 1", "1.5"]),
        ("diffusion.steps", {"kind": "float", "low": 1, "high": 9.5}, ["diffusion.steps", "9.5"]),
        ("diffusion.steps", {"kind": "int", "low": 9, "high": 1}, ["low < high must hold", "(low=9, high=1)"]),
        ("diffusion.steps", {"kind": "int", "low": 0, "high": 1, "log": True}, ["log needs low > 0"]),
        ("diffusion.steps", {"kind": "int", "low": 1.5, "high": 2}, ["kind int needs integers"]),
        ("diffusion.denoiser", {"kind": "categorical", "choices": ["mlp", "cnn"]}, ["diffusion.denoiser", "'cnn'"]),
        ("diffusion.denoiser", {"kind": "categorical"}, ["needs choices"]),
        ("diffusion.steps", {"kind": "int", "low": 1, "high": 9, "whn": {}}, ["whn: unknown key", "did you mean when"]),
        ("diffusion.steps", {"kind": "int", "low": 1, "high": 9, "when": {"a.b": 1}}, ["when", "a.b"]),
        ("seed", {"kind": "int", "low": 1, "high": 9, "when": {"autoencoder.kind": "conv"}}, ["no parameter applies"]),
    ],
)
def test_mistakes_in_a_parameter(name, parameter, hints, tmp_path):
    message = refusal(tmp_path / "s.yaml", MINIMAL | {"parameters": {name: parameter}})
    assert all(hint in message for hint in hints), message


def test_an_unknown_sweep_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean accuracy_cost"):
        schema.load("acuracy_cost")


def test_several_objectives_cannot_prune(tmp_path):
    two = {"val_accuracy/generated_mean": "maximize", "diffusion/loss": "minimize"}
    pruner = {"kind": "median", "metric": "diffusion/heldout_loss"}
    assert "prune_if can" in refusal(tmp_path / "s.yaml", MINIMAL | {"objectives": two, "pruner": pruner})


def test_conditions_look_at_the_configuration_and_at_other_parameters():
    sweep = made(
        parameters={
            "diffusion.denoiser": {"kind": "categorical", "choices": ["mlp", "conv"]},
            "diffusion.width": {"kind": "int", "low": 8, "high": 64, "when": {"diffusion.denoiser": "mlp"}},
            "autoencoder.latent_noise": {"kind": "float", "low": 0, "high": 1, "when": {"autoencoder.kind": "conv"}},
        }
    )
    fast, paper = sampled(sweep, "digits_mlp", {}), sampled(sweep, "digits_mlp_paper", {})
    assert not any("autoencoder.latent_noise" in chosen for chosen in fast)
    assert all("autoencoder.latent_noise" in chosen for chosen in paper)
    kinds = {(chosen["diffusion.denoiser"], "diffusion.width" in chosen) for chosen in fast}
    assert kinds == {('"mlp"', True), ('"conv"', False)}


def test_options_of_a_kind_are_checked_where_another_parameter_chooses_it(tmp_path):
    """The tag has another denoiser, whose options do not include a width."""
    parameters = {
        "diffusion.denoiser": {"kind": "categorical", "choices": ["conv", "mlp"]},
        "diffusion.width": {"kind": "int", "low": 8, "high": 64, "when": {"diffusion.denoiser": "mlp"}},
    }
    name = written(tmp_path / "s.yaml", MINIMAL | {"parameters": parameters})
    assert check(Command("digits_mlp_paper", name)).experiment.diffusion.denoiser == "conv"
    parameters["diffusion.width"]["low"] = -8
    message = refusal(tmp_path / "s.yaml", MINIMAL | {"parameters": parameters}, "digits_mlp_paper")
    assert "diffusion.width" in message and "-8" in message
    del parameters["diffusion.width"]["when"]
    message = refusal(tmp_path / "s.yaml", MINIMAL | {"parameters": parameters}, "digits_mlp_paper")
    assert "belongs to denoiser mlp" in message


def test_one_parameter_may_set_several_keys_and_stand_for_lists():
    sweep = made(
        parameters={
            "optimizer": {
                "kind": "categorical",
                "keys": ["prepare.pretrain.optimizer", "prepare.collect.optimizer"],
                "choices": ["adam", "sgd"],
            },
            "layers": {
                "kind": "categorical",
                "keys": "prepare.parameters",
                "choices": {"some": ["a", "b.*"], "one": "c"},
            },
        }
    )
    found = set()
    for chosen in sampled(sweep, "digits_mlp", {}):
        prepare = config.load("digits_mlp", chosen).prepare
        assert prepare.pretrain.optimizer == prepare.collect.optimizer
        found.add((prepare.collect.optimizer, prepare.parameters))
    assert found == set(itertools.product(["adam", "sgd"], [("a", "b.*"), ("c",)]))


def test_grids_list_every_value():
    sweep = made(
        parameters={
            "diffusion.steps": {"kind": "int", "low": 100, "high": 300, "step": 100},
            "diffusion.ema": {"kind": "float", "low": 0, "high": 0.9, "step": 0.3},
            "diffusion.denoiser": {"kind": "categorical", "choices": ["mlp", "conv"]},
            "autoencoder.latent_noise": {
                "kind": "categorical",
                "choices": [0, 1],
                "when": {"autoencoder.kind": "conv"},
            },
        }
    )
    grid = sweep.grid(config.flat(config.load("digits_mlp")))
    assert grid["diffusion.steps"] == [100, 200, 300]
    assert grid["diffusion.ema"] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert grid["diffusion.denoiser"] == ['"mlp"', '"conv"'] and len(grid) == 3
    for parameters, hint in (
        ({"diffusion.ema": {"kind": "float", "low": 0, "high": 0.9}}, "choices or a step"),
        (
            {"seed": {"kind": "int", "low": 1, "high": 3, "when": {"diffusion.steps": 1}}} | MINIMAL["parameters"],
            "step",
        ),
    ):
        with pytest.raises(UserError, match=hint):
            made(parameters=parameters).grid(config.flat(config.load("digits_mlp")))


@pytest.mark.parametrize(
    ("limits", "points", "pruned"),
    [
        ({"below": 0.5}, [0.5, 0.7], False),
        ({"below": 0.5}, [0.7, 0.49], True),
        ({"above": 2.0}, [2.0], False),
        ({"above": 2.0}, [2.1], True),
        ({"above": 2.0, "from_step": 1}, [2.1, 1.9], False),
        ({"above": 2.0, "from_step": 1}, [1.9, 2.1], True),
        ({"below": 0.5}, [float("nan")], True),
        ({"above": 0.5}, [float("nan")], True),
    ],
)
def test_thresholds(limits, points, pruned):
    threshold = Threshold(metric="m", **limits)
    assert any(threshold.prunes("m", value, step) for step, value in enumerate(points)) == pruned
    assert not any(threshold.prunes("other", value, step) for step, value in enumerate(points))
