"""Checks the files of a model before they are loaded: missing shards, Git LFS pointers, and cut safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from serve_app.engines.files.disk_cache import safetensors_fault

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
# Files beside the weights that a model is loaded from, and that repositories keep in Git LFS when they are large.
_TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
# Keys of config.json that name the implementation of a layer. A value with a slash is a repository on the model hub,
# whose code transformers loads (CVE-2026-4372 did so without trust_remote_code).
_IMPLEMENTATION = re.compile(r"_?\w+_implementation(_internal)?")


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


def check_code(folder: Path, trusted: bool) -> None:
    """Raises SourceError if config.json names code of another repository, unless the model's code is `trusted`.

    `auto_map`, which names code in the folder itself, passes: transformers has an implementation of its own for many
    such models, and refuses the others without running their code.
    """
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # the loader reports it
    for key, value in [] if trusted else _members(settings):
        if _IMPLEMENTATION.fullmatch(key) and any("/" in text for text in _texts(value)):
            raise SourceError(
                f"{folder}/config.json: {key} names code of another repository, which is not run; remove the key, or "
                "set trust_remote_code: true if you trust that code"
            )


def _members(settings: object) -> Iterator[tuple[str, object]]:
    """The members of all objects in JSON data."""
    remaining = [settings]
    while remaining:
        match remaining.pop():
            case dict() as members:
                yield from members.items()
                remaining += members.values()
            case list() as items:
                remaining += items


def _texts(value: object) -> list[str]:
    """A text, or the texts of an object with one for each part of the model."""
    values = value.values() if isinstance(value, dict) else [value]
    return [text for text in values if isinstance(text, str)]


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
