"""Removes the shared memory that vLLM's processes leave behind when they are killed.

A killed process of vLLM leaves segments of up to some hundred MB in /dev/shm. A file for each running replica names its
segments; the replica removes them when it ends. Those of a killed replica are removed when the service of this machine
stops, or by the next replica that starts.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve_app.engines.files.disk_cache import CacheError, cache_subfolder

logger = logging.getLogger(__name__)

_FOLDER = Path("/dev/shm")
_MAPPED = re.compile(rf" {_FOLDER}/(\S+)$", re.MULTILINE)
_POLL_S = 1.0


class SegmentRecord:
    """The names of the segments of the processes that this process started, in a file."""

    def __init__(self) -> None:
        import psutil

        self._own = psutil.Process()
        self._file = _records() / f"{self._own.pid}.json"
        self._names: set[str] = set()
        self._file.parent.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Update the record every second, and at the end: this process can be killed while vLLM starts."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_POLL_S):
                self.update()

        thread = threading.Thread(target=watch, name="shared memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.update()

    def update(self) -> None:
        """Add the segments that the children of this process map now."""
        found = set().union(*(_mapped(child.pid) for child in self._own.children(recursive=True)))
        if not found <= self._names:
            self._names |= found
            above = [parent.pid for parent in self._own.parents()]
            record = {"started": _started(self._own.pid), "parents": above, "names": sorted(self._names)}
            self._file.write_text(json.dumps(record))

    def remove(self) -> None:
        """Remove the segments that are left, and the record of them."""
        _remove(self._file, self._names)


def remove_left_segments(wait_s: float = 0.0) -> None:
    """Remove the segments of replicas that were killed. Waits up to `wait_s` seconds for the end of those below us."""
    deadline = time.monotonic() + wait_s
    try:
        files = list(_records().glob("*.json"))
    except CacheError:  # without a cache folder no replica has started
        return
    for file in files:
        try:
            record = json.loads(file.read_text())
            pid, started, names = int(file.stem), record["started"], set(map(str, record["names"]))
            ours = os.getpid() in record["parents"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
        while (alive := _started(pid) == started) and ours and time.monotonic() < deadline:
            time.sleep(0.05)
        if not alive:
            _remove(file, names)


def _remove(file: Path, names: set[str]) -> None:
    for name in names:
        with suppress(OSError):
            (_FOLDER / name).unlink()
            logger.info("removed the shared memory %s, which vLLM left behind", name)
    file.unlink(missing_ok=True)


def _records() -> Path:
    return cache_subfolder("vllm") / "replicas"


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot of the machine; None if it has ended. See proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _mapped(pid: int) -> set[str]:
    """The names of the segments that a process maps."""
    try:
        return set(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()))
    except OSError:  # the process has ended, or belongs to another user
        return set()
