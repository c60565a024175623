"""Collections and the standardisation of weights, against plain Python."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from pdiff.files import write_tensors
from pdiff.method.collection import Collection
from pdiff.method.standardize import Slot, Standardizer

CONSTANTS = {"scale", "norm.num_batches_tracked", "counts"}


def same(a: Collection, b: Collection) -> bool:
    """Whether two collections are equal to the last bit, order and names included."""
    equal = all(torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in b.tensors)
    return list(a.tensors) == list(b.tensors) and a.names == b.names and equal


def test_stacking_and_indexing_are_inverse() -> None:
    states = [{"z": torch.full((2,), float(k)), "a": torch.tensor(k)} for k in range(3)]
    collection = Collection.stack(states)
    assert len(collection) == 3 and collection.tensors["a"].shape == (3,)
    assert collection.names == ["00000", "00001", "00002"]
    for k, state in enumerate(collection):
        assert list(state) == ["z", "a"]  # the order of the state dict, not of the alphabet
        assert state["a"].item() == k and state["z"].tolist() == [k, k]


@pytest.mark.parametrize("index", [[4, 1], slice(1, 6, 2), torch.tensor([0, 0, 6])])
def test_select_takes_tensors_and_names_alike(mixed: Collection, index: object) -> None:
    rows = (
        index.tolist()
        if isinstance(index, torch.Tensor)
        else list(range(7))[index]
        if isinstance(index, slice)
        else index
    )
    part = mixed.select(index)
    assert part.names == [mixed.names[row] for row in rows]
    for row, state in zip(rows, part, strict=True):
        assert all(torch.equal(state[name], mixed[row][name]) for name in mixed.tensors)


def test_concatenation_against_a_loop(mixed: Collection) -> None:
    parts = [mixed.select([5, 0]), mixed.select([3]), mixed.select(slice(1, 3))]
    whole = Collection.concatenate(parts, [f"network {k}" for k in range(5)])
    assert whole.names == [f"network {k}" for k in range(5)] and list(whole.tensors) == list(mixed.tensors)
    for row, state in zip([5, 0, 3, 1, 2], whole, strict=True):
        assert all(torch.equal(state[name], mixed[row][name]) for name in mixed.tensors)
    assert Collection.concatenate(parts).names == ["00000", "00001", "00002", "00003", "00004"]


def test_map_sees_every_stacked_tensor(mixed: Collection) -> None:
    last = mixed.map(lambda stacked: stacked[-2:])
    assert len(last) == 2 and last.names == ["00000", "00001"]
    for row, state in zip([5, 6], last, strict=True):
        assert list(state) == list(mixed.tensors)
        assert all(torch.equal(state[name], mixed[row][name]) for name in mixed.tensors)


@pytest.mark.parametrize("more", [{}, {"a": torch.zeros(2), "b": torch.zeros(2)}])
def test_other_tensors_cannot_be_joined(more: dict) -> None:
    with pytest.raises(ValueError, match=r"part 1 holds other tensors than part 0: they differ in [ab]$"):
        Collection.stack([{"a": torch.zeros(2)}, more])
    with pytest.raises(ValueError, match="at least one part"):
        Collection.stack([])
    if more:
        parts = [Collection.stack([{"a": torch.zeros(2)}]), Collection.stack([more])]
        with pytest.raises(ValueError, match=r"they differ in b$"):
            Collection.concatenate(parts)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"a": torch.zeros(0, 2)}, {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}, {"a": torch.tensor(1.0)}],
)
def test_tensors_of_no_common_count_are_refused(tensors: dict) -> None:
    with pytest.raises(ValueError, match="count"):
        Collection(tensors)


def test_the_number_of_names_must_fit() -> None:
    with pytest.raises(ValueError, match="3 checkpoints needs as many names, but got 2"):
        Collection({"a": torch.zeros(3, 1)}, ["x", "y"])


def test_collection_round_trip_through_a_file(mixed: Collection, tmp_path: Path) -> None:
    mixed.names = [f"epoch {k}" for k in range(7)]
    mixed.save(tmp_path / "checkpoints.safetensors")
    assert same(Collection.load(tmp_path / "checkpoints.safetensors"), mixed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_file_with_nan_or_infinity_is_refused(mixed: Collection, tmp_path: Path, value: float) -> None:
    mixed.tensors["half"][3, 2] = value
    mixed.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="'half' holds NaN or infinity"):
        Collection.load(tmp_path / "c.safetensors")


def damage(folder: Path, how: str) -> None:
    """Damage a saved collection `c`."""
    path, index = folder / "c.safetensors", folder / "c.json"
    description = json.loads(index.read_text())
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "missing index":
        index.unlink()
    elif how == "missing tensors":
        path.unlink()
    elif how == "other tensors":
        write_tensors(path, {"foreign": torch.zeros(7, 2)})
    else:
        if how == "shape":
            description["layout"]["weight"]["shape"] = [3, 4]
        elif how == "dtype":
            description["layout"]["half"]["dtype"] = "float32"
        elif how == "tensor too many":
            description["layout"]["more"] = {"shape": [1], "dtype": "float32"}
        elif how == "names":
            description["checkpoints"].pop()
        elif how == "no names":
            del description["checkpoints"]
        elif how == "a number of names":
            description["checkpoints"] = 7
        else:
            description = [description]
        index.write_text(json.dumps(description))


HOW = ["truncated", "missing index", "missing tensors", "other tensors", "shape", "dtype", "tensor too many", "names"]


@pytest.mark.parametrize("how", [*HOW, "no names", "a number of names", "a list"])
def test_damaged_files_are_refused(mixed: Collection, tmp_path: Path, how: str) -> None:
    mixed.save(tmp_path / "c.safetensors")
    damage(tmp_path, how)
    with pytest.raises(ValueError):
        Collection.load(tmp_path / "c.safetensors")


def test_scalars_are_those_of_the_method(mixed: Collection) -> None:
    """Section 2 in plain Python: means over checkpoints of each checkpoint's mean and unbiased deviation."""
    slots = Standardizer.fit(mixed).slots
    assert [slot.name for slot in slots] == [name for name in mixed.tensors if name not in CONSTANTS]
    for slot in slots:
        rows = [row.flatten().tolist() for row in mixed.tensors[slot.name].double()]
        m = 0.0
        if slot.name.endswith("running_var"):
            m = 0.95 * fmean(fmean(row) for row in rows)
            rows = [[math.log(v / m + 0.05) for v in row] for row in rows]
        assert slot.variance == pytest.approx(m, rel=1e-5)
        assert slot.mean == pytest.approx(fmean(fmean(row) for row in rows), rel=1e-4, abs=1e-7)
        assert slot.std == pytest.approx(fmean(stdev(row) for row in rows), rel=1e-4)


def test_vectors_are_the_flattened_tensors_in_order(mixed: Collection) -> None:
    standardizer = Standardizer.fit(mixed)
    vectors = standardizer.encode(mixed)
    assert vectors.dtype == torch.float32 and vectors.shape == (7, standardizer.size) == (7, 12 + 5 + 5 + 6 + 3)
    weight, var = standardizer.slots[0], standardizer.slots[2]
    assert vectors[2, 4].item() == pytest.approx((mixed[2]["weight"][1, 1].item() - weight.mean) / weight.std, rel=1e-4)
    y = math.log(mixed[6]["norm.running_var"][3].item() / var.variance + 0.05)
    assert vectors[6, 12 + 5 + 3].item() == pytest.approx((y - var.mean) / var.std, rel=1e-4, abs=1e-5)


def test_decode_inverts_encode(mixed: Collection) -> None:
    standardizer = Standardizer.fit(mixed)
    decoded = standardizer.decode(standardizer.encode(mixed))
    assert list(decoded.tensors) == list(mixed.tensors)
    for name, tensor in mixed.tensors.items():
        expected = tensor[:1].expand_as(tensor) if name in CONSTANTS else tensor
        assert decoded.tensors[name].dtype == tensor.dtype
        assert torch.allclose(decoded.tensors[name], expected, rtol=1e-3 if name == "half" else 1e-5, atol=1e-6), name


def test_any_number_of_vectors_decodes(mixed: Collection) -> None:
    standardizer = Standardizer.fit(mixed)
    sampled = standardizer.decode(torch.zeros(3, standardizer.size))
    assert len(sampled) == 3 and sampled.tensors["norm.num_batches_tracked"].tolist() == [10, 10, 10]
    assert torch.allclose(sampled.tensors["weight"], torch.tensor(standardizer.slots[0].mean))  # vector 0 is the mean


def test_variances_never_fall_below_their_floor() -> None:
    """The inverse is max(exp(y) - 0.05, 0.001) m; here y = log(1 / 0.95 + 0.05) + 0 * std for equal variances."""
    standardizer = Standardizer.fit(Collection({"running_var": torch.full((2, 2), 4.0)}))
    (slot,) = standardizer.slots
    assert slot.variance == pytest.approx(3.8) and slot.std == 1.0
    sampled = standardizer.decode(torch.tensor([[0.0, -50.0], [math.log(2), 0.0]])).tensors["running_var"]
    expected = [[4.0, 0.0038], [(2 * (1 / 0.95 + 0.05) - 0.05) * 3.8, 4.0]]
    assert torch.allclose(sampled, torch.tensor(expected), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_constant_tensors_survive(value: float) -> None:
    collection = Collection({"a": torch.full((4, 3), value), "b.running_var": torch.zeros(4, 3)})
    standardizer = Standardizer.fit(collection)
    vectors = standardizer.encode(collection)
    assert torch.equal(vectors[:, :3], torch.zeros(4, 3)) and vectors.isfinite().all()
    decoded = standardizer.decode(vectors).tensors
    assert torch.equal(decoded["a"], collection.tensors["a"]) and decoded["b.running_var"].abs().max() < 1e-30


@pytest.mark.parametrize("size", [2, 63, 64, 65, 2410])
def test_any_size(size: int) -> None:
    collection = Collection({"a": torch.randn(3, size, generator=torch.Generator().manual_seed(0))})
    standardizer = Standardizer.fit(collection)
    assert standardizer.encode(collection).shape == (3, size)  # padding is the autoencoder's concern
    decoded = standardizer.decode(standardizer.encode(collection))
    assert torch.allclose(decoded.tensors["a"], collection.tensors["a"], atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "norm.running_var", "half"])
def test_what_is_not_finite_cannot_be_standardised(mixed: Collection, name: str, value: float) -> None:
    mixed.tensors[name][3, 2] = value
    with pytest.raises(ValueError, match=f"^tensor '{name}' has mean .*expected finite numbers"):
        Standardizer.fit(mixed)


def test_nothing_to_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to generate"):
        Standardizer.fit(Collection({"steps": torch.arange(3), "x": torch.zeros(3, 1)}))


def test_a_slot_counts_its_numbers() -> None:
    assert Slot("a", (2, 3, 4), "float32", 0.0, 1.0).size == 24
