"""Whether networks have the accuracy that they are asked for: who is asked for what, and what is made of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pdiff.experiment import control
from pdiff.experiment.population import Population
from pdiff.method.collection import Collection


class Obedient:
    """Stands in for a generator: its networks are the accuracy that they are asked for, and their number."""

    def sample(self, count: int, *, first: int, seed: int, condition: dict[str, float]) -> Collection:
        rows = torch.arange(first, first + count, dtype=torch.float64)
        asked = torch.full((count,), condition["val_accuracy"], dtype=torch.float64)
        return Collection({"x": torch.stack([asked, rows, torch.full_like(rows, condition["depth"])], dim=1)})


def population(folder: Path, accuracies: list[float | None], *, heldout: list[int]) -> None:
    columns = {"name": [str(k) for k in range(len(accuracies))], "val_accuracy": accuracies}
    Population("seeds", {}, {}, columns, heldout).save(folder)


def test_networks_are_asked_for_what_fitted_ones_have(tmp_path: Path) -> None:
    accuracies = [(k / 100) ** 2 for k in range(101)]
    population(tmp_path, [*accuracies, None, 7.0], heldout=[102])
    options = {"seed": 3, "condition": {"depth": 2.0, "val_accuracy": 0.4}}
    found = control.sampled(Obedient(), tmp_path, 12, first=50, **options)
    asked, numbers, depth = found.tensors["x"].T.tolist()
    assert numbers == list(range(50, 62)), "each is another network"
    assert set(depth) == {2.0}, "the other conditions are as they were"
    assert sorted(set(asked)) == pytest.approx([0.0025, 0.2275, 0.4525, 0.6775, 0.9025], abs=1e-6)
    assert np.unique(asked, return_counts=True)[1].tolist() == [3, 3, 2, 2, 2]
    table = control.control_table(found.names, torch.tensor(asked))
    assert table.asked.tolist() == pytest.approx(asked, abs=1e-6) == table.obtained.tolist()
    assert len(control.sampled(Obedient(), tmp_path, 2, first=0, **options)) == 2


def test_the_slope_says_whether_they_have_it() -> None:
    asked = np.repeat([0.2, 0.4, 0.6, 0.8], 20)
    rough = np.tile([-0.1, 0.1], 40)
    for slope in (0.0, 0.5, 1.0):
        found = control.slope(pd.DataFrame({"asked": asked, "obtained": 0.3 + slope * asked + rough}))
        assert list(found) == ["control/slope", "control/slope_low", "control/slope_high"]
        assert found["control/slope"] == pytest.approx(slope)
        low, high = found["control/slope_low"] - slope, found["control/slope_high"] - slope
        error = 1.96 * 0.1 / np.sqrt(80 * asked.var())
        assert (low, high) == (pytest.approx(-error, rel=0.2), pytest.approx(error, rel=0.2))
    assert control.slope(pd.DataFrame({"asked": [0.5] * 3, "obtained": [0.1, 0.2, 0.3]})) == {}


def test_the_verdict_names_what_was_asked_for_and_what_came() -> None:
    table = pd.DataFrame({"asked": [0.5, 0.5, 0.9, 0.9], "obtained": [0.4, 0.5, 0.8, 0.9]})
    text = control.sentence(table, {"control/slope": 1.0, "control/slope_low": 0.75, "control/slope_high": 1.25})
    assert text == (
        "Obedient? Networks that are asked for 50.00 % have 45.00 %, 90.00 % have 85.00 % on validation images on "
        "average: a slope of 1.00, 95 % interval 0.75 to 1.25."
    )
    assert control.sentence(table[:2], {}).endswith("50.00 % have 45.00 % on validation images on average.")
