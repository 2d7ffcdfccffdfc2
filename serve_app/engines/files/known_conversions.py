"""Remembers which GGUF file was converted to which folder, so that a start need not read the whole file again."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from serve_app.engines.files.disk_cache import CacheError, cache_subfolder, is_complete

# Increase it when the conversion changes. Old conversions stay on the disk.
CONVERSION = 3
_NOTES = "converted"


def known_conversion(path: Path) -> Path | None:
    """The folder to which this file was converted; None if the file has changed since, or the folder is damaged."""
    try:
        folder = Path(_note(path).read_text())
        return folder if is_complete(folder) else None
    except (OSError, ValueError, CacheError):
        return None


def remember_conversion(path: Path, folder: Path) -> None:
    """Note the folder for `known_conversion`. Without a writable cache folder nothing is noted."""
    with suppress(OSError, CacheError):
        note = _note(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(folder))


def _note(path: Path) -> Path:
    """The note about a file, named by what changes whenever the file's content changes."""
    stat = path.stat()
    identity = (
        CONVERSION,
        str(path.resolve()),
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )
    return cache_subfolder(_NOTES) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
