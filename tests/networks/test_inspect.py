"""Inspection of folders of checkpoint files: layouts, roles of tensors, and every kind of suspicious file."""

import math

import pytest
import torch
from checkpoints import REPORTED, UNUSABLE, folder_of, network, plain, suspicious

from pdiff.errors import UserError
from pdiff.networks.inspect import inspect_folder, sketches


def test_layout_and_roles(tmp_path):
    found = inspect_folder(plain(tmp_path / "mine"))
    assert found.layout == {name: (tuple(t.shape), t.dtype) for name, t in network(0).items()}
    assert found.roles == {
        "stem.weight": "constant",
        "norm.running_mean": "generated",
        "norm.num_batches_tracked": "integer",
        "head.weight": "generated",
        "head.bias": "generated",
        "temperature": "single",
    }
    assert (found.count(), found.count("constant")) == (5 + 20 + 4, 15)
    assert [path.name for path in found.used] == [f"{k:02d}.pth" for k in range(12)]
    assert not found.unusable and not found.reported


def test_every_kind_of_suspicious_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code in a file would leave a folder
    found = inspect_folder(suspicious(tmp_path / "mine"))
    assert set(found.unusable) == set(UNUSABLE)
    for name, (_, reason) in UNUSABLE.items():
        assert reason in found.unusable[name], name
        assert "\n" not in found.unusable[name]
    assert set(found.reported) == set(REPORTED)
    for name, (_, reason) in REPORTED.items():
        assert found.reported[name].startswith(reason)
    assert not (tmp_path / "ran").exists()


def test_the_majority_decides(tmp_path):
    folder = plain(tmp_path / "mine", 3)
    for k in range(4):
        torch.save({"w": torch.randn(3)}, folder / f"0{k}x.pth")
    found = inspect_folder(folder)
    assert list(found.layout) == ["w"] and len(found.unusable) == 3


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({}, "holds 0 usable checkpoint files, expected at least 2"),
        ({"a.pth": network(0)}, "holds 1 usable checkpoint files, expected at least 2"),
        ({"a.pth": network(0), "b.pth": {}}, "holds 1 usable .*; b.pth holds a dict"),
        ({"a.pth": network(0), "b.pth": {"w": torch.ones(2)}}, "no two files in .* have the same layout"),
        ({"a.pth": network(0), "b.pth": network(0)}, "the 2 files in .* are all the same"),
        ({"a.pth": {"n": torch.tensor(1)}, "b.pth": {"n": torch.tensor(2)}}, "nothing to generate"),
        ({f"{k}.pth": network(0) | {"temperature": torch.ones(1) * k} for k in range(3)}, r"numbers \(temperature\)"),
    ],
)
def test_unusable_folders(tmp_path, states, message):
    with pytest.raises(UserError, match=message):
        inspect_folder(folder_of(states, tmp_path / "mine"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 40, 5000])
def test_outliers(tmp_path, size):
    """What a training leaves behind are no outliers, be it a cloud, a path, a walk or an approach; a stray is."""
    g = torch.Generator().manual_seed(size)
    base, direction = torch.randn(2, size + 1, generator=g)
    noise = torch.randn(60, size + 1, generator=g)
    steps = torch.linspace(0, 1, 60)[:, None]
    paths = {
        "cloud": base + 0.1 * noise,
        "straight": base + steps * direction,
        "walk": base + noise.cumsum(0),
        "some twice as far": base + 0.1 * noise * torch.where(torch.arange(60) % 20 == 3, 2, 1)[:, None],
        "approach": base + 0.01 * noise + torch.exp(-steps) * direction,
    }
    for name, rows in paths.items():
        for far in (False, True):
            rows = rows.clone()
            if far:
                spread = (rows - rows.median(dim=0).values).norm(dim=1).median()
                rows[7] += 12 * spread * noise[0] / noise[0].norm()
            states = {f"{k}.pth": {"w": row.clone()} for k, row in enumerate(rows)}
            folder = folder_of(states, tmp_path / f"{name}{far}")
            assert list(inspect_folder(folder).reported) == (["7.pth"] if far else []), name


def test_an_outlier_in_a_small_tensor_is_not_hidden_by_a_large_one(tmp_path):
    folder = tmp_path / "mine"
    for k in range(20):
        g = torch.Generator().manual_seed(k)
        state = {"large": 100 * torch.randn(3000, generator=g), "small": torch.randn(100, generator=g) * 1e-3}
        folder_of({f"{k}.pth": state}, folder)
    assert list(inspect_folder(folder).reported) == []
    torch.save(state | {"small": state["small"] * 40}, folder / "5.pth")  # 0.4 long, where the others' are 5 500
    assert list(inspect_folder(folder).reported) == ["5.pth"]


def test_sketches_keep_distances():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 70, generator=g)
    sketched = (sketches({"w": a})["w"][0] - sketches({"w": b})["w"][0]).norm()
    assert sketched.item() == pytest.approx((a - b).norm().item(), rel=0.3)
    shifted = (sketches({"w": a + 0.5})["w"][0] - sketches({"w": a})["w"][0]).norm()
    assert shifted.item() == pytest.approx(0.5 * math.sqrt(21000), rel=0.3)
    few = torch.randn(2, 50, generator=g)
    exact = (sketches({"w": few[0]})["w"][0] - sketches({"w": few[1]})["w"][0]).norm()
    assert exact.item() == pytest.approx((few[0] - few[1]).norm().item())
