"""Judging on images: the same verdicts, whatever was interrupted, and as few predictions as possible."""

import pytest
import torch
from test_evaluation import one_by_one, perturbed, pictures

from pdiff import judges
from pdiff.architectures import mlp


@pytest.fixture
def scene(monkeypatch):
    """A judge of 25 images in batches of 4 that saves after each, its network, groups and images."""
    torch.manual_seed(0)
    network, part = mlp(classes=10, channels=1, image_size=4), pictures(25, 1, 4)
    groups = {name: perturbed(network, ["*"], count) for name, count in {"original": 3, "generated": 2}.items()}
    monkeypatch.setattr(judges, "SAVE_SECONDS", -1)
    return network, part, groups


def test_verdicts_are_those_of_each_network_alone(scene, tmp_path):
    network, part, groups = scene
    verdicts = judges.on_images(network, {"validation": part, "test": part}, batch_size=4)(groups, tmp_path)
    assert list(verdicts) == ["validation", "test"]
    for name, group in groups.items():
        wrong = one_by_one(network, group, part) != part.labels
        accuracy, found = verdicts["test"][name]
        assert torch.equal(found, wrong)
        assert torch.allclose(accuracy, 1 - wrong.double().mean(dim=1))


@pytest.mark.parametrize(("batch_size", "goes_on_at"), [(4, 12), (3, 0), (5, 0)])
def test_an_interrupted_judge_goes_on(scene, tmp_path, monkeypatch, batch_size, goes_on_at):
    network, part, groups = scene
    expected = judges.on_images(network, {"test": part}, batch_size=4)(groups, tmp_path / "whole")
    run, starts = judges.batch_predictions, []

    def interrupted(*arguments, start, **options):
        starts.append(start)
        for k, rows in enumerate(run(*arguments, start=start, **options)):
            if k == 3 and len(starts) == 1:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(judges, "batch_predictions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judges.on_images(network, {"test": part}, batch_size=4)(groups, tmp_path)
    for _ in range(2):  # the second time everything is known
        found = judges.on_images(network, {"test": part}, batch_size=batch_size)(groups, tmp_path)
        for name in groups:
            assert torch.equal(found["test"][name].wrong, expected["test"][name].wrong)
    assert starts == [0, goes_on_at, 25]
