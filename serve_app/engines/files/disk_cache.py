"""Keeps files that are expensive to make in the user's cache folder. One process makes a file; each use verifies it."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from serve_app.config import cache_dir

logger = logging.getLogger(__name__)

Report = Callable[[str], None]

_MANIFEST = "manifest.json"
_FIRST_REPORT_S, _REPORT_INTERVAL_S = 1.0, 10.0
_ADVICE = "make it writable, or set XDG_CACHE_HOME to another folder"
_FREE_SPACE = "free space there, or set XDG_CACHE_HOME to a folder on another disk"
# A disk with less free space is full.
_FULL_BYTES = 2**20


class CacheError(Exception):
    """An entry of the cache folder cannot be made or used. The message names the path and what to change."""


@dataclass(frozen=True, slots=True)
class Work:
    """How to make an entry of the cache.

    `make` writes the entry to the path that it is given. `stage` is the report while this process makes the entry
    ("converting the model file"), `other` completes the report while another one does ("converts the model").
    """

    make: Callable[[Path], None]
    stage: str
    other: str
    lock_timeout_s: float = 1800.0


def cache_subfolder(name: str) -> Path:
    """A folder in the user's cache folder. Raises CacheError when the user has no home folder."""
    try:
        return cache_dir() / name
    except RuntimeError as error:
        raise CacheError(f"there is no cache folder: {error} Set XDG_CACHE_HOME to a writable folder") from None


def cached_folder(target: Path, work: Work, report: Report) -> Path:
    """The folder `target`, made by `work` if it does not exist or is damaged. Raises CacheError.

    The folder appears complete or not at all. Its manifest holds the sizes of its files.
    """

    def make(part: Path) -> None:
        work.make(part)
        sizes = {path.relative_to(part).as_posix(): path.stat().st_size for path in part.rglob("*") if path.is_file()}
        (part / _MANIFEST).write_text(json.dumps(sizes, indent=1))

    return _cached(target, _folder_fault, make, work, report)


def is_complete(folder: Path) -> bool:
    """Whether the folder is a complete entry of `cached_folder`."""
    return _folder_fault(folder) is None


def cached_file(target: Path, work: Work, report: Report) -> Path:
    """The file `target`, made by `work` if it does not exist or is damaged. Raises CacheError.

    The file's SHA-256 is stored beside it.
    """

    def make(part: Path) -> None:
        work.make(part)
        _digest_file(target).write_text(_sha256(part))

    return _cached(target, _file_fault, make, work, report)


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises CacheError when less than `needed_bytes` are free on the file system of `folder`."""
    free = _free(folder)
    if free < needed_bytes:
        raise CacheError(
            f"{purpose} needs {needed_bytes / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} MB are free; "
            f"{_FREE_SPACE}"
        )


def _cached(
    target: Path, find_fault: Callable[[Path], str | None], make: Callable[[Path], None], work: Work, report: Report
) -> Path:
    if target.exists() and find_fault(target) is None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = _advice(error, target.parent)
        raise CacheError(f"the cache folder {target.parent} cannot be made: {error.strerror}; {advice}") from error
    with locked(Path(f"{target}.lock"), work.other, work.lock_timeout_s, report):
        fault = find_fault(target) if target.exists() else "it does not exist"
        if fault is None:
            return target
        if target.exists():
            logger.warning("the cache entry %s is damaged and will be made again: %s", target, fault)
            delete(target)
        report(f"{work.stage} (once)")
        _make(target, make)
        fault = find_fault(target)
    if fault is not None:
        raise CacheError(
            f"the new cache entry {target} is damaged: {fault}; check the disk, or set XDG_CACHE_HOME to a folder on "
            f"another one"
        )
    return target


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """Make the entry beside `target`, which does not exist, then move it there."""
    part = target.with_name(f".{target.name}.part")
    delete(part)  # the rest of a process that was killed
    try:
        make(part)
        _sync(part)
        part.replace(target)
    except OSError as error:
        advice = _advice(error, target.parent)
        raise CacheError(f"the cache entry {target} cannot be made: {error.strerror or error}; {advice}") from error
    finally:
        delete(part)


def _sync(part: Path) -> None:
    """Wait until the disk has the content of the files: a full disk can be reported late, and a machine can crash."""
    for file in [part, *part.rglob("*")]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _advice(error: OSError, folder: Path) -> str:
    """What to change after an error below `folder`. numpy's error of a short write has no number."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and _free(folder) < _FULL_BYTES)
    return _FREE_SPACE if full else _ADVICE


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def delete(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, other: str, timeout_s: float, report: Report) -> Iterator[None]:
    """Hold the lock file while no other process does what `other` says ("converts the model").

    Reports once the process has waited for a second. Raises CacheError after `timeout_s` seconds.
    """
    lock = FileLock(path)
    began = time.monotonic()
    pause = min(_FIRST_REPORT_S, timeout_s)
    try:
        while not _acquired(lock, pause):
            waited = time.monotonic() - began
            what = f"another process that {other} (lock file {path})"
            if waited >= timeout_s:
                raise CacheError(
                    f"waited {waited:.0f} s for {what}; end that process, or delete the lock file if there is none"
                )
            report(f"waiting for {what}, {waited:.0f} s so far")
            pause = min(_REPORT_INTERVAL_S, timeout_s - waited)
    except (OSError, NotImplementedError) as error:  # filelock raises the latter where there are no file locks
        advice = _advice(error, path.parent) if isinstance(error, OSError) else _ADVICE
        raise CacheError(f"the lock file {path} cannot be used: {error}; {advice}") from error
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, timeout_s: float) -> bool:
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout:
        return False
    return True


def _folder_fault(folder: Path) -> str | None:
    """The first file that is missing or does not have the size in the manifest; None for a complete folder."""
    manifest = folder / _MANIFEST
    try:
        sizes: dict[str, int] = json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        return f"{manifest} cannot be read: {error}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if (actual := file.stat().st_size) != size:
            return f"{file} has {actual:,} bytes instead of {size:,}"
        if file.suffix == ".safetensors" and (fault := safetensors_fault(file)):
            return f"{file} {fault}"
    return None


def safetensors_fault(file: Path) -> str | None:
    """What is wrong with the header of a safetensors file or with the file's size; None if nothing is.

    Format: the header's length (8 bytes, little endian), the header (JSON), then the tensors at the header's offsets.
    """
    actual = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if actual < 8 + length:
            return f"has {actual:,} bytes, fewer than its header"
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError):
            return "has no readable header"
    expected = 8 + length + max(ends, default=0)
    return None if actual == expected else f"has {actual:,} bytes instead of {expected:,}"


def _file_fault(file: Path) -> str | None:
    try:
        expected = _digest_file(file).read_text()
    except OSError as error:
        return f"its digest cannot be read: {error}"
    return None if _sha256(file) == expected else f"its content does not match the digest in {_digest_file(file)}"


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
