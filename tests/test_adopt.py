"""Somebody's checkpoint files: what goes in comes out, and what is wrong is said in one line that names the file."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pdiff.adopt import adopt, read_state
from pdiff.errors import UserError

State = dict[str, Tensor]


def state(seed: int) -> State:
    """A state dict as networks with BatchNorm have it."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(3, 2, generator=g), torch.randn(3, generator=g)
    return {"weight": weight, "bias": bias, "num_batches_tracked": torch.tensor(seed)}


def prefixed(state: State) -> State:
    return {f"module.{name}": tensor for name, tensor in state.items()}


WRITERS: dict[str, tuple[str, Callable[[State, Path], object]]] = {
    "plain": (".pth", torch.save),
    "pt": (".pt", torch.save),
    "legacy": (".pth", lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False)),
    "nested in state_dict": (".pth", lambda s, path: torch.save({"epoch": 3, "state_dict": s}, path)),
    "nested in model": (".pth", lambda s, path: torch.save({"model": s, "optimizer": {"lr": 0.1}}, path)),
    "DataParallel": (".pth", lambda s, path: torch.save({"state_dict": prefixed(s)}, path)),
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
    collection = adopt(tmp_path)
    assert collection.names == [f"{k}{suffix}" for k in range(3)]
    assert set(collection.tensors) == set(state(0))
    assert not any(tensor.requires_grad for tensor in collection.tensors.values())
    for k, found in enumerate(collection):
        assert all(torch.equal(found[name], tensor) for name, tensor in state(k).items())


def test_kinds_of_files_may_be_mixed(tmp_path):
    for k, (suffix, write) in enumerate(WRITERS.values()):
        write(state(k), tmp_path / f"{k}{suffix}")
    assert adopt(tmp_path).tensors["num_batches_tracked"].tolist() == list(range(len(WRITERS)))


def test_half_precision_is_kept(tmp_path):
    for k in range(2):
        torch.save({"w": state(k)["weight"].half()}, tmp_path / f"{k}.pth")
    collection = adopt(tmp_path)
    assert collection.tensors["w"].dtype == torch.float16
    assert torch.equal(collection[1]["w"], state(1)["weight"].half())


def test_the_prefix_goes_only_where_all_names_have_it(tmp_path):
    torch.save({"module.w": torch.ones(2), "v": torch.ones(2)}, tmp_path / "0.pth")
    assert set(read_state(tmp_path / "0.pth")) == {"module.w", "v"}


def test_patterns(tmp_path):
    for k in range(2):
        torch.save(state(k), tmp_path / f"{k}.pth")
    assert list(adopt(tmp_path, ["b*", "num_*"]).tensors) == ["bias", "num_batches_tracked"]
    with pytest.raises(UserError, match=r"0\.pth: no tensor matches prepare\.parameters gain, shift"):
        adopt(tmp_path, ["gain", "shift"])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_files(tmp_path, count):
    for k in range(count):
        torch.save(state(k), tmp_path / f"{k}.pth")
    with pytest.raises(
        UserError, match=rf"{tmp_path} holds {count} files \.pth/\.pt/\.safetensors, expected at least 2"
    ):
        adopt(tmp_path)


def test_absent_folder(tmp_path):
    with pytest.raises(UserError, match=r"prepare\.source: .*absent is not a folder"):
        adopt(tmp_path / "absent")


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
    "text": (lambda path: path.write_text("hello\nworld\n"), ".pth", "not a readable checkpoint"),
    "text as safetensors": (lambda path: path.write_text("hello\nworld\n"), ".safetensors", "not a readable"),
    "a folder": (lambda path: path.mkdir(), ".pth", "not a readable checkpoint"),
    "a whole network": (lambda path: torch.save(nn.Linear(2, 3), path), ".pth", "pickled code is never run"),
    "a tensor": (lambda path: torch.save(torch.ones(3), path), ".pth", "holds a Tensor, expected a state dict"),
    "nothing": (lambda path: torch.save({}, path), ".pth", "holds a dict, expected a state dict"),
    "a number": (saving({"epoch": 3}), ".pth", "entry 'epoch' is a int, expected a tensor"),
    "a numbered tensor": (saving({3: torch.ones(2)}), ".pth", "entry 3 is a Tensor"),
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
        adopt(tmp_path)
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
        adopt(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_would_run_in_a_plain_pickle(tmp_path):
    content = pickle.dumps({"w": Code(tmp_path / "ran")}, protocol=2)
    (tmp_path / "0.pth").write_bytes(content)
    with pytest.raises(UserError):
        read_state(tmp_path / "0.pth")
    assert not (tmp_path / "ran").exists()
    pickle.Unpickler(io.BytesIO(content)).load()  # the control
    assert (tmp_path / "ran").exists()
