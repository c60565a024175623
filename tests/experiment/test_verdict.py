"""The verdict on groups whose answer is known: copies, held-out networks, averages, worse and better ones."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch

from pdiff.experiment import config, metrics, summary, verdict
from pdiff.method.collection import Collection
from pdiff.method.generators import GENERATORS
from pdiff.method.standardize import Standardizer
from pdiff.networks.evaluators import Evaluation

NUMBERS, IMAGES, CLASSES = 300, 400, 10


class Population:
    """Networks of independent random weights, whose mistakes are independent, too."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(CLASSES, (IMAGES,), generator=self.generator)
        self.weights: dict[str, torch.Tensor] = {}
        self.predicted: dict[str, torch.Tensor] = {}

    def weights_of(self, count: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(count, NUMBERS, generator=self.generator)

    def predictions_of(self, count: int, accuracy: float) -> torch.Tensor:
        wrong = torch.rand(count, IMAGES, generator=self.generator) > accuracy
        other = torch.randint(1, CLASSES, (count, IMAGES), generator=self.generator)
        return torch.where(wrong, (self.labels + other) % CLASSES, self.labels)

    def add(self, name: str, weights: torch.Tensor, predicted: torch.Tensor) -> None:
        self.weights[name], self.predicted[name] = weights, predicted

    def audited(self) -> tuple[dict, pd.DataFrame, dict[str, float], pd.DataFrame, list[str]]:
        groups = {name: Collection({"weight": weights}) for name, weights in self.weights.items()}
        results = {}
        for name, predicted in self.predicted.items():
            wrong = predicted != self.labels
            results[name] = Evaluation(1 - wrong.double().mean(1), wrong, predicted.to(torch.uint8))
        found = summary.evaluated(groups, {"test": results}, Standardizer.fit(groups["original"]))
        evaluation = summary.evaluation_table(found)
        numbers = summary.summary(found, evaluation, summary.similarity_matrices(found))
        comparisons = verdict.comparisons_table(found, evaluation, summary.GENERATED)
        return found, evaluation, numbers, comparisons, verdict.verdict(found, evaluation, comparisons, numbers)


@pytest.fixture
def population() -> Population:
    found = Population()
    found.add("original", found.weights_of(60), found.predictions_of(60, 0.9))
    found.add("heldout", found.weights_of(30), found.predictions_of(30, 0.9))
    return found


def of(comparisons: pd.DataFrame, against: str) -> dict:
    (row,) = comparisons[comparisons["against"] == against].to_dict("records")
    return row


def test_copies_are_called_copies(population):
    rows = torch.randint(60, (50,), generator=population.generator)
    copies = population.weights["original"][rows] + population.weights_of(50, 0.01)
    population.add("generated", copies, population.predicted["original"][rows])
    _, evaluation, numbers, comparisons, sentences = population.audited()
    assert numbers["z_u/generated"] < -5
    assert numbers["z_u_predictions/generated"] < -5
    assert [numbers[f"novel_performant/generated_{tau:g}"] for tau in metrics.TAUS] == [0, 0, 0]
    assert numbers["nearest_ratio/generated"] < 0.02
    assert evaluation[evaluation.group == "generated"]["novelty"].max() < 0.02
    assert "are copies" in sentences[2]
    assert of(comparisons, "original")["verdict"] == "no difference"  # as an accuracy table alone would have praised
    assert metrics.alarms(numbers).keys() == {"memorising"}


def test_heldout_networks_are_new_and_no_different(population):
    population.add("generated", population.weights_of(40), population.predictions_of(40, 0.9))
    _, _, numbers, comparisons, sentences = population.audited()
    assert abs(numbers["z_u/generated"]) < 2
    assert abs(numbers["z_u_predictions/generated"]) < 2
    assert 0.95 < numbers["novelty/generated_median"] < 1.05
    assert 0.95 < numbers["disagreement/generated_median"] < 1.05
    assert set(comparisons["verdict"]) == {"no difference"}
    assert "No difference" in sentences[0]
    assert "as new as held-out networks" in sentences[2]
    assert not metrics.alarms(numbers)


@pytest.mark.parametrize(("accuracy", "word"), [(0.95, "Better"), (0.8, "Worse")])
def test_a_difference_of_accuracy_is_found(population, accuracy, word):
    population.add("generated", population.weights_of(40), population.predictions_of(40, accuracy))
    _, _, numbers, comparisons, sentences = population.audited()
    row = of(comparisons, "original")
    assert row["low"] < accuracy - 0.9 < row["high"]
    assert row["verdict"] == word.lower()
    assert f"{word}: on test images" in sentences[0]
    expected = 1.0 if accuracy > 0.9 else 0.0  # of which most, or none, reach the tenth percentile of the held-out ones
    assert abs(numbers["novel_performant/generated_0.5"] - expected) < 0.2


def test_only_null_arms_that_are_as_new_are_compared(population):
    original = population.weights["original"]
    population.add("generated", population.weights_of(40, 0.8), population.predictions_of(40, 0.9))
    population.add(
        "average_16",
        torch.stack([original[k : k + 16].mean(0) for k in range(20)]),
        population.predictions_of(20, 0.95),
    )
    population.add("gaussian", population.weights_of(20), population.predictions_of(20, 0.85))
    found, evaluation, numbers, comparisons, sentences = population.audited()
    arms = comparisons[comparisons["question"] == "null arms"]
    assert list(arms["against"]) == ["gaussian"]
    assert arms["verdict"].item() == "better"
    assert "best of the 1 null arms" in sentences[1]
    front = verdict.front_table(found, evaluation, summary.GENERATED).set_index("group")
    assert list(front.index[front["on_front"]]) == ["average_16", "gaussian"]
    assert (front["accuracy_low"] < front["accuracy"]).all()
    assert numbers["outside_span/average_16_mean"] < 1e-6
    assert numbers["outside_span/generated_mean"] > 0.5


def test_without_heldout_networks_the_verdict_says_so(population):
    del population.weights["heldout"], population.predicted["heldout"]
    population.add("generated", population.weights_of(40), population.predictions_of(40, 0.9))
    _, evaluation, numbers, _, sentences = population.audited()
    assert "novelty" not in evaluation
    assert not any(name.startswith(("novelty/", "z_u/", "novel_performant/")) for name in numbers)
    assert "no held-out networks" in sentences[2]


@pytest.mark.slow
def test_holm_corrects_the_family(population):
    population.add("generated", population.weights_of(40), population.predictions_of(40, 0.9))
    for k in range(20):
        population.add(f"arm_{k}", population.weights_of(10), population.predictions_of(10, 0.9))
    *_, comparisons, _ = population.audited()
    assert (comparisons["question"] == "null arms").sum() >= 15
    assert set(comparisons["verdict"]) == {"no difference"}


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_remedy_is_a_key_that_the_generator_has(kind):
    experiment = config.load("digits_seeds", {"generator.kind": kind})
    sections = ("prepare", *experiment.generator_options.sections)
    found = metrics.alarms({"z_u/generated": -9.0, "dispersion/generated": 0.1}, sections=sections)
    named = re.findall(r"([a-z]+)\.([a-z_]+)", " ".join(found.values()))
    assert all(key in type(getattr(experiment, section)).model_fields for section, key in named)
    assert bool(named) == ("diffusion" in sections)
    assert "more checkpoints may help" in found["memorising"]
