"""Files that appear whole or not at all, and refusals of damaged ones."""

import json
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdiff import files
from pdiff.errors import UserError
from pdiff.files import read_json, read_tensors, whole, write_json, write_tensors, write_text


def test_a_file_appears_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_to_be_seen_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with whole(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename across file systems would not be atomic
    assert path.read_text() == "new"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [lambda p: write_json(p, 1), lambda p: write_tensors(p, {"a": torch.zeros(1)})])
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path, write: object) -> None:
    (tmp_path / "ordinary").touch()
    write(tmp_path / "written")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "written")}
    assert len(modes) == 1


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_tensors_round_trip_whatever_their_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "expanded": torch.ones(1).expand(5),
        "grad": base.clone().requires_grad_(),
        "half": base.half(),
        "bool": base > 4,
        "scalar": torch.tensor(3),
    }
    write_tensors(tmp_path / "tensors.safetensors", tensors)
    found = read_tensors(tmp_path / "tensors.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("[1]\ngarbage\n")
    with pytest.raises(UserError, match=r"broken\.jsonl: not readable lines of JSON"):
        files.whole_lines(tmp_path / "broken.jsonl")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", None])
@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_damaged_or_missing_file_is_named(tmp_path: Path, read: object, content: bytes | None) -> None:
    path = tmp_path / "broken.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.bin"):
        read(path)


def test_a_truncated_tensor_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize("write", [files.write_tensors, files.write_state])
def test_a_full_disk_is_an_os_error(write, tmp_path: Path) -> None:
    """Libraries raise errors of their own where a file cannot grow; here all of them are OSErrors."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            write(tmp_path / "file", {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def parts(data: bytes) -> tuple[dict, int, bytes]:
    """Of a file of safetensors: its header, whose metadata stand in any order; how long that is; and the rest."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), size, data[8 + size :]


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "note": "ü"}])
def test_tensor_files_are_those_of_safetensors(metadata: dict | None, tmp_path: Path) -> None:
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{k}é": torch.arange(2 * k).reshape(k, 2).to(dtype) for k, dtype in enumerate(types)}
    tensors |= {"scalar": torch.tensor(1.5), "view": torch.arange(12.0).view(3, 4).T[1:]}
    write_tensors(tmp_path / "ours", tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    (header, *ours), (expected, *theirs) = (parts((tmp_path / name).read_bytes()) for name in ("ours", "theirs"))
    assert ours == theirs and header == expected and list(header) == list(expected)
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype


def test_scratch_tensors_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SCRATCH_BYTES", 1000)
    with files.scratch_folder(tmp_path / "new"):
        small = files.scratch(3, 4)
        assert small.shape == (3, 4) and not (tmp_path / "new").exists()
        like = {
            "a": torch.empty(7, 10, dtype=torch.float64),
            "b": torch.empty((), dtype=torch.bool),
            "c": torch.empty(0, 2),
        }
        tensors = files.scratch_tensors(like | {"d": torch.empty(500, dtype=torch.float16)})
        assert list((tmp_path / "new").iterdir()) == []
    for k, tensor in enumerate(tensors.values()):
        tensor.fill_(k)
    assert list(tensors) == list("abcd") and tensors["a"].shape == (7, 10) and tensors["c"].shape == (0, 2)
    for k, (name, tensor) in enumerate(tensors.items()):
        assert tensor.dtype == like.get(name, torch.zeros(0, dtype=torch.float16)).dtype
        assert bool((tensor == k).all())
