"""The faults of the chaos tests, each one function: what happens to processes, disks, memory, threads and the clock.

`tests/chaos/network.py` has the faults of networks, `tests/chaos/clients.py` those of clients. A node is lost by
`tests.graph.cluster.Node.lose`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.graph.service import kill

__all__ = ["clock", "hung", "jump", "kill", "out_of_memory", "slow_disk", "stopped"]

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17  # requests of ptrace(2)
_OFFSET = "clock-offset"
# One write of 1 MB and fsync after the other: each waits for the disk, and the disk for it.
_WRITER = """
import os, sys
with open(sys.argv[1], "wb") as file:
    while True:
        file.seek(0)
        file.write(os.urandom(1_000_000))
        file.flush()
        os.fsync(file.fileno())
"""


@contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """The processes stand still (SIGSTOP), as after a crash of their machine: no connection ends."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    end = time.monotonic() + 5
    while any(process.status() != psutil.STATUS_STOPPED for process in processes):
        assert time.monotonic() < end, processes
        time.sleep(0.001)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # Ray may have replaced it
                process.send_signal(signal.SIGCONT)


@contextmanager
def hung(thread: int) -> Iterator[None]:
    """One thread, by the system's number for it, stands still, as in a deadlock. The others of its process run on."""
    _ptrace(_SEIZE, thread)
    try:
        _ptrace(_INTERRUPT, thread)
        os.waitpid(thread, 0x40000000)  # __WALL: until the thread has stopped
        yield
    finally:
        with suppress(ProcessLookupError):
            _ptrace(_DETACH, thread)


def _ptrace(request: int, thread: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, None, None) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def out_of_memory(process: psutil.Process, free_bytes: int = 0) -> Iterator[None]:
    """The process gets at most `free_bytes` more of address space: allocations above fail, as with a full memory."""
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + free_bytes, before[1]))
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):  # a process can end without memory
            process.rlimit(psutil.RLIMIT_AS, before)


@contextmanager
def slow_disk(folder: Path, writers: int = 4) -> Iterator[None]:
    """The disk of `folder` is busy: `writers` programs write 1 MB each and wait for the disk, again and again."""
    with ExitStack() as stack:
        for number in range(writers):
            file = folder / f"written-{number}"
            writer = stack.enter_context(subprocess.Popen([sys.executable, "-c", _WRITER, str(file)]))
            stack.callback(file.unlink, missing_ok=True)
            stack.callback(writer.kill)
        yield


def clock(folder: Path) -> dict[str, str]:
    """The environment of programs whose wall clock `jump` moves. Their monotonic clock is the system's.

    All processes that the programs start have the same clock.
    """
    library = folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    jump(folder, 0)
    return {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(folder / _OFFSET)}


def jump(folder: Path, seconds: int) -> None:
    """Set the clock of the programs with the environment `clock(folder)` to the true time and this offset."""
    with (folder / _OFFSET).open("r+b" if (folder / _OFFSET).exists() else "wb") as file:
        file.write(struct.pack("q", seconds))  # programs have mapped the file
