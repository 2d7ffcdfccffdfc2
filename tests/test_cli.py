"""`python -m serve_app` as far as it runs without Ray: options, refusals, and the state of the models from /ready."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from serve_app import cli
from serve_app.progress import Progress
from serve_app.readiness import waiting_models
from tests.configs import SHIPPED, serve_document

ROOT = Path(__file__).parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", env=variables, check=False)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs the program in this process, and returns what it writes to stderr as it refuses to start."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*options: str) -> str:
        assert cli.main(list(options)) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("serve_app: ")
        return output.err.removeprefix("serve_app: ").removesuffix("\n")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_help_describes_every_option() -> None:
    done = python("-m", "serve_app", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "Run the LLM service on this machine." in text
    assert "Ctrl-C stops the service" in text
    assert "--config CONFIG Ray Serve config file (default: serve_config.yaml)" in text
    assert "--host HOST address to listen on (default: the file's http_options.host)" in text
    assert "--port PORT port to listen on (default: the file's http_options.port)" in text
    assert "--ray-address RAY_ADDRESS auto: the reachable Ray cluster" in text


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8e3", ""])
def test_an_invalid_port_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([f"--port={port}"])
    assert ended.value.code == 2
    assert f"{port} is not a port; use a number from 1 to 65535" in capsys.readouterr().err


def test_a_missing_file_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal("--config", "nowhere.yaml") == (
        "nowhere.yaml: no such file; pass --config with the path of a serve_config.yaml"
    )


def test_a_faulty_file_is_refused_with_every_fault(refusal: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(yaml.safe_dump({**serve_document(runtime_env={}), "sauce": 1}))
    assert refusal("--config", str(path)).splitlines() == [
        f"{path}:",
        "  applications.0.runtime_env: only `serve deploy` honours this key; remove it, or deploy the file with "
        "`serve deploy`",
        "  sauce: unknown key",
    ]


@pytest.mark.parametrize("option", [True, False], ids=["by --port", "by the file"])
def test_a_port_in_use_is_refused(refusal: Callable[..., str], option: bool, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        path = tmp_path / "f.yaml"
        path.write_text(yaml.safe_dump({**serve_document(), "http_options": {"port": port}}))
        options = ["--config", str(SHIPPED), "--port", str(port)] if option else ["--config", str(path)]
        message = refusal(*options)
    assert message.startswith(f"cannot listen on 127.0.0.1:{port}: ")
    assert message.endswith("Address already in use; choose another with --port")


def test_an_address_of_another_machine_is_refused(refusal: Callable[..., str]) -> None:
    message = refusal("--config", str(SHIPPED), "--host", "192.0.2.1", "--port", str(free_port()), "--allow-anonymous")
    assert message.startswith("cannot listen on 192.0.2.1:")


@pytest.mark.parametrize(
    ("host", "prefix", "url"),
    [
        ("127.0.0.1", "/", "http://127.0.0.1:8000"),
        ("0.0.0.0", "/llm", "http://127.0.0.1:8000/llm"),
        ("::", "/", "http://[::1]:8000"),
        ("example.org", "/a/b/", "http://example.org:8000/a/b"),
    ],
)
def test_the_url_is_one_for_this_machine(host: str, prefix: str, url: str) -> None:
    assert cli.Address(host, 8000).url(prefix) == url


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Deploying application default failed:\n  ValueError: no GPU\n\n", "no GPU"),
        ("a\nray.exceptions.RayTaskError: one\nKeyError: other\nat the end", "other"),
        ("serve_app.engines.native.machine.NotEnoughMemory: 1 MiB free", "1 MiB free"),
        ("first\n last \n", "last"),
        ("", "RuntimeError('')"),
    ],
)
def test_the_reason_is_the_line_of_a_report_with_the_cause(text: str, reason: str) -> None:
    assert cli._reason(RuntimeError(text)) == reason


def test_progress_has_a_line_per_change_outside_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for text in ("one", "one", "two"):
        progress.show(text)
    progress.end()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" s] ")[2] for line in lines] == ["one", "two"]


@contextmanager
def server(reply: bytes) -> Iterator[str]:
    """The URL of a server that answers every request with `reply`, and closes the connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.request_line = self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            self.wfile.write(reply if self.request_line.startswith(b"GET /prefix/ready ") else b"")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{service.server_address[1]}/prefix"
        finally:
            service.shutdown()
            thread.join()


def response(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def ready(status: str, **states: tuple[str, str]) -> bytes:
    models = [{"name": name, "state": state, "detail": detail} for name, (state, detail) in states.items()]
    return response(status, json.dumps({"models": models}))


@pytest.mark.parametrize(
    ("reply", "waiting"),
    [
        (ready("200 OK", a=("ready", ""), b=("asleep", "")), []),
        (ready("200 OK", a=("ready", ""), b=("loading", "loading weights")), ["b: loading weights"]),
        (ready("503 Service Unavailable", a=("loading", ""), b=("failed", "no file")), ["a: loading", "b: no file"]),
        (ready("200 OK", a=("ready", ""), b=("ready", ""), other=("loading", "")), []),
        (ready("200 OK", a=("ready", "")), None),
        (response("500 Internal Server Error", "<html>"), None),
        (response("200 OK", "[]"), None),
        (response("200 OK", '{"models": [{"name": "a"}]}'), None),
        (response("200 OK", '{"models": null}'), None),
        (response("200 OK", "\x00"), None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", None),
        (b"garbage\r\n\r\n", None),
        (b"\xff" * 100_000, None),
        (b"", None),
    ],
    ids=[
        "all can serve",
        "one loads",
        "all wait",
        "another model",
        "a model is missing",
        "HTML",
        "a list",
        "no state",
        "null",
        "no JSON",
        "a part of the body",
        "no HTTP",
        "a long line",
        "nothing",
    ],
)
def test_the_waiting_models_are_read_from_ready(reply: bytes, waiting: list[str] | None) -> None:
    with server(reply) as url:
        assert waiting_models(url, ["a", "b"]) == waiting


def test_without_a_server_the_state_is_unknown() -> None:
    assert waiting_models(f"http://127.0.0.1:{free_port()}", ["a"]) is None


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert waiting_models(f"http://127.0.0.1:{silent.getsockname()[1]}", ["a"]) is None


def test_the_proxy_of_the_environment_is_not_used() -> None:
    program = "import sys; from serve_app.readiness import waiting_models; print(waiting_models(sys.argv[1], ['a']))"
    proxy = f"http://127.0.0.1:{free_port()}"
    variables = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), proxy)
    with server(ready("503 Service Unavailable", a=("loading", "loading weights"))) as url:
        done = python("-c", program, url, **variables, no_proxy="", NO_PROXY="")
    assert (done.stdout, done.stderr) == ("['a: loading weights']\n", "")
