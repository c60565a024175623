"""Checkpoint files of users: what goes in comes out, and what is wrong is said in one line that names the file."""

import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.method.collection import Collection
from pdiff.networks.imported import plain
from pdiff.networks.imported.plain import check_state, read_collection
from pdiff.networks.imported.template import Template
from pdiff.networks.imported.zoo import checkpoints_in

State = dict[str, Tensor]


def state(seed: int) -> State:
    """A state dict as networks with BatchNorm have it."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(3, 2, generator=g), torch.randn(3, generator=g)
    return {"weight": weight, "bias": bias, "num_batches_tracked": torch.tensor(seed)}


def prefixed(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


def compiled(state: State) -> State:
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


ADAM = {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
WRITERS: dict[str, tuple[str, Callable[[State, Path], object]]] = {
    "plain": (".pth", torch.save),
    "pt": (".pt", torch.save),
    "legacy": (".pth", lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False)),
    "nested in state_dict": (".pth", lambda s, path: torch.save({"epoch": 3, "state_dict": s}, path)),
    "nested in model": (".pth", lambda s, path: torch.save({"model": s, "optimizer": {"lr": 0.1}}, path)),
    "DataParallel": (".pth", lambda s, path: torch.save({"state_dict": prefixed(s)}, path)),
    "torch.compile": (".pt", lambda s, path: torch.save(compiled(s), path)),
    "both": (".pt", lambda s, path: torch.save(prefixed(compiled(s)), path)),
    "nested twice": (".pth", lambda s, path: torch.save({"model": {"state_dict": s}, "args": {"lr": [0.1]}}, path)),
    "as model_state_dict": (".pth", lambda s, path: torch.save({"model_state_dict": s, "optimizer": ADAM}, path)),
    "as net": (".pth", lambda s, path: torch.save({"net": s, "acc": 93.1, "epoch": 7}, path)),
    "as ema": (".pth", lambda s, path: torch.save({"ema": s, "step": 7}, path)),
    "beside its average": (".pth", lambda s, path: torch.save({"state_dict_ema": ADAM, "state_dict": s}, path)),
    "numbers and texts beside": (".pth", lambda s, path: torch.save(s | {"epoch": 3, "by": "me", "x": None}, path)),
    "parameters": (".pth", lambda s, path: torch.save(s | {"weight": nn.Parameter(s["weight"])}, path)),
    "safetensors": (".safetensors", save_file),
    "safetensors of DataParallel": (".safetensors", lambda s, path: save_file(prefixed(s), path)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_round_trip(tmp_path, kind):
    suffix, write = WRITERS[kind]
    for k in (2, 0, 1):
        write(state(k), tmp_path / f"{k}{suffix}")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    collection = read_collection(tmp_path)
    assert collection.names == [f"{k}{suffix}" for k in range(3)]
    assert set(collection.tensors) == set(state(0))
    assert not any(tensor.requires_grad for tensor in collection.tensors.values())
    for k, found in enumerate(collection):
        assert all(torch.equal(found[name], tensor) for name, tensor in state(k).items())


def test_kinds_of_files_may_be_mixed(tmp_path):
    for k, (suffix, write) in enumerate(WRITERS.values()):
        write(state(k), tmp_path / f"{k}{suffix}")
    assert read_collection(tmp_path).tensors["num_batches_tracked"].tolist() == list(range(len(WRITERS)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path, dtype):
    for k in range(2):
        torch.save({"w": state(k)["weight"].to(dtype)}, tmp_path / f"{k}.pth")
    collection = read_collection(tmp_path)
    assert collection.tensors["w"].dtype == dtype
    assert torch.equal(collection[1]["w"], state(1)["weight"].to(dtype))


def test_numbers_in_names_are_in_order(tmp_path):
    for k in (100, 9, 10, 1):
        torch.save(state(k), tmp_path / f"epoch_{k}.pth")
    assert read_collection(tmp_path).tensors["num_batches_tracked"].tolist() == [1, 9, 10, 100]
    first = checkpoints_in(tmp_path, exclude=["epoch_1.pth"])[0].read()
    assert first.state["num_batches_tracked"] == 9


def test_many_files_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "THREADS", 8)
    for k in range(100):
        torch.save(state(k), tmp_path / f"{k}.pth")
    collection = read_collection(tmp_path)
    assert collection.names == [f"{k}.pth" for k in range(100)]
    assert torch.equal(collection.tensors["weight"], torch.stack([state(k)["weight"] for k in range(100)]))


def test_excluded_files_are_not_read(tmp_path):
    for k in range(6):
        torch.save(state(k), tmp_path / f"{k}.pth")
    (tmp_path / "4.pth").write_text("damaged")
    (tmp_path / "bad[1].pth").write_text("damaged")
    exclude = ["4.pth", "bad[[]1].pth", "[01].pth"]
    assert read_collection(tmp_path, exclude=exclude).tensors["num_batches_tracked"].tolist() == [2, 3, 5]
    with pytest.raises(UserError, match=r"prepare\.exclude: '7\.pth' matches none of the 7 files in"):
        checkpoints_in(tmp_path, exclude=["4.pth", "7.pth"])
    with pytest.raises(UserError, match=r"holds 0 files .* beside 7 excluded ones, expected at least 2"):
        checkpoints_in(tmp_path, exclude=["*"])


@pytest.mark.slow
def test_tensors_are_read_into_their_place(tmp_path):
    """What is left out is not read, and nothing is held twice: the peak is the collection, not two of it."""
    size = 1 << 20
    for k in range(8):
        torch.save({"w": torch.full((size,), float(k)), "out": torch.full((2 * size,), 1.0)}, tmp_path / f"{k}.pth")
    program = (
        "import sys, torch, resource\nfrom pathlib import Path\n"
        "from pdiff.networks.imported import plain as a\na.THREADS = 1\n"
        "torch.ones(1 << 20).sum()\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\nc = a.read_collection(Path(sys.argv[1]), ['w'])\nassert c.tensors['w'].sum() == 28 * 2**20\n"
        "print((peak() - before) / 4096)\n"  # of a tensor w
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8 + 5, "tensors w held at the peak; of 8 files, and of what is made of one on the way"


EXACT = [kind for kind in WRITERS if kind != "parameters"]


@pytest.mark.parametrize("kind", EXACT)
def test_networks_are_written_as_the_files_are(tmp_path, kind):
    suffix, write = WRITERS[kind]
    write(state(0), tmp_path / f"0{suffix}")
    new = {"bias": state(1)["bias"].double()}
    Template.read(tmp_path / f"0{suffix}").write(tmp_path / f"new{suffix}", new)
    write(state(0) | {"bias": state(1)["bias"]}, tmp_path / f"expected{suffix}")
    found, expected = (content(tmp_path / f"{name}{suffix}") for name in ("new", "expected"))
    for key in {"as model_state_dict": ["optimizer"], "beside its average": ["state_dict_ema"]}.get(kind, []):
        del expected[key]  # tensors that belong to another network
    assert_same(found, expected)


def content(path: Path) -> dict:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


SMALL = getattr(torch, "float8_e5m2", torch.complex64)  # refused, as the first one is that PyTorch has since 2.1


def owns_its_storage(tensor: Tensor) -> bool:
    """Of a view all that it is a view of would be saved."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def assert_same(found: object, expected: object) -> None:
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert list(found) == list(expected)
        for key, value in found.items():
            assert_same(value, expected[key])
    elif isinstance(found, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert owns_its_storage(found)
    else:
        assert found == expected


def test_a_written_network_can_be_loaded_by_its_owner(tmp_path):
    """Also by modules that look at the version of what they load, which BatchNorm does."""
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    torch.save({"model": network.state_dict(), "config": {"hidden": 3}}, tmp_path / "0.pth")
    sampled = Collection({"0.weight": torch.randn(5, 3, 4)})
    Template.read(tmp_path / "0.pth").write(tmp_path / "1.pth", sampled[2])
    written = torch.load(tmp_path / "1.pth", weights_only=True)
    assert written["config"] == {"hidden": 3}
    stored = written["model"]["0.weight"]
    assert owns_its_storage(stored)
    assert written["model"]._metadata == network.state_dict()._metadata
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    other.load_state_dict(written["model"])
    assert torch.equal(other[0].weight, sampled.tensors["0.weight"][2])
    assert torch.equal(other[0].bias, network[0].bias)


def test_metadata_of_safetensors_is_kept(tmp_path):
    save_file(state(0), tmp_path / "0.safetensors", {"format": "pt"})
    Template.read(tmp_path / "0.safetensors").write(tmp_path / "1.safetensors", {})
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


def test_networks_of_another_kind_cannot_be_written(tmp_path):
    torch.save(state(0), tmp_path / "0.pth")
    template = Template.read(tmp_path / "0.pth")
    with pytest.raises(UserError, match=r"bias is \(4,\), but the checkpoint files have \(3,\)"):
        template.write(tmp_path / "1.pth", {"bias": torch.ones(4)})
    with pytest.raises(UserError, match=r"gain is \(3,\), but the checkpoint files have no such tensor"):
        template.complete({"gain": torch.ones(3)})
    assert not (tmp_path / "1.pth").exists()


def test_what_holds_itself_is_no_state_dict(tmp_path):
    endless: dict = {"epoch": 3}
    endless["model"] = endless
    torch.save(endless, tmp_path / "0.pth")
    with pytest.raises(UserError, match="entry 'model' is a dict, expected a tensor"):
        Template.read(tmp_path / "0.pth")


def test_what_is_refused_is_named(tmp_path):
    torch.save(state(0) | {"accuracy": np.float64(0.9)}, tmp_path / "0.pth")
    with pytest.raises(UserError, match=r"holds more than tensors \(numpy\.\S+\.scalar\)"):
        Template.read(tmp_path / "0.pth")


def test_the_prefix_goes_only_where_all_names_have_it(tmp_path):
    torch.save({"module.w": torch.ones(2), "v": torch.ones(2)}, tmp_path / "0.pth")
    assert set(Template.read(tmp_path / "0.pth").state) == {"module.w", "v"}


def test_patterns(tmp_path):
    for k in range(2):
        torch.save(state(k), tmp_path / f"{k}.pth")
    assert list(read_collection(tmp_path, ["b*", "num_*"]).tensors) == ["bias", "num_batches_tracked"]
    with pytest.raises(UserError, match=r"0\.pth: no tensor matches prepare\.parameters gain, shift"):
        read_collection(tmp_path, ["gain", "shift"])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_files(tmp_path, count):
    for k in range(count):
        torch.save(state(k), tmp_path / f"{k}.pth")
    with pytest.raises(
        UserError, match=rf"{tmp_path} holds {count} files \.pth/\.pt/\.safetensors, expected at least 2"
    ):
        read_collection(tmp_path)


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.source: .*absent is not a folder"):
        read_collection(tmp_path / "absent")


def truncated(suffix: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (torch.save if suffix == ".pth" else save_file)(state(1), path)
        path.write_bytes(path.read_bytes()[:-40])

    return write


def saving(change: dict) -> Callable[[Path], None]:
    return lambda path: torch.save({n: t for n, t in (state(1) | change).items() if t is not None}, path)


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (truncated(".pth"), ".pth", "not a readable checkpoint"),
    "truncated safetensors": (truncated(".safetensors"), ".safetensors", "not a readable safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), ".pth", "not a readable checkpoint"),
    "text": (
        lambda path: path.write_text("hello\nworld\n"),
        ".pth",
        "not a readable checkpoint: no file of torch.save",
    ),
    "text as safetensors": (lambda path: path.write_text("hello\nworld\n"), ".safetensors", "not a readable"),
    "a folder": (lambda path: path.mkdir(), ".pth", "not a readable checkpoint"),
    "a whole network": (lambda path: torch.save(nn.Linear(2, 3), path), ".pth", "pickled code is never run"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), ".pth", "holds a Tensor, expected a state dict"),
    "nothing": (lambda path: torch.save({}, path), ".pth", "holds a dict, expected a state dict"),
    "an optimiser": (saving({"optimizer": ADAM}), ".pth", "entry 'optimizer' is a dict, expected a tensor"),
    "numbers alone": (lambda path: torch.save({"epoch": 3}, path), ".pth", "holds no tensor"),
    "a numbered tensor": (saving({3: torch.ones(2)}), ".pth", "name 3 is a int, expected a text"),
    "a sparse tensor": (saving({"bias": torch.ones(3).to_sparse()}), ".pth", "bias is a sparse tensor"),
    "no numbers": (saving({"bias": torch.ones(3, device="meta")}), ".pth", "bias is a tensor without numbers"),
    "a byte a number": (saving({"bias": torch.ones(3).to(SMALL)}), ".pth", f"of the type {str(SMALL)[6:]}"),
    "complex numbers": (saving({"bias": torch.ones(3, dtype=torch.complex64)}), ".pth", "of the type complex64"),
    "a tensor more": (saving({"gain": torch.ones(2)}), ".pth", "tensors differ from those of"),
    "a tensor less": (saving({"bias": None}), ".pth", "tensors differ from those of"),
    "another shape": (saving({"bias": torch.ones(4)}), ".pth", r"bias is \(4,\), expected \(3,\)"),
    "an integer": (saving({"bias": torch.ones(3).long()}), ".pth", r"bias is torch\.int64, expected torch\.float32"),
    "NaN": (saving({"bias": torch.tensor([1, torch.nan, 2])}), ".pth", "bias holds NaN or infinity"),
    "infinity": (saving({"bias": torch.tensor([1, torch.inf, 2])}), ".pth", "bias holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path, kind):
    write, suffix, message = BAD[kind]
    for name in ("0.pth", "2.pth"):
        torch.save(state(0), tmp_path / name)
    write(tmp_path / f"1{suffix}")
    with pytest.raises(UserError, match=message) as caught:
        read_collection(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / f'1{suffix}'}: ")
    assert "\n" not in str(caught.value)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(tmp_path, zipped):
    for k in range(2):
        torch.save(
            state(k) | {"w": Code(tmp_path / "ran")}, tmp_path / f"{k}.pth", _use_new_zipfile_serialization=zipped
        )
    with pytest.raises(UserError, match=r"0\.pth: holds more than tensors .* pickled code is never run"):
        read_collection(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_would_run_in_a_plain_pickle(tmp_path):
    content = pickle.dumps({"w": Code(tmp_path / "ran")}, protocol=2)
    (tmp_path / "0.pth").write_bytes(content)
    with pytest.raises(UserError):
        Template.read(tmp_path / "0.pth")
    assert not (tmp_path / "ran").exists()
    pickle.Unpickler(io.BytesIO(content)).load()  # the control
    assert (tmp_path / "ran").exists()


# -- checks


GOOD = {"w": torch.ones(2, 3), "n": torch.tensor(7)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w": torch.ones(2, 3)}, "b.pth: tensors differ from those of a.pth: n"),
        (GOOD | {"x": torch.ones(1)}, "b.pth: tensors differ from those of a.pth: x"),
        (GOOD | {"w": torch.ones(3, 2)}, "b.pth: w is (3, 2), expected (2, 3) as in a.pth"),
        (GOOD | {"w": torch.ones(2, 3).half()}, "b.pth: w is torch.float16, expected torch.float32 as in a.pth"),
        (GOOD | {"w": torch.full((2, 3), math.nan)}, "b.pth: w holds NaN or infinity, expected finite numbers"),
        (GOOD | {"w": torch.full((2, 3), -math.inf)}, "b.pth: w holds NaN or infinity, expected finite numbers"),
    ],
)
def test_check_state(bad, message):
    check_state(GOOD, "c.pth", like=GOOD, named="a.pth")
    with pytest.raises(UserError) as caught:
        check_state(bad, "b.pth", like=GOOD, named="a.pth")
    assert str(caught.value) == message


def test_nothing_to_generate():
    state = {"n": torch.tensor(7), "one": torch.ones(1)}
    with pytest.raises(UserError, match=r"a\.pth: no floating tensor of more than one element"):
        check_state(state, "a.pth", like=state, named="a.pth")
