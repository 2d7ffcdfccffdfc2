"""TLS at HAProxy, with its real program and a certificate of our own."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serve_app.cli import StartError, _check_certificate
from serve_app.deployments import haproxy

CONFIGURATION = """global
    log stdout format raw local0 info
defaults
    mode http
    timeout client 10s
    timeout connect 10s
    timeout server 10s
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend http-serve_app
backend http-serve_app
    server one 127.0.0.1:{backend}
"""


def write_certificate(path: Path) -> None:
    """A certificate for `localhost`, signed by itself, with its key in the same file."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]),
    )
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.headers.get("authorization", "").encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *about: object) -> None:
        """Write no log."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "a certificate.pem"
    write_certificate(path)
    return path


@pytest.fixture(scope="module")
def port(certificate: Path) -> Iterator[int]:
    """The port of HAProxy in front of a server that repeats the header `authorization`."""
    binary = haproxy.find()
    assert binary is not None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    written = CONFIGURATION.format(port=port, backend=server.server_address[1])
    file = certificate.parent / "haproxy.cfg"
    file.write_text(haproxy.restricted(written, {haproxy.TLS_CERTIFICATE: str(certificate)}))
    process = subprocess.Popen([binary, "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    end = time.monotonic() + 10
    while not listens(port):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    yield port
    process.kill()
    process.wait(10)
    server.shutdown()
    server.server_close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_client_that_checks_the_certificate_is_served(port: int, certificate: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate))
    with httpx.Client(verify=trusted, trust_env=False) as client:
        answer = client.get(f"https://localhost:{port}/", headers={"authorization": "Bearer x"})
    assert (answer.status_code, answer.text) == (200, "Bearer x")
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        client.get(f"https://localhost:{port}/")


def test_a_key_is_never_taken_without_tls(port: int) -> None:
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.RemoteProtocolError):
        client.get(f"http://localhost:{port}/", headers={"authorization": "Bearer x"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused(port: int) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, pytest.raises(ssl.SSLError):
        old.wrap_socket(connection)


def test_a_file_that_is_no_certificate_is_refused(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_certificate(str(certificate))
    _check_certificate(None)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("x")
    for path in (wrong, tmp_path / "missing.pem"):
        with pytest.raises(StartError, match="is no PEM file"):
            _check_certificate(str(path))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    with pytest.raises(StartError, match="needs HAProxy"):
        _check_certificate(str(certificate))
