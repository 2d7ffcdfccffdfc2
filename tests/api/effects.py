"""How a test states the effect of a field of a body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Effect:
    """Fields of a body, and what they change.

    `engine` are the attributes of the request or query that reaches the engine, with their values. `answer` is whether
    the answer changes although the same reaches the engine. With neither, the fields have no effect.
    `base` replaces the shortest body of the path.
    """

    fields: dict[str, Any]
    engine: dict[str, Any] | None = None
    answer: bool = False
    base: dict[str, Any] | None = None
