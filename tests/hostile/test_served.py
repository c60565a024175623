"""Hostile tries at the registered generator, at what names a run, and at exported files."""

import fcntl
import os
import pty
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from elsewhere import HIDE
from forked import Command
from hostile import Try, answered
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from pdiff.cli.main import main
from pdiff.experiment import export, schema
from pdiff.method.collection import Collection
from pdiff.method.generators import GaussianOptions
from pdiff.method.generators.base import Generator
from pdiff.tracking import models

GENERATOR = {"tag": "tiny", "prepare": {"source": "folder"}, "generator": {"kind": "gaussian"}}


def collection(count: int = 6) -> Collection:
    """Networks with a tensor of every kind that a state dict has."""
    g = torch.Generator().manual_seed(0)
    return Collection(
        {
            "layer.weight": torch.randn(count, 3, 2, generator=g),
            "half": torch.randn(count, 4, generator=g).bfloat16(),
            "double": torch.randn(count, 2, generator=g).double(),
            "steps": torch.arange(count) + 2**40,
        }
    )


@pytest.fixture(scope="module")
def logged(tracking_store, tmp_path_factory):
    """A generator, and the folder of the MLflow model that was logged of it."""
    folder = tmp_path_factory.mktemp("model")
    generator = Generator.fit(collection(), GaussianOptions())
    generator.save(folder / "generator")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "mlflow.db").write_bytes(tracking_store.read_bytes())
        mlflow.set_experiment("pdiff")
        with mlflow.start_run():
            models.log(schema.experiment({**GENERATOR, "log_models": False}), folder / "generator")
        (found,) = mlflow.search_logged_models(output_format="list")
    mlflow.set_tracking_uri(None)
    return generator, Path(found.artifact_location)


@pytest.fixture(scope="module")
def loaded(logged):
    """The same, loaded where pdiff is installed; the folders that modules are imported from are as before."""
    before = list(sys.path)
    model = mlflow.pyfunc.load_model(str(logged[1]))
    assert sys.path == before
    return model


def same(found: dict, expected: Collection) -> bool:
    """Whether arrays, or the lists that JSON makes of them, are the networks of a collection, to the last bit."""
    return list(found) == list(expected.tensors) and all(
        torch.equal(torch.as_tensor(np.asarray(found[name])).to(tensor.dtype), tensor)
        for name, tensor in expected.tensors.items()
    )


@pytest.mark.slow
def test_every_row_is_answered(logged, loaded):
    rows = [(2, 0), (1, 7), (3, 0), (1, 2**60)]
    answers = loaded.predict(pd.DataFrame(rows, columns=["count", "seed"])[["seed", "count"]])
    assert len(answers) == len(rows)
    assert all(same(answer, logged[0].sample(n, seed=seed)) for answer, (n, seed) in zip(answers, rows, strict=True))
    assert same(loaded.predict(pd.DataFrame({"count": [2.0], "seed": [3]}))[0], logged[0].sample(2, seed=3))


@pytest.mark.slow
def test_more_networks_than_are_sampled_at_a_time(logged, loaded):
    (answer,) = loaded.predict(pd.DataFrame({"count": np.array([600], np.float32), "seed": [5]}))
    for name, tensor in logged[0].sample(600, seed=5).tensors.items():
        torch.testing.assert_close(torch.from_numpy(answer[name]).to(tensor.dtype), tensor)


@pytest.mark.slow
def test_the_signature_tells_what_goes_in_and_what_comes_out(loaded):
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == signature.inputs.required_input_names() == ["count", "seed"]
    outputs = {column.name: str(column.type) for column in signature.outputs}
    assert outputs == {
        "layer.weight": "Array(Array(Array(float)))",
        "half": "Array(Array(float))",
        "double": "Array(Array(double))",
        "steps": "Array(long)",
    }


WRONG = {
    "count 0": ({"count": [0], "seed": [0]}, "row 0: count is 0, expected a whole number >= 1"),
    "count -1": ({"count": [-1], "seed": [0]}, "row 0: count is -1, expected a whole number >= 1"),
    "count 2.7": ({"count": [2.7], "seed": [0]}, "row 0: count is 2.7, expected a whole number >= 1"),
    "count NaN": ({"count": [np.nan], "seed": [0]}, "row 0: count is nan, expected"),
    "count infinite": ({"count": [np.inf], "seed": [0]}, "row 0: count is inf, expected"),
    "count of letters": ({"count": ["many"], "seed": [0]}, "row 0: count is 'many', expected"),
    "count of digits": ({"count": ["2"], "seed": [0]}, "row 0: count is '2', expected"),
    "count True": ({"count": [True], "seed": [0]}, "row 0: count is True, expected"),
    "count absent": ({"count": [None], "seed": [0]}, "row 0: count is None, expected"),
    "count of lists": ({"count": [[2]], "seed": [0]}, "row 0: count is [2], expected"),
    "seed -1": ({"count": [1], "seed": [-1]}, "row 0: seed is -1, expected a whole number >= 0"),
    "seed 0.5": ({"count": [1], "seed": [0.5]}, "row 0: seed is 0.5, expected a whole number >= 0"),
    "second row": ({"count": [1, 0], "seed": [0, 0]}, "row 1: count is 0, expected"),
    "no row": ({"count": [], "seed": []}, "no rows, expected at least one"),
    "no seed": ({"count": [1]}, "missing inputs ['seed']"),
    "no count, and one more": ({"n": [1], "seed": [1]}, "missing inputs ['count']. Note that there were extra inputs"),
    "too many": ({"count": [10**15], "seed": [0]}, "count: 1000000000000000 networks, expected at most "),
    "too many of many": ({"count": [1, 10**15], "seed": [0, 0]}, "bytes of memory are free"),
    "too many together": ({"count": [10**15, 10**15], "seed": [0, 0]}, "count: 2000000000000000 networks"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("frame", "says"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused(frame, says, loaded):
    with pytest.raises(MlflowException) as raised:
        loaded.predict(pd.DataFrame(frame))
    assert raised.value.get_http_status_code() == 400
    assert says in raised.value.message.splitlines()[-1] and len(raised.value.message) < 500


@pytest.mark.slow
def test_other_columns_change_nothing(logged, loaded):
    (answer,) = loaded.predict(pd.DataFrame({"count": [2], "seed": [1], "first": [5]}))
    assert same(answer, logged[0].sample(2, seed=1))


INSTALLED = """
import sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import pdiff.experiment.config
assert sys.argv[1] not in pdiff.__file__
print(len(model.predict({"count": [1, 1], "seed": [0, 1]})))
"""
NOT_INSTALLED = """
sys.path.append(sys.argv[2])  # has an empty folder `pdiff`
import mlflow
sys.modules.pop("pdiff", None)  # MLflow has tried to load the plugin
model = mlflow.pyfunc.load_model(sys.argv[1])
import pdiff
assert sys.argv[1] in pdiff.__file__
print(len(model.predict({"count": [1, 1], "seed": [0, 1]})))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [INSTALLED, HIDE + NOT_INSTALLED], ids=["installed", "not installed"])
def test_the_code_of_a_model_serves_where_pdiff_is_not_installed_and_nowhere_else(program, logged, tmp_path):
    (tmp_path / "pdiff").mkdir()
    command = [sys.executable, "-c", program, str(logged[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@pytest.fixture
def server(logged, tmp_path):
    """The address of `mlflow models serve` in an environment where pdiff cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    absent = subprocess.run([sys.executable, "-c", "import pdiff"], **options, text=True)
    assert "No module named 'pdiff'" in absent.stdout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", str(logged[1]), "--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", *words], **options | {"stdout": log})
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not answers(address):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def answers(address: str) -> bool:
    """Whether a server says that it is ready."""
    try:
        return requests.get(f"{address}/ping", timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.slow
def test_the_model_is_served_where_pdiff_is_not_installed(server, logged):
    def asked(*rows: tuple, columns: tuple = ("count", "seed")) -> requests.Response:
        body = {"dataframe_split": {"columns": columns, "data": rows}}
        return requests.post(f"{server}/invocations", json=body, timeout=60)

    answer = asked((2, 3), (1, 0))
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["predictions"]
    assert same(first, logged[0].sample(2, seed=3)) and same(second, logged[0].sample(1, seed=0))
    for rows, says in {
        ((2.7, 0),): "row 0: count is 2.7, expected a whole number >= 1",
        ((1, 0), (0, 0)): "row 1: count is 0, expected a whole number >= 1",
        (("2", 0),): "row 0: count is '2', expected a whole number >= 1",
        ((None, 0),): "row 0: count is None, expected a whole number >= 1",
        ((10**15, 0),): "expected at most",
    }.items():
        refused = asked(*rows)
        assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        assert says in refused.json()["message"].splitlines()[-1]
    assert "missing inputs ['seed']" in asked((2,), columns=("count",)).json()["message"]


@pytest.fixture(scope="module")
def store_of_runs(tracking_store, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A store of 17 runs, and what names them: ids, and a beginning that several have."""
    folder, ids = tmp_path_factory.mktemp("kept"), {}
    shutil.copy(tracking_store, folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")

    def keep(name: str, stage: str, base: str = "", **tags: str) -> None:
        run = client.create_run("0", tags={"pdiff.stage": stage} | {f"pdiff.{key}": tags[key] for key in tags})
        ids[name] = run.info.run_id
        if base:
            collection().save(folder / name / f"{base}.safetensors")
            client.log_artifacts(run.info.run_id, str(folder / name))
        client.set_terminated(run.info.run_id)

    keep("prepare", "prepare", "checkpoints")
    keep("generate", "generate", "generated")
    keep("main", "main", generate_run=ids["generate"])
    keep("again", "generate", reused=ids["generate"])
    keep("train", "train")
    keep("early", "main")
    keep("emptied", "generate", "generated")
    for file in Path(client.get_run(ids["emptied"]).info.artifact_uri).iterdir():
        file.unlink()
    for number in range(10):  # 17 runs, so that two begin with the same of 16 digits
        keep(f"more{number}", "train")
    firsts = [run_id[0] for run_id in ids.values()]
    return folder / "mlflow.db", ids | {"several": max(firsts, key=firsts.count), "none": ids["main"][:8] + "0" * 24}


@pytest.fixture
def kept(empty_workspace, store_of_runs) -> dict[str, str]:
    """What names the runs in the store of a workspace."""
    shutil.copy(store_of_runs[0], empty_workspace)
    return store_of_runs[1]


def shortest(run_id: str, ids: dict[str, str]) -> str:
    """The shortest beginning that one run alone has."""
    return next(run_id[:k] for k in range(1, 33) if sum(other.startswith(run_id[:k]) for other in ids.values()) == 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "main", "again", "prepare"])
def test_the_beginning_of_an_id_names_a_run(name, kept, capsys):
    ids = {key: run_id for key, run_id in kept.items() if len(run_id) == 32 and key != "none"}
    for k, length in enumerate({len(shortest(kept[name], ids)), 8, 31, 32}):
        assert main(["export", "--run", kept[name][:length], "--out", f"out{k}"]) == 0
        assert capsys.readouterr().out == f"6 networks in out{k}\n"
        base = "checkpoints" if name == "prepare" else "generated"
        assert sorted(os.listdir(f"out{k}")) == [f"{base}_{n:05d}.pth" for n in range(6)]


EXPORT = "export --run {generate} --out out"
TRIES = [
    Try("export --run {several} --out out", 2, ("--run", "runs begin like this", "expected one, such as")),
    Try("export --run {none} --out out", 2, ("--run", "no such run")),
    Try("export --run g0000000 --out out", 2, ("--run g0000000", "0-9, a-f")),
    Try("export --run '' --out out", 2, ("--run", "expected the id of a run")),
    Try("export --run % --out out", 2, ("--run %", "expected the id of a run")),
    Try('export --run "\' OR 1=1 --" --out out', 2, ("--run '", "expected the id of a run")),
    Try("export --run ../{generate} --out out", 2, ("--run ../", "expected the id of a run")),
    Try("export --run {generate}0 --out out", 2, ("--run", "at most 32")),
    Try("export --run {train} --out out", 2, ("a run of train holds no networks", "prepare, generate or main")),
    Try("export --run {early} --out out", 2, ("a run of main holds no networks", "expected one")),
    Try(f"{EXPORT} --index 6", 2, ("--index 6", "0 .. 5")),
    Try(f"{EXPORT} --index -1", 2, ("--index -1", "0 .. 5")),
    Try(f"{EXPORT} --index 0 9999999999999999999999", 2, ("--index 9999999999999999999999", "0 .. 5")),
    Try(f"{EXPORT} --index 2 3 2", 2, ("--index 2", "given 2 times")),
    Try(f"{EXPORT} --index", 2, ("--index", "a value is missing")),
    Try(f"{EXPORT} --index one", 2, ("--index",)),
    Try(f"{EXPORT} --format onnx", 2, ("--format", "onnx", "safetensors")),
    Try("export --run {generate} --out tiny.yaml", 2, ("--out tiny.yaml", "is a file, expected a folder")),
    Try("export --run {generate} --out tiny.yaml/there", 2, ("--out tiny.yaml/there", "is a file")),
    Try("export --run {generate} --out gone", 2, ("--out gone", "is a file"), lambda f: (f / "gone").symlink_to("no")),
]


@pytest.mark.parametrize("tried", TRIES, ids=lambda tried: tried.command)
def test_a_line(tried, empty_workspace, kept, capfd):
    tried.before(empty_workspace)
    before = files(empty_workspace)
    command = tried.command.format(**kept)
    answered(tried._replace(command=command, before=lambda folder: None), empty_workspace, capfd)
    assert files(empty_workspace) == before


def files(folder: Path) -> dict[Path, bytes]:
    """What lies in a folder, except the store and what locks it."""
    found = (path for path in folder.rglob("*") if path.parent.name != ".pdiff" and "mlflow.db" not in path.name)
    return {path: path.read_bytes() if path.is_file() else b"" for path in found if path.name != ".pdiff"}


def test_networks_whose_file_is_gone(kept, capfd):
    assert main(["export", "--run", kept["emptied"], "--out", "out"]) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert "generated.json" in line and "No such file" in line and not Path("out").exists()


def test_files_that_exist_are_kept(kept, empty_workspace, capfd):
    command = ["export", "--run", kept["generate"], "--out", "out", "--format", "safetensors", "--index"]
    (empty_workspace / "out").mkdir()
    (empty_workspace / "out" / "mine").write_text("mine")
    assert main([*command, "3", "4"]) == 0
    before = files(empty_workspace)
    capfd.readouterr()
    assert main([*command, "1", "4", "3"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("pdiff: --out out: generated_00004.safetensors exists, expected")
    assert files(empty_workspace) == before
    assert main([*command, "1", "5"]) == 0
    expected = collection()
    for k in (1, 3, 4, 5):
        found = load_file(empty_workspace / "out" / f"generated_{k:05d}.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected[k].items())
    assert len(os.listdir("out")) == 5


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_full_disk_leaves_nothing(form, tmp_path, monkeypatch):
    """The limit of the process on the size of files takes the place of the disk."""
    written = []

    def limited(path: Path, state: dict) -> None:
        written.append(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if len(written) < 3 else 100, hard))
        try:
            write(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    name = "write_tensors" if form == "safetensors" else "write_state"
    write = getattr(export, name)
    monkeypatch.setattr(export, name, limited)
    with pytest.raises(OSError, match=r"^--out .*/new/out: cannot be written: [^\n]*$"):
        export.export(collection(), "generated", tmp_path / "new" / "out", form=form)
    assert len(written) == 3 and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(kept, empty_workspace, capfd):
    (empty_workspace / "read_only").mkdir(mode=0o500)
    out = "read_only/out" if os.getuid() else "/proc/self/out"  # nothing but such a place is closed to root
    assert main(["export", "--run", kept["generate"], "--out", out]) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pdiff: --out {out}: cannot be written: ")


NOTHING = {
    "compare": (0, "no finished run of main"),
    "leaderboard no_such_tag": (0, "no tag to show"),
    "leaderboard --only ours": (0, "no tag to show"),
    "export --run 9e6b2f8b --out out": (2, "pdiff: --run 9e6b2f8b: no such run, and no tracking store here"),
    "memory no_such_tag": (2, "pdiff: unknown tag"),
}


@pytest.mark.parametrize("command", NOTHING)
def test_a_folder_without_a_store_stays_as_it_is(command, empty_workspace, capfd):
    code, says = NOTHING[command]
    before = files(empty_workspace)
    assert main(command.split()) == code
    printed = capfd.readouterr()
    assert (printed.err if code else printed.out).startswith(says) and "Traceback" not in printed.err
    assert os.listdir(empty_workspace) == ["tiny.yaml"] and files(empty_workspace) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "leaderboard --only ours", "export --run 9e6b2f8b --out out"])
def test_a_store_without_runs(command, workspace, capfd):
    code, says = NOTHING[command]
    assert main(command.split()) == code
    printed = capfd.readouterr()
    assert (printed.err if code else printed.out).startswith(says.partition(",")[0])


@pytest.mark.slow
def test_runs_that_lack_what_pdiff_writes(workspace, capfd):
    client = MlflowClient()
    for tags in ({}, {"pdiff.tag": "digits_mlp"}, {"pdiff.tag": "no_such_tag"}):
        run = client.create_run("0", tags={"pdiff.stage": "main"} | tags)
        client.set_terminated(run.info.run_id)
    assert main(["compare"]) == 0 and main(["leaderboard", "--only", "ours"]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and "no_such_tag" in printed.out


@pytest.mark.slow
def test_nothing_but_pdiffs_lines_without_a_terminal(workspace):
    """The models of a run are logged with it, and registered later, in a run that reuses it."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    environment.pop("TQDM_DISABLE", None)
    for words in (
        ["--log_models", "true"],
        ["--register", "true"],
    ):
        process = Command(workspace, ["main", "--tag", "tiny.yaml", *words], environment, apart=True)
        printed, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        stages = "pretrain|prepare|train|generate|originals|evaluate"
        first, _, _ = printed.partition("\n\n")
        assert all(re.match(rf"({stages}): (run|reusing run) [0-9a-f]{{32}}", line) for line in first.splitlines())
        assert "\r" not in printed and "mlflow.models" not in printed
    assert [version.version for version in mlflow.search_model_versions()] == [1]


BAR = """
import sys
from pdiff.cli.main import main
main(["--version"])
from tqdm import tqdm
sys.exit(sum(tqdm(range(3))))
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_bars_of_other_libraries_are_for_terminals(terminal):
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", BAR], env=environment, stdout=subprocess.DEVNULL, stderr=writer)
    os.write(writer, b"END")
    os.close(writer)
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(reader, 1000)
    os.close(reader)
    assert (done.returncode, b"3/3" in shown) == (3, terminal)
