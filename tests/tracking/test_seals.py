"""Checksums against published ones, and manifests of folders."""

import hashlib

import pytest

from pdiff.errors import Damaged
from pdiff.tracking.seals import BLOCK, MANIFEST, checksum, seal, verify

EMPTY = "99aa06d3014798d86001c324468d497f"  # XXH3_128bits of no bytes, seed 0, in the specification's test vectors


def test_checksums(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert checksum(path) == EMPTY
    content = bytearray(hashlib.shake_256(b"seed").digest(3 * BLOCK + 7))  # several blocks and a part of one
    found = set()
    for position in (None, 0, BLOCK - 1, BLOCK, 3 * BLOCK, len(content) - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        path.write_bytes(changed)
        found.add(checksum(path))
    assert len(found) == 6


def test_a_manifest_names_every_file(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "b").write_text("2")
    (tmp_path / "folder" / "inner" / "c").write_text("3")
    (tmp_path / "other").write_text("not sealed")
    sealed = seal(tmp_path, [tmp_path / "a", tmp_path / "folder"])
    (tmp_path / "other").unlink()
    verify(tmp_path, sealed)
    for name in ("a", "folder/b", "folder/inner/c", MANIFEST):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(kept + " ")
        with pytest.raises(Damaged) as caught:
            verify(tmp_path, sealed)
        assert caught.value.path == tmp_path / name and "checksum" in caught.value.reason
        (tmp_path / name).unlink()
        with pytest.raises(Damaged, match="cannot be read: No such file"):
            verify(tmp_path, sealed)
        (tmp_path / name).write_text(kept)
    verify(tmp_path, sealed)
