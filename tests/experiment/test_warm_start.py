"""Warm starts: what is trained on from where, and how many steps are enough."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from pdiff.experiment import config, warm_start
from pdiff.experiment.prepared import load_images, new_network
from pdiff.files import write_tensors
from pdiff.method.collection import Collection
from pdiff.networks.predict import accuracy, predictions

EXPERIMENT = """
dataset: {name: digits, validation_fraction: 0.2}
network: {architecture: mlp}
prepare: {collect: {from: seeds, networks: 4, steps: 60, learning_rate: 2e-2}}
evaluate: {warm_start: [1, 60], baseline_count: 3}
"""

TABLE = pd.DataFrame(
    [("generated", 0, 0.8), ("generated", 5, 0.9), ("generated", 20, 0.95), ("fresh", 0, 0.1), ("fresh", 20, 0.85)],
    columns=["group", "steps", "accuracy"],
)


def test_the_fewest_steps_that_are_enough() -> None:
    assert warm_start.fewest_steps(TABLE, 0.9) == {"warm_start/steps_generated": 5}
    assert warm_start.fewest_steps(TABLE, 0.85) == {"warm_start/steps_generated": 5, "warm_start/steps_fresh": 20}
    assert warm_start.fewest_steps(TABLE, 0.99) == {}
    assert warm_start.sentence(TABLE, 0.9) == (
        "A good start? Steps of training until a mean of 90.00 % on validation images: generated 5, fresh more than 20."
    )


@pytest.mark.slow
def test_networks_are_trained_on_from_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "warm.yaml").write_text(EXPERIMENT)
    experiment = config.load(str(tmp_path / "warm.yaml"))
    images = load_images(experiment)
    torch.manual_seed(7)
    network = new_network(experiment, images)
    write_tensors(tmp_path / "network.safetensors", network.state_dict())
    random = Collection.stack([new_network(experiment, images).state_dict() for _ in range(3)])
    optimizer = torch.optim.Adam(network.parameters(), 2e-2)
    inputs, labels = (torch.cat(part) for part in zip(*images.train.batches(500), strict=True))
    for _ in range(60):  # a network that is good already
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    groups = {"generated": Collection.stack([network.state_dict()]), "average": random}
    table = warm_start.warm_start_table(experiment, tmp_path, groups, tmp_path / "state")
    assert list(zip(table["group"], table["steps"], strict=True)) == [
        (group, steps) for group in ("generated", "average", "fresh") for steps in (0, 1, 60)
    ]
    found = table.pivot(index="group", columns="steps", values="accuracy")
    at_first = {name: predictions(network, group, images.validation, label="") for name, group in groups.items()}
    for name, predicted in at_first.items():
        assert found.loc[name, 0] == pytest.approx(accuracy(predicted, images.validation.labels).mean().item())
    assert found.loc["generated", 0] > 0.85 and found.loc["generated", 1] > 0.85
    assert found.loc["fresh", 0] < 0.3 and found.loc["fresh", 1] < 0.5
    assert found[60].min() > 0.85, "all are trained on"
    again = warm_start.warm_start_table(experiment, tmp_path, groups, tmp_path / "state")
    pd.testing.assert_frame_equal(again, table)
