"""Cache entries: complete or absent, made by one process, verified before use, with errors that name the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from serve_app.engines.files.disk_cache import (
    CacheError,
    Work,
    cache_subfolder,
    cached_file,
    cached_folder,
    require_space,
    safetensors_fault,
)
from tests.small_disk import fill, small_disk

# A process that makes the folder argv[1] in argv[2] seconds.
PROGRAM = """
import sys, time
from pathlib import Path
from serve_app.engines.files.disk_cache import Work, cached_folder

def make(part):
    part.mkdir()
    (part / "first").write_text("a")
    time.sleep(float(sys.argv[2]))
    (part / "second").write_text("b")

work = Work(make, "making", "makes the folder")
print(cached_folder(Path(sys.argv[1]), work, lambda stage: print(stage, flush=True)), flush=True)
"""


def start(target: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def safetensors(file: Path, data: bytes = bytes(8), size: int = 8) -> None:
    header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def make_model(part: Path) -> None:
    part.mkdir()
    (part / "config.json").write_text("{}")
    safetensors(part / "model.safetensors")


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_and_of_two_others_one_waits(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "entry"
    victim = start(target, 60)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "making (once)\n"
    while not list(target.parent.glob(".*/first")):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not target.exists()
    both = [start(target, 2.5) for _ in range(2)]
    maker, waiter = sorted(process.communicate(timeout=60)[0].splitlines() for process in both)
    assert maker == ["making (once)", str(target)]
    assert waiter[0].startswith(
        f"waiting for another process that makes the folder (lock file {target}.lock), 1 s so far"
    )
    assert waiter[-1] == str(target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["entry", "entry.lock"]
    assert sorted(path.name for path in target.iterdir()) == ["first", "manifest.json", "second"]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut, delete])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "entry"
    stages: list[str] = []
    work = Work(make_model, "making", "makes the model")
    cached_folder(target, work, stages.append)
    assert cached_folder(target, work, stages.append) == target
    assert stages == ["making (once)"]
    damage(target / name)
    assert cached_folder(target, work, stages.append) == target
    assert stages == ["making (once)"] * 2
    assert str(target / name) in caplog.text
    assert cached_folder(target, work, stages.append) == target
    assert stages == ["making (once)"] * 2


def test_a_folder_that_is_damaged_when_made_is_an_error_with_the_file(tmp_path: Path) -> None:
    """The manifest has the size of the file, but the header of the file promises more."""

    def make(part: Path) -> None:
        part.mkdir()
        safetensors(part / "model.safetensors", data=bytes(5))

    safetensors(tmp_path / "complete")
    complete = (tmp_path / "complete").stat().st_size
    with pytest.raises(CacheError) as error:
        cached_folder(tmp_path / "entry", Work(make, "making", "makes the model"), print)
    file = tmp_path / "entry" / "model.safetensors"
    assert f"{file} has {complete - 3} bytes instead of {complete}; check the disk" in str(error.value)
    assert "XDG_CACHE_HOME" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", bytes(40)])
def test_a_file_without_a_safetensors_header_is_a_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert safetensors_fault(tmp_path / "model.safetensors") is not None


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    target = tmp_path / "file"
    stages: list[str] = []

    def make(part: Path) -> None:
        part.write_bytes(b"library")

    work = Work(make, "making", "makes the file")
    for content in (None, b"librar", b"Library", b""):
        if content is not None:
            target.write_bytes(content)
        assert cached_file(target, work, stages.append).read_bytes() == b"library"
    cached_file(target, work, stages.append)
    assert stages == ["making (once)"] * 4
    target.with_name("file.sha256").unlink()
    cached_file(target, work, stages.append)
    assert stages == ["making (once)"] * 5


@pytest.mark.slow
def test_the_wait_for_another_process_is_bounded(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    stages: list[str] = []
    with FileLock(f"{target}.lock"), pytest.raises(CacheError) as error:
        cached_folder(target, Work(make_model, "making", "makes the model", lock_timeout_s=1.5), stages.append)
    other = f"another process that makes the model (lock file {target}.lock)"
    assert stages == [f"waiting for {other}, 1 s so far"]
    assert str(error.value).startswith(f"waited 2 s for {other}; end that process, or delete the lock file")


@pytest.mark.parametrize("home", ["/dev/null", "/proc/missing"])
def test_a_cache_folder_that_cannot_be_made_is_an_error_with_the_setting(home: str) -> None:
    target = Path(home) / ".cache" / "entry"
    with pytest.raises(CacheError) as error:
        cached_folder(target, Work(make_model, "making", "makes the model"), print)
    assert str(error.value).startswith(f"the cache folder {target.parent} cannot be made: ")
    assert str(error.value).endswith("; make it writable, or set XDG_CACHE_HOME to another folder")


def test_a_lock_file_that_cannot_be_opened_is_an_error_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "entry.lock").mkdir()
    with pytest.raises(CacheError, match=r"the lock file .*entry\.lock cannot be used: .*XDG_CACHE_HOME"):
        cached_folder(tmp_path / "entry", Work(make_model, "making", "makes the model"), print)


def test_a_user_without_a_home_folder_is_an_error_with_the_setting() -> None:
    program = (
        "import os\n"
        "from serve_app.engines.files.disk_cache import CacheError, cache_subfolder\n"
        "os.setuid(4242)\n"
        "try: cache_subfolder('models')\n"
        "except CacheError as error: print(error)"
    )
    if os.getuid() != 0:
        pytest.skip("only root can run a process as a user without a home folder")
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("there is no cache folder: ")
    assert done.stdout.strip().endswith("Set XDG_CACHE_HOME to a writable folder")


def test_the_cache_folder_follows_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_subfolder("models") == tmp_path / "serve_app" / "models"


def test_too_little_space_is_an_error_with_both_numbers(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "the conversion")
    with pytest.raises(CacheError) as error:
        require_space(tmp_path, 10**18, "the conversion")
    assert str(error.value).startswith(f"the conversion needs 1,000,000,000,000 MB in {tmp_path}, where ")
    assert " MB are free; free space there, or set XDG_CACHE_HOME" in str(error.value)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def write_folder(part: Path) -> None:
    part.mkdir()
    (part / "first").write_bytes(bytes(1000))
    (part / "second").write_bytes(bytes(200_000))


def write_file(part: Path) -> None:
    part.write_bytes(bytes(200_000))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_on_a_full_disk_there_is_no_entry_and_the_error_says_what_to_do(kind: str, disk: Path) -> None:
    made = Work(write_folder if kind == "folder" else write_file, "making", "makes")
    cached = cached_folder if kind == "folder" else cached_file
    target = disk / "entry"
    filler = fill(disk)
    with pytest.raises(CacheError) as error:
        cached(target, made, lambda stage: None)
    assert "No space left on device; free space there, or set XDG_CACHE_HOME to a folder on another disk" in str(
        error.value
    )
    assert {path.name for path in disk.iterdir()} <= {"filler", "entry.lock", "entry.sha256"}
    filler.unlink()
    assert cached(target, made, lambda stage: None) == target


def test_a_disk_that_becomes_full_while_an_entry_is_made_leaves_no_part_of_it(disk: Path) -> None:
    def make(part: Path) -> None:
        write_folder(part)
        fill(disk)
        (part / "third").write_bytes(bytes(100_000))

    with pytest.raises(CacheError, match="free space"):
        cached_folder(disk / "entry", Work(make, "making", "makes"), lambda stage: None)
    assert {path.name for path in disk.iterdir()} == {"filler", "entry.lock"}
