"""The options of a model's LoRA adapters."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from serve_app.section import Section

LONGEST_NAME = 128
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
_NAME = re.compile(NAME_PATTERN)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")


def valid_name(name: str) -> bool:
    """Whether a model or an adapter can have this name."""
    return len(name) <= LONGEST_NAME and _NAME.fullmatch(name) is not None


class LoraAdapter(Section):
    """One LoRA adapter in PEFT's format. `source` is a folder, or a hub id with its `revision`."""

    name: str = Field(min_length=1, pattern=NAME_PATTERN)
    source: str = Field(min_length=1)
    revision: str | None = None


class Lora(Section):
    """LoRA adapters of a model. A request picks one by its name, in the place of the model's.

    A replica keeps the `max_loaded` adapters that were used last in its memory. `allow` lists what may be loaded at run
    time: folders by their absolute path, with all folders below them, and hub ids as `owner/name@revision`.
    """

    adapters: tuple[LoraAdapter, ...] = ()
    max_loaded: int = Field(8, ge=1, le=1024)
    max_rank: Literal[8, 16, 32, 64, 128, 256, 512] = 64
    allow: tuple[str, ...] = ()

    @field_validator("allow")
    @classmethod
    def _check_allow(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            if not source.startswith(("/", "~")) and not _HUB_ID.fullmatch(source):
                raise ValueError(
                    f"{source} is neither an absolute path nor a hub id with its revision; write /path/of/a/folder or "
                    "owner/name@revision"
                )
        return sources
