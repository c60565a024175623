"""Zoos of other people: found out, read, selected, and refused in one line where they are damaged."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from zoos import LAYOUT, LORA, MODULES, STEPS, adapter, bert, hugging_face, lora, ray_tune, small_cnn, small_cnn_zoo

from pdiff.errors import UserError
from pdiff.networks.imported import FORMATS, select
from pdiff.networks.imported.plain import read_collection
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.imported.zoo import checkpoints_in, columns, format_of

WRITERS = {"ray_tune": ray_tune, "small_cnn_zoo": small_cnn_zoo, "hugging_face": hugging_face, "lora": lora}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_are_found_out_and_read(tmp_path, name):
    WRITERS[name](tmp_path / "zoo")
    assert format_of(tmp_path / "zoo") == name
    checkpoints = checkpoints_in(tmp_path / "zoo")
    assert read_collection(tmp_path / "zoo").names == [checkpoint.name for checkpoint in checkpoints]
    known = columns(checkpoints)
    assert len(set(known["network"])) == (3 if name == "hugging_face" else 2)
    json.dumps(known, allow_nan=False)


def test_every_format_has_a_zoo_here():
    assert set(FORMATS) == {*WRITERS, "plain"}


def test_plain_files_are_plain(tmp_path):
    for k in range(2):
        torch.save(small_cnn(k), tmp_path / f"{k}.pth")
    (tmp_path / "logs").mkdir()
    assert format_of(tmp_path) == "plain" == format_of(tmp_path / "absent")
    assert columns(checkpoints_in(tmp_path)) == {}


@pytest.mark.slow
def test_zoos_are_listed_without_torch(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name)
    program = (
        "import sys\nfrom pathlib import Path\nfrom pdiff.networks.imported.zoo import checkpoints_in\n"
        "print([len(checkpoints_in(Path(place))) for place in sys.argv[1:]], 'torch' in sys.modules)"
    )
    places = [str(tmp_path / name) for name in WRITERS]
    done = subprocess.run([sys.executable, "-c", program, *places], capture_output=True, text=True, check=True)
    assert done.stdout == "[6, 6, 3, 2] False\n"


# -- what is read


@pytest.mark.parametrize("config", ["params.json", "config.json"])
def test_checkpoints_of_ray_tune(tmp_path, config):
    ray_tune(tmp_path, config=config)
    collection, known = read_collection(tmp_path), columns(checkpoints_in(tmp_path))
    for row, seed in enumerate([0, 25, 50, 100, 125, 150]):
        assert all(torch.equal(collection[row][name], tensor) for name, tensor in small_cnn(seed).items())
    assert known["epoch"] == [0, 25, 50] * 2 and known["seed"] == [0, 0, 0, 1, 1, 1]
    assert known["model::nlin"] == ["relu"] * 3 + ["tanh"] * 3
    # lines are counted by training_iteration: the second trial has none for epoch 0
    assert known["train_acc"] == pytest.approx([0.2, 0.45, 0.7, None, 0.55, 0.8])
    assert "pid" not in known and "config" not in known and "training::data" not in known


def test_rows_of_the_small_cnn_zoo(tmp_path):
    matrix = small_cnn_zoo(tmp_path / "zoo")
    collection, known = read_collection(tmp_path / "zoo"), columns(checkpoints_in(tmp_path / "zoo"))
    starts = np.cumsum([0, *(int(np.prod(shape)) for shape in LAYOUT.values())])
    kernel, dense = ("sequential/conv2d/kernel:0", "sequential/dense/kernel:0")
    assert collection.tensors[kernel].shape == (6, 2, 1, 3, 3) and collection.tensors[dense].shape == (6, 3, 2)
    for row in range(6):
        stored = matrix[row, starts[1] : starts[2]].reshape(3, 3, 1, 2)
        for out in range(2):
            for height in range(3):
                expected = stored[height, :, 0, out]
                assert np.array_equal(collection.tensors[kernel][row, out, 0, height].numpy(), expected)
        assert np.array_equal(collection.tensors[dense][row].numpy(), matrix[row, starts[3] :].reshape(2, 3).T)
        assert np.array_equal(collection.tensors["sequential/conv2d/bias:0"][row].numpy(), matrix[row, :2])
    assert known["network"] == ["/x/0"] * 3 + ["/x/1"] * 3 and known["step"] == list(STEPS) * 2
    assert known["config.learning_rate"] == [0.003] * 6 and known["config.activation"][3] == "tanh"


def test_models_of_hugging_face_however_they_are_stored(tmp_path):
    hugging_face(tmp_path)
    collection = read_collection(tmp_path)
    assert collection.names == [f"multiberts-seed_{k}" for k in range(3)]
    for k in range(3):
        assert all(torch.equal(collection[k][name], tensor) for name, tensor in bert(k).items())
    assert columns(checkpoints_in(tmp_path))["config.model_type"] == ["bert"] * 3


def in_the_cache_of_the_hub(folder: Path) -> None:
    """Two repositories of two revisions, whose files are links."""
    made = hugging_face(folder / "made", ["safetensors"] * 4)
    for k in range(4):
        repository = folder / f"models--org--run_{k // 2}"
        place = repository / "snapshots" / f"{k:040x}"
        place.mkdir(parents=True)
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / f"step{1000 * (k % 2)}").write_text(f"{k:040x}")
        for file in (made / f"multiberts-seed_{k}").iterdir():
            blob = repository / "blobs" / f"{k}{file.name}"
            shutil.move(file, blob)
            (place / file.name).symlink_to(f"../../blobs/{blob.name}")
    shutil.rmtree(made)


def test_snapshots_in_the_cache_of_the_hub(tmp_path):
    in_the_cache_of_the_hub(tmp_path)
    collection, known = read_collection(tmp_path), columns(checkpoints_in(tmp_path))
    assert known["network"] == ["models--org--run_0"] * 2 + ["models--org--run_1"] * 2
    assert known["step"] == [0, 1000] * 2 and known["revision"][1] == "step1000"
    assert torch.equal(collection[3]["encoder.0.query"], bert(3)["encoder.0.query"])
    one = columns(checkpoints_in(tmp_path / "models--org--run_1"))
    assert one["network"] == ["models--org--run_1"] * 2


def test_steps_of_the_trainer_are_of_one_network(tmp_path):
    hugging_face(tmp_path / "made", ["safetensors"] * 4)
    for k in range(4):
        place = tmp_path / "zoo" / f"run{k // 2}" / f"checkpoint-{500 * (1 + k % 2)}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "made" / f"multiberts-seed_{k}", place)
    known = columns(checkpoints_in(tmp_path / "zoo"))
    assert known["network"] == ["run0", "run0", "run1", "run1"] and known["step"] == [500, 1000] * 2


def products(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"] for module in MODULES]


def test_adapters_that_are_the_same_are_read_as_the_same(tmp_path):
    first, turned = adapter(0), adapter(0)
    r = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])
    for module in MODULES:
        turned[f"{module}.lora_A.weight"] = r.inverse() @ turned[f"{module}.lora_A.weight"]
        turned[f"{module}.lora_B.weight"] = turned[f"{module}.lora_B.weight"] @ r
    collection = read_collection(lora(tmp_path, [first, turned, adapter(1)]))
    for tensor in collection.tensors.values():
        torch.testing.assert_close(tensor[0], tensor[1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(tensor[0], tensor[2], atol=1e-2)
    for found, expected in zip(products(collection[1]), products(first), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_written_as_peft_reads_it(tmp_path):
    checkpoint = checkpoints_in(lora(tmp_path / "zoo"))[0]
    template = checkpoint.read()
    new = {name: tensor + 1 for name, tensor in template.state.items()}
    template.write(tmp_path / "new", new)
    assert sorted(os.listdir(tmp_path / "new")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text()) == LORA
    written = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert written.keys() == adapter(0).keys()
    assert all(torch.equal(written[name], new[name]) for name in new)
    assert all(written[name].shape == tensor.shape for name, tensor in adapter(0).items())


# -- which are used


def chosen(folder: Path, **options) -> list[tuple[int, int]]:
    """Seed and epoch of the checkpoints that are selected."""
    known = columns(checkpoints_in(folder, select=SourceSelect(**options)))
    return list(zip(known["seed"], known["epoch"], strict=True))


def test_selection(tmp_path, capsys):
    ray_tune(tmp_path)
    assert chosen(tmp_path, epochs="last") == [(0, 50), (1, 50)]
    assert chosen(tmp_path, epochs=[0, 25]) == [(0, 0), (0, 25), (1, 0), (1, 25)]
    assert chosen(tmp_path, epochs=25) == [(0, 25), (1, 25)]
    assert chosen(tmp_path, metadata={"model::nlin": "tanh"}) == [(1, 0), (1, 25), (1, 50)]
    assert chosen(tmp_path, accuracy=(0.5, 0.75)) == [(0, 50), (1, 25)]
    assert "warning" not in capsys.readouterr().out


def test_dots_in_names_of_columns_are_no_sections(tmp_path):
    small_cnn_zoo(tmp_path / "zoo")
    for metadata in ({"config.activation": "tanh"}, {"config": {"activation": "tanh"}}):
        found = checkpoints_in(tmp_path / "zoo", select=SourceSelect(metadata=metadata))
        assert [checkpoint.name for checkpoint in found] == ["row_000003", "row_000004", "row_000005"]


def test_test_accuracy_is_used_where_there_is_no_other_and_said(tmp_path, capsys):
    select._warn.cache_clear()
    ray_tune(tmp_path)
    for path in tmp_path.glob("*/result.json"):
        path.write_text(path.read_text().replace("train_acc", "top5"))
    found = checkpoints_in(tmp_path, select=SourceSelect(accuracy=(0, 0.2)))
    assert len(found) == 5  # one has no line
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1 and "selected by test_acc" in printed and "flattered" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metadata": {"model::nlim": "x"}},
            r"source_select\.metadata: .* has no column 'model::nlim'; its columns: net",
        ),
        ({"accuracy": (0, 1), "accuracy_column": "acc"}, r"accuracy_column: .* has no column 'acc'"),
        ({"epochs": [7]}, r"holds 0 checkpoints of the format ray_tune that prepare\.source_select selects"),
        ({"accuracy": (2, 3)}, "holds 0 checkpoints"),
    ],
)
def test_what_cannot_be_selected_by(tmp_path, options, message):
    ray_tune(tmp_path)
    with pytest.raises(UserError, match=message):
        checkpoints_in(tmp_path, select=SourceSelect(**options))


def test_plain_files_tell_nothing_to_select_by(tmp_path):
    for k in range(2):
        torch.save(small_cnn(k), tmp_path / f"{k}.pth")
    with pytest.raises(UserError, match="no epoch or step is known"):
        checkpoints_in(tmp_path, select=SourceSelect(epochs="last"))
    with pytest.raises(UserError, match="no accuracy is known"):
        checkpoints_in(tmp_path, select=SourceSelect(accuracy=(0, 1)))


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"low <= high must hold, but got \[1.0, 0.5\]"):
        SourceSelect(accuracy=(1, 0.5))


# -- hostile input


def rewrite(place: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob(place))[-1]
        path.write_text(change(path.read_text()))

    return damage


def resave(change: Callable[[dict], dict], place: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = sorted(folder.glob(place))[-1]
        save_file(change(load_file(path)), path)

    return damage


def poisoned(folder: Path) -> None:
    matrix = np.load(folder / "weights.npy")
    matrix[2, 5] = np.nan
    np.save(folder / "weights.npy", matrix)


def as_index(weight_map: object) -> Callable[[Path], None]:
    return rewrite("*/*.index.json", lambda text: json.dumps({"weight_map": weight_map}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def regzip(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "metrics.csv.gz"
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode()).encode()))

    return damage


FIRST_A = f"{MODULES[0]}.lora_A.weight"
HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a line that is cut": (
        "ray_tune",
        rewrite("*/result.json", lambda t: t[:-9]),
        r"result\.json, line 50: not readable",
    ),
    "a line that is a list": ("ray_tune", rewrite("*/result.json", lambda t: "[1]\n" + t), "line 1: holds a list"),
    "deep JSON": ("ray_tune", rewrite("*/params.json", lambda t: "[" * 10**5), r"params\.json: not readable JSON"),
    "no epoch": (
        "ray_tune",
        rewrite("*/result.json", lambda t: t.replace("training_it", "it")),
        "training_iteration is N",
    ),
    "a code": (
        "ray_tune",
        lambda f: torch.save(torch.nn.Linear(1, 2), next(f.glob("*/checkpoint_000025/checkpoints"))),
        "holds more than tensors",
    ),
    "a cut checkpoint": ("ray_tune", lambda f: cut(next(f.glob("*/*25/checkpoints"))), "not a readable checkpoint"),
    "another shape": (
        "ray_tune",
        lambda f: torch.save(small_cnn(0) | {"module_list.3.bias": torch.ones(9)}, next(f.glob("*/*25/checkpoints"))),
        r"module_list\.3\.bias is \(9,\), expected \(3,\)",
    ),
    "a gap": (
        "small_cnn_zoo",
        rewrite(
            "layout.csv", lambda t: t.replace("(2,),2,0,2", '"(1,)",1,0,1').replace('"(2,)",2,0,2', '"(1,)",1,0,1')
        ),
        "begins with column 2, expected 1",
    ),
    "a layout that ends early": (
        "small_cnn_zoo",
        rewrite("layout.csv", lambda t: "\n".join(t.splitlines()[:-1]) + "\n"),
        "covers 23 columns, but the rows of weights.npy have 29",
    ),
    "a shape of another size": (
        "small_cnn_zoo",
        rewrite("layout.csv", lambda t: t.replace("(3, 3, 1, 2)", "(3, 3, 1, 4)")),
        "does not fill",
    ),
    "a shape that is code": (
        "small_cnn_zoo",
        rewrite("layout.csv", lambda t: t.replace("(3, 3, 1, 2)", "open('x', 'w')")),
        "not a tensor of the layout",
    ),
    "no columns": (
        "small_cnn_zoo",
        rewrite("layout.csv", lambda t: t.replace("start_idx", "begin")),
        "'start_idx' is missing",
    ),
    "pickled objects": (
        "small_cnn_zoo",
        lambda f: np.save(f / "weights.npy", np.array([{}, 1], object)),
        "not a readable NumPy",
    ),
    "integers": (
        "small_cnn_zoo",
        lambda f: np.save(f / "weights.npy", np.ones((6, 29), int)),
        "expected floating numbers",
    ),
    "a cut matrix": ("small_cnn_zoo", lambda f: cut(f / "weights.npy"), "not a readable NumPy matrix"),
    "fewer rows": (
        "small_cnn_zoo",
        lambda f: np.save(f / "weights.npy", np.ones((5, 29), "f4")),
        "more rows, expected 5",
    ),
    "more rows": (
        "small_cnn_zoo",
        lambda f: np.save(f / "weights.npy", np.ones((7, 29), "f4")),
        "only 6 rows, expected 7",
    ),
    "cut metrics": ("small_cnn_zoo", lambda f: cut(f / "metrics.csv.gz"), r"metrics\.csv\.gz: not a readable table"),
    "metrics without runs": ("small_cnn_zoo", regzip(lambda t: t.replace("modeldir", "dir")), "expected a modeldir"),
    "a huge step": (
        "small_cnn_zoo",
        regzip(lambda t: t.replace(",86,", f",{'9' * 5000},")),
        "expected a modeldir and an i",
    ),
    "NaN in a row": ("small_cnn_zoo", poisoned, "row_000002: sequential/conv2d/kernel:0 holds NaN"),
    "a missing shard": (
        "hugging_face",
        lambda f: next(f.glob("*/*2-of-*")).unlink(),
        r"the shard model-00002\S+ is missing",
    ),
    "a way out": (
        "hugging_face",
        as_index({"w": "../multiberts-seed_0/model.safetensors"}),
        "expected the name of a file",
    ),
    "an absolute way out": (
        "hugging_face",
        as_index({"w": "/etc/x.safetensors"}),
        "expected the name of a file beside it",
    ),
    "another kind of file": ("hugging_face", as_index({"w": "config.json"}), "expected the name of a file beside it"),
    "no map": ("hugging_face", as_index([]), "has no weight_map"),
    "a tensor of no shard": (
        "hugging_face",
        rewrite("*/*.index.json", lambda t: t.replace('"encoder.1.key"', '"encoder.9.key"')),
        r"holds no encoder\.9\.key, which the index expects",
    ),
    "a cut configuration": (
        "hugging_face",
        rewrite("*/config.json", lambda t: t[:9]),
        r"config\.json: not readable JSON",
    ),
    "another adapter": (
        "lora",
        rewrite("*/adapter_config.json", lambda t: t.replace("LORA", "IA3")),
        "peft_type is 'IA3'",
    ),
    "no partner": (
        "lora",
        resave(lambda s: {n: t for n, t in s.items() if "B" not in n}, "*/*.safetensors"),
        "no partner",
    ),
    "B alone": (
        "lora",
        resave(lambda s: {n: t for n, t in s.items() if n != FIRST_A}, "*/*.safetensors"),
        "1 pairs of A and B for 2",
    ),
    "other ranks": (
        "lora",
        resave(lambda s: s | {FIRST_A: torch.ones(3, 6)}, "*/*.safetensors"),
        r"expected \(r, in\) and",
    ),
    "infinity": (
        "lora",
        resave(lambda s: s | {FIRST_A: torch.full((2, 6), torch.inf)}, "*/*.safetensors"),
        "NaN or inf",
    ),
    "no pair": ("lora", resave(lambda s: {"w": torch.ones(2, 2)}, "*/*.safetensors"), "holds 0 pairs"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_zoos(tmp_path, kind):
    name, damage, message = HOSTILE[kind]
    WRITERS[name](tmp_path / "zoo")
    damage(tmp_path / "zoo")
    with pytest.raises(UserError, match=message) as caught:
        read_collection(tmp_path / "zoo", format=name)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_numbers_that_are_not_finite_or_huge_are_unknown(tmp_path):
    ray_tune(tmp_path)
    for path in tmp_path.glob("*/params.json"):
        path.write_text(f'{{"a": NaN, "b": 1e999, "c": 1{"0" * 400}, "d": {{"x": 1}}, "e": "{"x" * 999}", "f": 1}}')
    known = columns(checkpoints_in(tmp_path))
    assert known["a"] == known["b"] == known["c"] == [None] * 6 and known["f"] == [1] * 6
    assert not {"d", "e"} & known.keys()


class ModelDatasetBase:
    """A stand-in for the pickled class of ModelZoos."""


def test_pickled_data_sets_of_model_zoos_are_refused_with_what_to_take_instead(tmp_path, monkeypatch):
    module = type(sys)("checkpoints_to_datasets.dataset_base")
    module.ModelDatasetBase = ModelDatasetBase
    monkeypatch.setitem(sys.modules, "checkpoints_to_datasets", type(sys)("checkpoints_to_datasets"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(ModelDatasetBase, "__module__", module.__name__)
    for part in ("train", "test"):
        torch.save({"trainset": ModelDatasetBase()}, tmp_path / f"dataset_{part}.pt")
    with pytest.raises(UserError, match=r"data set of ModelZoos .*take the raw zoo instead: .* \(format ray_tune\)"):
        read_collection(tmp_path)
