"""Whether a server is reached, as MLflow's own settings say."""

import http.server
import shutil
import ssl
import subprocess
import threading

import pytest

from pdiff.errors import UserError
from pdiff.tracking import store


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
    """An HTTPS server on this machine whose certificate, `certificate.pem`, nobody knows."""
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


def test_a_server_of_a_private_certificate_is_reached_where_mlflow_is_told_of_it(address, tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=rf"^MLFLOW_TRACKING_URI {address}: no answer \(SSLError\)$"):
        store.reach(address)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "certificate.pem"))
    store.reach(address)
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    store.reach(address)


def test_a_server_that_is_absent():
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI http://127\.0\.0\.1:1: no answer \(ConnectionError\)$"):
        store.reach("http://127.0.0.1:1")
