"""The command `python -m serve_app batch` against the application behind a socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from serve_app import batch_cli
from serve_app.database_config import DatabaseOptions
from tests.api.scripted import ScriptedEngine, chunk
from tests.jobs.service import chat_line, process

ROOT = Path(__file__).parents[1]


class Running:
    """The application in a thread. `engine` can be given other scripts."""

    def __init__(self, folder: Path) -> None:
        self.engine = ScriptedEngine()
        self._database = DatabaseOptions(url=f"sqlite:///{folder}/jobs.db")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()

    async def _serve(self) -> None:
        async with process(self._database, self.engine) as one:
            app = one.http._transport.app  # type: ignore[attr-defined]
            config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=0)
            self._server = uvicorn.Server(config)
            self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            await self._server.serve(sockets=[self._listening])

    def wait_for_request(self) -> None:
        """Returns when the engine has a request."""
        end = time.monotonic() + 10
        while not self.engine.requests:
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    service = Running(tmp_path)
    yield service
    service.stop()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(chat_line(number)) + "\n" for number in range(50)))
    return file


def test_submit_waits_and_writes_the_answers(running: Running, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_cli.main(["submit", str(lines), "--url", running.url]) == 0
    answers = [json.loads(line) for line in lines.with_suffix(".answers.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(50)]
    out, err = capsys.readouterr()
    assert "50 of 50 lines answered" in err
    assert "answers:" in out


def test_a_batch_is_submitted_looked_at_fetched_and_listed(
    running: Running, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch_cli.main(["submit", str(lines), "--no-wait", "--url", running.url]) == 0
    batch = capsys.readouterr().out.strip()
    assert batch_cli.main(["status", batch, "--wait", "--url", running.url]) == 0
    assert "completed" in capsys.readouterr().out
    output = tmp_path / "out.jsonl"
    assert batch_cli.main(["fetch", batch, "--output", str(output), "--url", running.url]) == 0
    assert len(output.read_text().splitlines()) == 50
    capsys.readouterr()
    assert batch_cli.main(["list", "--url", running.url]) == 0
    assert capsys.readouterr().out.startswith(batch)


def test_a_cancelled_batch_has_a_file_of_errors(
    running: Running, lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.engine.plays(None)
    batch_cli.main(["submit", str(lines), "--no-wait", "--url", running.url])
    batch = capsys.readouterr().out.strip()
    assert batch_cli.main(["fetch", batch, "--url", running.url]) == 1
    assert "status --wait" in capsys.readouterr().err
    running.wait_for_request()
    assert batch_cli.main(["cancel", batch, "--url", running.url]) == 0
    assert batch_cli.main(["status", batch, "--wait", "--url", running.url]) == 0
    output = tmp_path / "out.jsonl"
    assert batch_cli.main(["fetch", batch, "--output", str(output), "--url", running.url]) == 1
    assert not output.exists()
    assert len(output.with_suffix(".errors.jsonl").read_text().splitlines()) == 50


def test_a_refused_file_is_explained(running: Running, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines.write_text(lines.read_text() + json.dumps(chat_line(0)))
    assert batch_cli.main(["submit", str(lines), "--url", running.url]) == 1
    err = capsys.readouterr().err
    assert "line 51: An earlier line has the same 'custom_id'." in err
    assert "submit it again" in err


def test_ctrl_c_leaves_the_batch_running(running: Running, lines: Path) -> None:
    running.engine.plays(0.1, chunk(["ok"]))
    command = [sys.executable, "-m", "serve_app", "batch", "submit", str(lines), "--url", running.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=lines.parent) as program:
        assert program.stderr is not None
        assert b"is submitted" in program.stderr.readline()
        time.sleep(0.5)  # the bar is shown
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=20)
    text = err.decode()
    assert program.returncode == 130, text
    assert "goes on" in text
    batch = text.partition("status --wait ")[2].split()[0]
    assert batch_cli.main(["status", batch, "--wait", "--url", running.url]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "batch_x", "--url", "http://127.0.0.1:1"], "set the address with --url"),
        (["status", "batch_x", "--url", "nonsense"], "set the address with --url"),
        (["submit", "absent.jsonl"], "cannot be read"),
    ],
)
def test_an_error_says_what_to_do(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_cli.main(words) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_batch_is_an_error(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch_cli.main(["cancel", "batch/../x", "--url", running.url]) == 1
    assert "does not exist" in capsys.readouterr().err
