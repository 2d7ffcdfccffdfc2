"""Shared memory that killed processes leave behind is removed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from serve_app.engines.vllm.shared_memory import SegmentRecord, remove_left_segments

FOLDER = Path("/dev/shm")
# Maps a segment until its input ends.
CHILD = """
import sys
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(sys.argv[1], track=False) if sys.version_info >= (3, 13) else SharedMemory(sys.argv[1])
print("mapped", flush=True)
sys.stdin.read()
"""
# Records what its child maps, and is killed.
REPLICA = """
import os, signal, subprocess, sys
from serve_app.engines.vllm.shared_memory import SegmentRecord
PIPE = subprocess.PIPE
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdin=PIPE, stdout=PIPE)
child.stdout.readline()
SegmentRecord().update()
child.kill()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "serve_app/vllm/replicas"


@pytest.fixture
def segment() -> Iterator[Path]:
    memory = SharedMemory(create=True, size=4096)
    path = FOLDER / memory.name.lstrip("/")
    yield path
    memory.close()
    if path.exists():
        memory.unlink()


def test_the_segments_of_a_killed_replica_are_removed(records: Path, segment: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", REPLICA, segment.name, CHILD], check=False)
    assert killed.returncode < 0
    (record,) = records.glob("*.json")
    assert segment.name in json.loads(record.read_text())["names"]
    remove_left_segments()
    assert not segment.exists()
    assert not record.exists()


def test_a_replica_that_ends_removes_its_segments_and_other_replicas_leave_them(records: Path, segment: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, segment.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    own = SegmentRecord()
    with own.watching():
        assert child.stdout.readline() == "mapped\n"
    began = time.monotonic()
    remove_left_segments(wait_s=60)
    assert segment.exists(), "this process runs"
    assert time.monotonic() - began < 10, "this process is not below itself"
    child.communicate("")
    own.remove()
    assert not segment.exists()
    assert list(records.iterdir()) == []


def test_a_record_that_cannot_be_read_is_left_alone(records: Path) -> None:
    records.mkdir(parents=True)
    (records / "1.json").write_text("{")
    (records / "x.json").write_text('{"started": 1, "parents": [], "names": []}')
    remove_left_segments()
    assert len(list(records.iterdir())) == 2
