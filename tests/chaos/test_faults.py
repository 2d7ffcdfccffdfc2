"""The faults do what they say to a program of the test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.chaos import faults

# Two threads count, 256 MB are in use and a port is open. A line in writes a line: both counts and the wall clock.
PROGRAM = """
import socket, sys, threading, time
memory = bytearray(b"x" * 2**28)
counts, ids = [0, 0], [0, 0]
def count(n):
    ids[n] = threading.get_native_id()
    while True:
        counts[n] += 1
        time.sleep(0.001)
for n in range(2):
    threading.Thread(target=count, args=(n,), daemon=True).start()
server = socket.create_server(("127.0.0.1", 0), backlog=100)
time.sleep(0.05)
print(server.getsockname()[1], *ids, flush=True)
for line in sys.stdin:
    if line.startswith("allocate"):
        try:
            more = bytearray(2**26)
            print("got", flush=True)
        except MemoryError:
            print("none", flush=True)
    else:
        print(*counts, time.time(), time.monotonic(), flush=True)
"""


class Counter:
    """The program above."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self.process = psutil.Process(program.pid)
        self._program = program
        self.port, *self.threads = map(int, self._line())

    def ask(self, line: str = "counts") -> list[str]:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{line}\n")
        self._program.stdin.flush()
        return self._line()

    def _line(self) -> list[str]:
        assert self._program.stdout is not None
        return self._program.stdout.readline().split()

    @property
    def counts(self) -> list[int]:
        return [int(word) for word in self.ask()[:2]]


@contextmanager
def started(environment: dict[str, str] | None = None) -> Iterator[Counter]:
    command = [sys.executable, "-c", PROGRAM]
    variables = {**os.environ, **(environment or {})}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=variables, stdin=pipe, stdout=pipe) as program:
        try:
            yield Counter(program)
        finally:
            program.kill()


@pytest.fixture
def counter() -> Iterator[Counter]:
    with started() as counter:
        yield counter


def test_nothing_accepts_connections_after_a_kill(counter: Counter) -> None:
    """The first thread of a killed process is a zombie while the others still hold its port."""
    faults.kill([counter.process])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", counter.port)).close()


def test_a_stopped_process_keeps_its_connections_and_goes_on(counter: Counter) -> None:
    with socket.create_connection(("127.0.0.1", counter.port)) as connection:
        before = sum(counter.counts)
        with faults.stopped([counter.process]):
            assert counter.process.status() == psutil.STATUS_STOPPED
            connection.sendall(b"x")
            time.sleep(0.1)
        assert before <= sum(counter.counts) < before + 100, "the threads counted little meanwhile"
        connection.sendall(b"x")


def test_one_thread_hangs_and_the_others_run_on(counter: Counter) -> None:
    with faults.hung(counter.threads[0]):
        before = counter.counts
        time.sleep(0.1)
        after = counter.counts
        assert after[0] == before[0]
        assert after[1] > before[1]
    time.sleep(0.05)
    assert counter.counts[0] > after[0]


def test_a_process_without_memory_cannot_allocate(counter: Counter) -> None:
    with faults.out_of_memory(counter.process, free_bytes=2**20):
        assert counter.ask("allocate") == ["none"]
    assert counter.ask("allocate") == ["got"]


def test_the_clock_jumps_while_the_monotonic_clock_goes_on(tmp_path: Path) -> None:
    with started(faults.clock(tmp_path)) as counter:
        assert abs(float(counter.ask()[2]) - time.time()) < 1
        faults.jump(tmp_path, -3600)
        assert abs(float(counter.ask()[2]) - time.time() + 3600) < 1
        assert abs(float(counter.ask()[3]) - time.monotonic()) < 1


# Waits for a condition until 0.2 s from now on the wall clock, and writes how long that took.
WAIT = """
import ctypes, time
mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
at, until = time.monotonic(), time.time() + 0.2
wanted = (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9))
library.pthread_cond_timedwait(condition, mutex, wanted)
print(time.monotonic() - at)
"""


@pytest.mark.parametrize("seconds", [0, 7200, -3600])
def test_a_wait_by_the_wall_clock_ends_in_time(tmp_path: Path, seconds: int) -> None:
    environment = faults.clock(tmp_path)
    faults.jump(tmp_path, seconds)
    command = [sys.executable, "-c", WAIT]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=10, check=True)
    assert 0.15 < float(done.stdout) < 5


def test_a_slow_disk_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    with faults.slow_disk(tmp_path, writers=2):
        end = time.monotonic() + 10
        while sorted(file.name for file in tmp_path.iterdir() if file.stat().st_size) != ["written-0", "written-1"]:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert not list(tmp_path.iterdir())
