"""Whether a server is reached, as MLflow's settings say; and which runs the engine finds in MLflow."""

import http.server
import os
import shutil
import signal
import ssl
import subprocess
import threading
from unittest.mock import Mock

import mlflow
import pytest
from tracked import artifacts, runs

from pdiff.errors import Failure
from pdiff.experiment import schema
from pdiff.method.log import Point
from pdiff.parallel.interrupts import uninterrupted
from pdiff.tracking import database, store
from pdiff.tracking import runs as tracked_runs


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers every question with OK."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path):
    """An HTTPS server on this machine whose certificate, `certificate.pem`, is self-signed."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_a_server_with_a_private_certificate_is_reached_as_mlflows_settings_say(address, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(Failure, match=rf"^MLFLOW_TRACKING_URI {address}: no answer \(SSLError\)$"):
        database.reach()
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "certificate.pem"))
    database.reach()
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    database.reach()


TAGS = {"pdiff.stage": "train", "pdiff.digest": "1", "pdiff.prepare_run": "a"}


@pytest.fixture
def kept(workspace):
    """The store of a workspace, and a function that leaves a run with some tags in it."""
    experiment = schema.experiment({"tag": "tiny", "prepare": {"source": "folder"}})
    (workspace / "text").write_text("result")
    with store.connected() as connected:

        def keep(*, error: BaseException | None = None, **more: str) -> str:
            with connected.open("train", experiment, "1") as run:
                run.tag(TAGS | {f"pdiff.{name}": value for name, value in more.items()})
                for step in (2, 1, 3):
                    run.log(Point("fit/loss", 1 / step, step))
                run.upload([workspace / "text"])
                if error:
                    raise error
            return run.run_id

        yield connected, keep


@pytest.mark.slow
def test_the_latest_finished_run_with_all_tags_is_found(kept):
    connected, keep = kept
    assert connected.find(TAGS) is None
    run_ids = [keep(), keep(), keep(prepare_run="b"), keep(digest="2"), keep(reused="1")]
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            keep(error=error)
    found = connected.find(TAGS)
    assert found.run_id == run_ids[1] and (found.folder / "text").read_text() == "result"
    assert found.metrics == {"fit/loss": 1 / 3}
    assert connected.find(TAGS | {"pdiff.prepare_run": "b"}).run_id == run_ids[2]
    assert [run.info.status for run in runs("train")] == ["FINISHED"] * 5 + ["FAILED", "KILLED"]


@pytest.mark.slow
def test_a_local_store_gets_links_to_large_files_and_copies_of_others(kept, workspace, monkeypatch):
    """Also of files in folders; where there are no links, copies of all."""
    monkeypatch.setattr(tracked_runs, "LINKED_BYTES", 5)
    (workspace / "folder" / "inner").mkdir(parents=True)
    written = [workspace / "large", workspace / "folder" / "small", workspace / "folder" / "inner" / "large"]
    for path in written:
        path.write_text("12345" if path.name == "large" else "1234")
    connected, _ = kept
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", Mock(side_effect=OSError))
        with connected.open("train", schema.experiment({"prepare": {"source": "folder"}}), "1") as run:
            run.upload([workspace / "large", workspace / "folder"])
        for path in written:
            kept_file = run.done().folder / path.relative_to(workspace)
            assert kept_file.read_text() == path.read_text()
            assert path.samefile(kept_file) == (links and path.name == "large")


@pytest.mark.slow
def test_a_run_without_its_artifacts_is_not_found(kept):
    connected, keep = kept
    run_ids = [keep(), keep()]
    shutil.rmtree(artifacts(mlflow.get_run(run_ids[1])))
    assert connected.find(TAGS).run_id == run_ids[0]


@pytest.mark.slow
def test_a_run_knows_its_metrics_as_they_are_found_later(kept):
    connected, _ = kept
    with connected.open("train", schema.experiment({"prepare": {"source": "folder"}}), "1") as run:
        run.tag(TAGS)
        for step in range(250):  # several batches
            run.log(Point("fit/loss", 1.0 + step, step))
        run.log(Point("fit/loss", 7.0, 3))  # an earlier step
    assert run.done().metrics == connected.find(TAGS).metrics == {"fit/loss": 250.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_the_store_has_answered(number):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    steps = []
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            os.kill(os.getpid(), number)
            steps.append(sum(range(100_000)))  # Python looks for signals meanwhile
        assert len(steps) == 1 and signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
