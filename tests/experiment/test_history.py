"""The points of a stage in one file: whole after a kill, repeated by a resumed stage, with all the seconds spent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from pdiff.errors import UserError
from pdiff.experiment.history import HISTORY, History
from pdiff.method.log import Point, measured


def logged(out: Path, *points: Point) -> list[Point]:
    """What a history passes on when it is opened and then given some points."""
    passed: list[Point] = []
    history = History(out, passed.append)
    for point in points:
        history(point)
    return passed


def seconds(points: list[Point]) -> float:
    return [point.value for point in points if point.name == "seconds/fit"][-1]


def test_points_are_appended_and_read_as_a_table(tmp_path):
    points = [Point("fit/loss", 1 / 3, 1), Point("fit/loss", float("inf"), 2), Point("size", 7)]
    assert logged(tmp_path, *points) == points
    table = pd.read_csv(tmp_path / HISTORY)
    assert list(table.columns) == ["name", "step", "value", "time"]
    assert list(table.itertuples(index=False, name=None)) == [
        (point.name, point.step, point.value, at) for point, at in zip(points, table["time"], strict=True)
    ]
    assert table["time"].between(time.time() - 60, time.time()).all()


def test_a_resumed_stage_repeats_its_points_and_adds_only_new_ones(tmp_path):
    first = [Point("fit/loss", 1 / 3, 1), Point("fit/loss", 0.1, 2)]
    logged(tmp_path, *first)
    new = Point("fit/loss", 0.05, 3)
    assert logged(tmp_path, Point("fit/loss", 0.11, 2), new) == [*first, new]
    assert logged(tmp_path) == [*first, new]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_a_kill_cut_off_is_forgotten(tmp_path, cut):
    points = [Point("fit/loss", 0.5, 1), Point("fit/loss", 0.25, 2)]
    logged(tmp_path, *points)
    path = tmp_path / HISTORY
    path.write_bytes(path.read_bytes()[:-cut])
    assert logged(tmp_path, points[1]) == points
    assert logged(tmp_path) == points


def test_a_damaged_file_is_one_line(tmp_path):
    logged(tmp_path, Point("fit/loss", 0.5, 1))
    (tmp_path / HISTORY).write_text("name,step,value,time\nfit/loss,1\n")
    with pytest.raises(UserError, match=r"history\.csv: not a readable history"):
        logged(tmp_path)


def test_seconds_of_an_interrupted_block_count(tmp_path):
    passed: list[Point] = []
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), measured(History(tmp_path, passed.append), "fit"):
        time.sleep(0.02)
        raise KeyboardInterrupt
    assert 0.02 <= seconds(passed) <= time.perf_counter() - begin
    again: list[Point] = []
    begin = time.perf_counter()
    with measured(History(tmp_path, again.append), "fit"):
        time.sleep(0.01)
    assert again[: len(passed)] == passed
    assert 0.01 <= seconds(again) - seconds(passed) <= time.perf_counter() - begin
    assert seconds(logged(tmp_path)) == seconds(again), "they are not added up without a block"


KILLED = """
import os, signal, sys, time
from pathlib import Path
from pdiff.experiment.history import STATE, History
from pdiff.method.log import Point, measured

out = Path(sys.argv[1])
history = History(out, lambda point: None)
begin = time.perf_counter()
with measured(history, "fit"):
    time.sleep(0.3)
    if sys.argv[2] == "point":
        history(Point("fit/loss", 1.0, int(sys.argv[3])))
    if sys.argv[2] == "state":
        (out / STATE).mkdir(exist_ok=True)
        (out / STATE / "fit.pt").write_text(sys.argv[3])
    print(time.perf_counter() - begin, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["point", "state"])
def test_seconds_before_a_kill_count_up_to_the_last_sign_of_life(tmp_path, sign):
    """What passes between a kill and the next beginning, such as the start of a process, does not."""
    spent = 0.0
    for attempt in ("1", "2"):
        command = [sys.executable, "-c", KILLED, str(tmp_path), sign, attempt]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        spent += float(ended.stdout)
    time.sleep(0.3)
    passed: list[Point] = []
    begin = time.perf_counter()
    with measured(History(tmp_path, passed.append), "fit"):
        pass
    spent += time.perf_counter() - begin
    resolution = 0.02  # of a file's time
    assert 0.6 - 2 * resolution < seconds(passed) < spent + 2 * resolution
