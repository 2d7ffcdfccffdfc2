"""Runs a server in a process group of its own, and ends all processes that it has started."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Self

import psutil

from perf.engines.launch import MODEL, Launch, LaunchError
from perf.formatting import clean, shorten
from perf.progress import LiveLine

_POLL_S = 0.5
_REQUEST_TIMEOUT_S = 60
# At the end: for the main process; for processes that it has asked to end, which remove their shared memory; for kills.
_STOP_S, _GRACE_S, _KILL_S = 90, 5, 10
_STOP_POLL_S = 0.05
_LOG_LINES = 15
_LINE = 90
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Every signal that asks this process to end raises KeyboardInterrupt, also if the shell has set it to ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C would leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A free port between those of Ray's workers and those that the system assigns."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class ServerProcess:
    """The context of a running server, with its output in `log`.

    `prepare` gets a port and an empty folder, which is the server's working directory, and returns its command.
    """

    def __init__(self, prepare: Callable[[int, Path], Launch], log: Path) -> None:
        self._prepare = prepare
        self._log = log
        self._seen: dict[int, psutil.Process] = {}
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        # A short path: sockets in it have paths of at most 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="pe"))
        self.launch = self._prepare(free_port(), self._folder)
        try:
            self._process = self._start()
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise LaunchError(f"{self.launch.server} cannot be started: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            self._stop()
            shutil.rmtree(self._folder, ignore_errors=True)

    def wait_until_ready(self, timeout_s: float, line: LiveLine) -> float:
        """Waits for the first answer; returns the seconds since the start.

        Raises LaunchError if the server ends or the time is over.
        """
        name, shown = self.launch.server, 0.0
        while not self._answers():
            elapsed = time.monotonic() - self.started
            if self._process.poll() is not None:
                raise LaunchError(f"{name} ended with exit code {self._process.returncode}:\n{self.last_lines()}")
            if elapsed > timeout_s:
                raise LaunchError(f"{name} did not answer within {timeout_s:.0f} s:\n{self.last_lines()}")
            if elapsed - shown >= line.interval_s:
                line.show(f"{name}: starting, {elapsed:.0f} s: {self._last_line()}")
                shown = elapsed
            self._processes()
            time.sleep(_POLL_S)
        return time.monotonic() - self.started

    def cpu_seconds(self) -> float:
        """Processor time that the server's running processes have used so far."""
        total = 0.0
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def last_lines(self) -> str:
        """The end of the log, and where the rest is."""
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"the whole log: {self._log}"])

    def _last_line(self) -> str:
        """The last line of the log, short and printable."""
        lines = self._log.read_text(errors="replace").split("\n")
        return shorten(clean(next((line.strip() for line in reversed(lines) if line.strip()), "")), _LINE)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                self.launch.command,
                cwd=self._folder,
                env={**os.environ, **self.launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """Whether the server has answered a request for one token."""
        body = json.dumps({"model": MODEL, "prompt": "The", "max_tokens": 1}).encode()
        url = f"{self.launch.url}/v1/completions"
        request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310 (http)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_REQUEST_TIMEOUT_S) as response:
                return bool(response.status == 200 and response.read())
        except (OSError, HTTPException):  # it does not listen yet, or it is not ready
            return False

    def _processes(self) -> list[psutil.Process]:
        """All processes of the server seen so far that still run. Some, such as Ray's, have groups of their own."""
        if self._process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                main = psutil.Process(self._process.pid)
                for process in [main, *main.children(recursive=True)]:
                    self._seen[process.pid] = process
        return [process for process in self._seen.values() if _runs(process)]

    def _stop(self) -> None:
        """Asks the server to end, and kills the processes that are left."""
        self._processes()
        if self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_STOP_S)
        self._wait_for_end(_GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._wait_for_end(_KILL_S)
        self._process.wait()

    def _wait_for_end(self, timeout_s: float) -> None:
        """Returns when none of the server's processes runs any more, at the latest after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._processes() and time.monotonic() < deadline:
            time.sleep(_STOP_POLL_S)


def _runs(process: psutil.Process) -> bool:
    """psutil recognizes a process id that the system has assigned again."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
