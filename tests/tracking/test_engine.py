"""The engine on a store that is a list: order, reuse, failures, what is fresh, locks, and which runs were read."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdiff.errors import Damaged, Pruned, UserError
from pdiff.experiment import config, digests, schema, stages
from pdiff.experiment.history import STATE, History
from pdiff.experiment.schema import Experiment
from pdiff.experiment.stages import Stage
from pdiff.method.log import Point
from pdiff.tracking import engine
from pdiff.tracking.engine import Done, Pipeline
from pdiff.tracking.seals import MANIFEST


class ListedRun:
    """A run whose artifacts are copied nowhere: their content is kept."""

    def __init__(self, number: int, stage: str, folder: Path) -> None:
        self.run_id, self.stage, self.folder = str(number), stage, folder / str(number)
        self.status, self.tags, self.points = "running", {}, []

    def log(self, point: Point) -> None:
        self.points.append(point)

    def tag(self, tags) -> None:
        self.tags |= tags

    def upload(self, paths) -> None:
        self.folder.mkdir(exist_ok=True)
        for path in paths:
            (self.folder / path.name).write_bytes(path.read_bytes())

    def done(self) -> Done:
        return Done(self.run_id, {point.name: point.value for point in self.points}, lambda: self.folder, self.tags)


class ListStore:
    """Runs in a list, in the order in which they began."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.reused, self.seen = folder, [], [], 0

    def find(self, tags) -> Done | None:
        finished = [run for run in self.runs if run.status == "finished" and tags.items() <= run.tags.items()]
        return finished[-1].done() if finished else None

    @contextmanager
    def open(self, stage, experiment, digest):
        run = ListedRun(len(self.runs), stage, self.folder)
        self.runs.append(run)
        run.status = "failed"
        yield run
        run.status = "finished"

    def link(self, run_id) -> str:
        return f"runs/{run_id}"

    def reuse(self, stage, experiment, done) -> None:
        self.reused.append(stage)

    def ran(self) -> list[str]:
        """What was begun since the last call, with how it ended if not well."""
        new, self.seen = self.runs[self.seen :], len(self.runs)
        return [run.stage if run.status == "finished" else f"{run.stage} {run.status}" for run in new]


# Toy stages. Each writes the names of all stages that its result goes back to, and how often it was begun.


def write(name: str, experiment: Experiment, out: Path, log, folders: dict[str, Path]) -> dict[str, float]:
    history, begun = History(out, log), out / STATE / "begun"
    before = " ".join(f"({(folder / 'text').read_text()})" for folder in folders.values())
    BEFORE.get(name, lambda: None)()
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(begun.read_text() + "." if begun.exists() else ".")
    history(Point(f"{name}/points", 1.0, len(begun.read_text())))
    AFTER.get(name, lambda: None)()
    (out / "text").write_text(f"{name}{begun.read_text()} {before}".strip())
    return {name: float(experiment.seed)}


def network(experiment, out, log):
    return write("network", experiment, out, log, {})


def collection(experiment, out, log, *, network=None):
    return write("collection", experiment, out, log, {"network": network} if network else {})


def generator(experiment, out, log, *, collection):
    return write("generator", experiment, out, log, {"collection": collection})


def evaluate(experiment, out, log, *, collection, generator):
    (out / "report.html").write_text("report")
    (out / "verdict.md").write_text("verdict")
    return write("evaluate", experiment, out, log, {"collection": collection, "generator": generator})


BEFORE: dict[str, object] = {}  # stage -> what happens before it leaves anything to resume from
AFTER: dict[str, object] = {}  # and before it ends


@pytest.fixture(autouse=True)
def toys(monkeypatch, tmp_path):
    def toy(name: str, *reads: str, **options) -> Stage:
        return Stage(f"{__name__}:{name}", reads, **{"decided_by": digests.sections("seed"), **options})

    table = {
        "network": toy("network", exists=lambda experiment: not experiment.prepare.source, part_of=("collection",)),
        "collection": toy("collection", "network"),
        "generator": toy("generator", "collection", decided_by=digests.sections("diffusion")),
        "evaluate": toy("evaluate", "collection", "generator", decided_by=digests.sections("evaluate")),
    }
    monkeypatch.setattr(stages, "STAGES", table)
    monkeypatch.setenv("PDIFF_WORK", str(tmp_path / "work"))
    BEFORE.clear()
    AFTER.clear()


@pytest.fixture
def store(tmp_path) -> ListStore:
    return ListStore(tmp_path)


def experiment(**sections) -> Experiment:
    return schema.experiment({"dataset": {"name": "digits"}, "network": {"architecture": "mlp"}} | sections)


def left(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "work").glob("*/"))


def fail(error: type[BaseException]):
    def raises():
        raise error("here")

    return raises


WHOLE = "evaluate. (collection. (network.)) (generator. (collection. (network.)))"


def test_stages_run_in_order_once_each(store, tmp_path):
    done = engine.main(experiment(seed=3), store)
    assert store.ran() == ["main", "network", "collection", "generator", "evaluate"]
    assert (done.folder / "text").read_text() == WHOLE
    assert done.metrics.items() >= dict.fromkeys(("network", "collection", "generator", "evaluate"), 3.0).items()
    parent, *others = store.runs
    assert parent.tags.items() >= {f"pdiff.{run.stage}_run": run.run_id for run in others}.items()
    assert (parent.folder / "report.html").exists() and parent.done().metrics == done.metrics
    assert (others[0].folder / "history.csv").exists() and not (others[0].folder / STATE).exists()
    assert not left(tmp_path)


def test_what_is_missing_runs_inside_the_stage_that_reads_it(store):
    Pipeline(experiment(), store).execute("generator")
    assert store.ran() == ["generator", "collection", "network"]


def test_what_is_finished_is_reused(store):
    first = engine.main(experiment(), store)
    second = engine.main(experiment(generate={"batch_size": 3}), store)  # which changes no result
    assert store.ran() == ["main", "network", "collection", "generator", "evaluate", "main"]
    assert store.reused == ["network", "collection", "generator", "evaluate"]
    assert second.metrics == first.metrics and second.folder == first.folder
    engine.main(experiment(diffusion={"width": 7}), store)
    assert store.ran() == ["main", "generator", "evaluate"]
    Pipeline(experiment(), store).execute("evaluate")
    assert store.ran() == []


def test_what_a_process_leaves_that_is_killed_once_its_run_is_finished_is_removed(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_clear", lambda digest: None)
        engine.main(experiment(), store)
    assert len(left(tmp_path)) == 4
    engine.main(experiment(), store)
    assert store.ran().count("evaluate") == 1 and not left(tmp_path)


def test_known_stages_of_another_experiment_are_taken(store):
    some = Pipeline(experiment(), store)
    some.execute("generator")
    Pipeline(experiment(evaluate={"noise": []}), store, known=some.known).execute("evaluate")
    assert store.ran() == ["generator", "collection", "network", "evaluate"] and store.reused == []


def test_a_stage_that_an_experiment_does_not_have_is_left_out(store):
    done = engine.main(experiment(prepare={"source": "folder"}), store)
    assert store.ran() == ["main", "collection", "generator", "evaluate"]
    assert (done.folder / "text").read_text() == "evaluate. (collection.) (generator. (collection.))"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError])
def test_a_stage_that_failed_late_resumes(store, tmp_path, error):
    AFTER["collection"] = fail(error)
    with pytest.raises(error):
        engine.main(experiment(), store)
    assert store.ran() == ["main failed", "network", "collection failed"]
    assert len(left(tmp_path)) == 1
    AFTER.clear()
    done = engine.main(experiment(), store)
    assert store.ran() == ["main", "collection", "generator", "evaluate"] and store.reused == ["network"]
    assert (done.folder / "text").read_text() == WHOLE.replace("collection.", "collection..")
    resumed = next(run for run in store.runs if run.stage == "collection" and run.status == "finished")
    assert [p.step for p in resumed.points if p.name == "collection/points"] == [1, 2], "its curve is whole"
    assert not left(tmp_path)


@pytest.mark.parametrize(("error", "late"), [(UserError, False), (Pruned, True)])
def test_nothing_is_kept_of_a_stage_that_will_not_resume(store, tmp_path, error, late):
    (AFTER if late else BEFORE)["collection"] = fail(error)
    with pytest.raises(error):
        engine.main(experiment(), store)
    assert not left(tmp_path)


def test_fresh_repeats_a_stage_and_its_part_alone(store):
    engine.main(experiment(), store)
    store.ran()
    Pipeline(experiment(), store).execute("generator", fresh=True)
    assert store.ran() == ["generator"] and store.reused == ["collection"]
    Pipeline(experiment(), store).execute("collection", fresh=True)
    assert store.ran() == ["collection", "network"]
    engine.main(experiment(), store, fresh=True)
    assert store.ran() == ["main", "network", "collection", "generator", "evaluate"]


def test_fresh_forgets_an_interrupted_attempt(store):
    AFTER["network"] = fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(experiment(), store).execute("network")
    AFTER.clear()
    assert (Pipeline(experiment(), store).execute("network", fresh=True).folder / "text").read_text() == "network."


def test_results_of_an_older_upstream_are_not_reused(store):
    """After a collection was repeated, a generator of the older one is not taken for one of the newer."""
    engine.main(experiment(), store)
    Pipeline(experiment(), store).execute("collection", fresh=True)
    store.ran()
    engine.main(experiment(), store)
    assert store.ran() == ["main", "generator", "evaluate"]
    assert store.runs[-2].tags["pdiff.collection_run"] == store.find({"pdiff.stage": "collection"}).run_id
    engine.main(experiment(), store)
    assert store.ran() == ["main"]


def test_work_on_an_older_upstream_is_not_resumed(store, tmp_path):
    AFTER["generator"] = fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(experiment(), store).execute("generator")
    AFTER.clear()
    Pipeline(experiment(), store).execute("collection", fresh=True)
    done = Pipeline(experiment(), store).execute("generator")
    assert (done.folder / "text").read_text().startswith("generator. ")
    assert not left(tmp_path)


def invert(path: Path) -> None:
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


DAMAGE = {
    "inverted": ("text", invert),
    "cut": ("text", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "longer": ("text", lambda path: path.write_bytes(path.read_bytes() + b" ")),
    "deleted": ("text", Path.unlink),
    "manifest changed": (MANIFEST, lambda path: path.write_text("{}")),
    "manifest deleted": (MANIFEST, Path.unlink),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(("stage", "repeated"), [("network", 4), ("collection", 3), ("generator", 2), ("evaluate", 1)])
def test_damage_is_noticed_and_repaired(store, capsys, stage, repeated, how):
    engine.main(experiment(), store)
    name, spoil = DAMAGE[how]
    damaged = next(run for run in store.runs if run.stage == stage).folder / name
    spoil(damaged)
    store.ran()
    engine.main(experiment(), store, repair=True)
    order = ["network", "collection", "generator", "evaluate"]
    assert store.ran() == ["main", *order[4 - repeated :]]
    assert f"warning: {damaged}: " in capsys.readouterr().out
    assert (store.find({"pdiff.stage": "evaluate"}).folder / "text").read_text() == WHOLE
    engine.main(experiment(), store, repair=True)
    assert store.ran() == ["main"]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("stage", ["collection", "generator", "evaluate"])
def test_what_is_damaged_is_not_read(store, tmp_path, stage, how):
    engine.main(experiment(), store)
    name, spoil = DAMAGE[how]
    damaged = next(run for run in store.runs if run.stage == stage).folder / name
    spoil(damaged)
    store.ran()
    with pytest.raises(Damaged) as caught:
        engine.main(experiment(**({} if stage == "evaluate" else {"evaluate": {"noise": []}})), store)
    assert caught.value.path == damaged and "the same command with --repair" in str(caught.value)
    assert store.ran() == (["main failed"] if stage == "evaluate" else ["main failed", "evaluate failed"])
    assert not left(tmp_path)


def test_the_command_that_heals(store):
    """It names the tag, what was changed, and the stage that a user can repeat."""
    changed = config.load("digits_mlp", {"diffusion.steps": "5", "prepare.collect.checkpoints": "7"})
    for stage, command in (("generator", "generator"), ("network", "collection")):
        Pipeline(changed, store).execute("evaluate")
        done = Pipeline(changed, store)._find(stage)
        words = "--tag digits_mlp --prepare.collect.checkpoints 7 --diffusion.steps 5 --fresh"
        assert done.remedy().startswith(f"`pdiff {command} {words}` or the same command with --repair")


def test_a_state_that_cannot_be_read_is_dropped(store, tmp_path, capsys):
    AFTER["collection"] = fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(experiment(), store).execute("collection")
    (work,) = left(tmp_path)

    def read():
        if (work / STATE / "begun").exists():
            raise Damaged(work / STATE / "begun", "is truncated")

    AFTER.clear()
    BEFORE["collection"] = read
    done = Pipeline(experiment(), store).execute("collection")
    assert (done.folder / "text").read_text() == "collection. (network.)", "from its beginning"
    assert f"warning: {work / STATE / 'begun'}: is truncated; dropped" in capsys.readouterr().out


def test_other_files_that_cannot_be_read_are_errors(store, tmp_path):
    def read():
        raise Damaged(tmp_path / "elsewhere", "is truncated")

    BEFORE["collection"] = read
    with pytest.raises(Damaged, match=r"elsewhere: is truncated$"):
        Pipeline(experiment(), store).execute("collection")


def test_two_that_want_the_same_do_it_once(store, capsys):
    begun, proceed, results = threading.Event(), threading.Event(), {}

    def wait():
        begun.set()
        assert proceed.wait(20)

    AFTER["generator"] = wait

    def want(name: str):
        results[name] = Pipeline(experiment(), store).execute("generator").run_id

    threads = [threading.Thread(target=want, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive(), "it waits"
    proceed.set()
    for thread in threads:
        thread.join(20)
    assert results["first"] == results["second"]
    assert store.ran() == ["generator", "collection", "network"] and store.reused == ["generator"]
    assert "waiting for another process" in capsys.readouterr().out


@pytest.mark.slow
def test_the_engine_knows_neither_mlflow_nor_torch():
    code = "import sys, pdiff.tracking.engine; sys.exit(bool({'mlflow', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def hold_often(times: int) -> None:
    """Count, again and again, in a file that two processes at a time would spoil."""
    file = engine.work_folder() / "count"
    for _ in range(times):
        with engine._exclusively("digest", "count"):
            before = int(file.read_text())
            time.sleep(0.001)
            file.write_text(str(before + 1))


@pytest.mark.slow
def test_a_lock_is_removed_and_still_held_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PDIFF_WORK", str(tmp_path))
    monkeypatch.setattr(engine, "LOCK_SECONDS", 0.001)
    (tmp_path / "count").write_text("0")
    workers = [multiprocessing.get_context("fork").Process(target=hold_often, args=(50,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "count").read_text() == "200"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "stages.lock"]
