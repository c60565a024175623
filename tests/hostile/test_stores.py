"""Hostile tries at the tracking store and at what is kept in it."""

import pytest
from hostile import Try, answered

TRIES = [Try("export --run 00000000000000000000000000000000 --out there", 2, ("--run", "0000"))]


@pytest.mark.parametrize("tried", TRIES, ids=lambda tried: tried.command)
def test_a_line(tried, workspace, capfd):
    answered(tried, workspace, capfd)
