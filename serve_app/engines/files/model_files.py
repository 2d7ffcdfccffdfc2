"""Checks the files of a model before they are loaded: missing shards, Git LFS pointers, and cut safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from serve_app.engines.files.disk_cache import safetensors_fault

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
# Files beside the weights that a model is loaded from, and that repositories keep in Git LFS when they are large.
_TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


class SourceError(Exception):
    """A model's source cannot be loaded. The message gives the reason and what to change."""


def check_folder(folder: Path) -> None:
    """Raises SourceError when a shard is missing, or when a file is a Git LFS pointer or cut.

    The sizes of safetensors files are known from their headers. A folder without safetensors files passes.
    """
    for pattern in _TEXT_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                check_not_pointer(file)
    weights = _weight_files(folder)
    if missing := [file.name for file in weights if not file.is_file()]:
        raise SourceError(
            f"{folder} lacks {len(missing)} of the {len(weights)} files that {_INDEX} lists: "
            f"{', '.join(missing[:3])}{', ...' if missing[3:] else ''}; copy or download them"
        )
    for file in weights:
        check_not_pointer(file)
        if fault := safetensors_fault(file):
            raise SourceError(f"{file} {fault}; copy or download the file again")


def check_not_pointer(file: Path) -> None:
    """Raises SourceError when Git has checked out a Git LFS pointer in place of the file's content."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise SourceError(f"{file} is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: a single file, or else the shards in the index."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        return []
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise SourceError(f"{index} is damaged: it has no weight_map; copy or download the file again") from None
