"""What old versions of PyTorch are spared."""

import pytest

from pdiff import compat


@pytest.mark.parametrize(
    ("version", "devices"),
    [((2, 0), []), ((2, 2), []), ((2, 3), ["cuda"]), ((2, 4), ["cuda", "cpu"]), ((3, 0), ["cuda", "cpu"])],
)
def test_optimisers_are_fused_where_all_of_them_can_be(version, devices, monkeypatch) -> None:
    monkeypatch.setattr(compat, "VERSION", version)
    assert [device for device in ("cuda", "cpu", "mps") if compat.fused(device)] == devices
