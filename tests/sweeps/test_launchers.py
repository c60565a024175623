"""Where workers run: this host's processes, jobs of submitit, this process; and workers that die."""

import os
import sys

import pytest

from pdiff.errors import UserError
from pdiff.method.log import Point
from pdiff.sweeps import launchers
from pdiff.sweeps.launchers import LAUNCHERS, Task, launcher
from pdiff.sweeps.objective import PruningLog
from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.workers import Workers

SWEEP = Sweep.model_validate(
    {"objectives": {"x": "minimize"}, "parameters": {"generate.count": {"kind": "int", "low": 2, "high": 50}}}
)


def test_workers_share_cores_and_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = []

    class Recorded:
        def __init__(self, command, env, **_):
            seen.append((env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"], env["PDIFF_PARENT"]))

    monkeypatch.setattr("subprocess.Popen", Recorded)
    for workers, pinned in ((3, True), (100, False)):
        begin = launcher("processes", workers, tmp_path, {}, pinned=pinned)
        for slot in range(3):
            begin(Task(["x"], {}, None), slot)
    me = str(os.getpid())
    assert seen[:3] == [("2", "4", me), ("2", "7", me), ("2", "4", me)]
    assert seen[3:] == [("1", "4,7", me)] * 3


@pytest.mark.slow
def test_jobs_inherit_their_environment_and_no_file_holds_it(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "first-secret")
    names = ["MLFLOW_TRACKING_PASSWORD", "PDIFF_STORAGE", "SUBMITIT_EXECUTOR"]  # the last one is set in the job
    code = f"import os; print(*(len(os.environ[name]) for name in {names}))"
    begin = launcher("local", 1, tmp_path, {}, pinned=False)
    submitted = begin(Task([sys.executable, "-c", code], {"PDIFF_STORAGE": "second-secret"}, None), 0)
    assert submitted.job.result().split() == ["12", "13", "5"]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not any(b"-secret" in content for content in files)
    assert "PDIFF_STORAGE" not in os.environ or os.environ["PDIFF_STORAGE"] != "second-secret"


def test_a_worker_without_its_parent_ends(monkeypatch):
    assert not launchers.abandoned()
    monkeypatch.setenv("PDIFF_PARENT", str(os.getppid()))
    assert not launchers.abandoned()
    monkeypatch.setenv("PDIFF_PARENT", "1" if os.getppid() != 1 else "2")
    assert launchers.abandoned()
    log = PruningLog(None, SWEEP)
    with pytest.raises(KeyboardInterrupt):
        log(Point("loss", 1.0, 1))


def test_workers_that_cannot_start_end_the_command_with_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "w.log"

    class Broken:
        def __init__(self, *_):
            self.log = log
            log.write_text("first\npdiff: no such tag\n")

        def running(self):
            return False

    workers = Workers(Broken, 2)
    with pytest.raises(UserError, match="pdiff: no such tag"):
        for _ in range(30):
            workers.keep(waiting=3, finished=0)


def test_an_inline_worker_is_this_process(tmp_path):
    calls = []
    start = launcher("inline", 1, tmp_path, {}, pinned=True)
    job = start(Task(["x"], {}, lambda: calls.append(os.getpid())), 0)
    assert calls == [os.getpid()] and not job.running()
    for workers, options, hint in ((2, {}, "--workers 2"), (1, {"gpus": 1}, "has none")):
        with pytest.raises(UserError, match=hint):
            launcher("inline", workers, tmp_path, options, pinned=False)
    with pytest.raises(UserError, match=", ".join(LAUNCHERS)):
        launcher("slurmm", 1, tmp_path, {}, pinned=False)
