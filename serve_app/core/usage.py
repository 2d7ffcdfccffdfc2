"""The usage of requests: what a finished request has used, and reports of it by tenant, key, model and time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

# The counts of a row of a report.
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "nanodollars")
NANODOLLARS = 1_000_000_000
# A report has at most so many rows.
MOST_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished request has used. `nanodollars` is its cost by the prices of the model.

    `cached_tokens` are among the `prompt_tokens`, and `reasoning_tokens` among the `output_tokens`.
    """

    tenant: str
    key: str
    model: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    nanodollars: int = 0


class UsageLog(Protocol):
    """Keeps the usage of requests. Returns at once, without I/O."""

    def record(self, usage: Usage) -> None:
        """Keep the usage of a request that has ended."""
        ...


class Group(StrEnum):
    """What the rows of a report are grouped by. Hours, days and months are those of UTC."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """The usage between two instants, in seconds since 1970, by whole hours; None is no condition."""

    begin: float | None = None
    end: float | None = None
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    groups: tuple[Group, ...] = ()


class UsageReports(Protocol):
    """Reads the usage."""

    async def report(self, query: UsageQuery) -> list[dict[str, Any]]:
        """The rows in the order of their groups: the values of the groups, then COUNTS. At most MOST_ROWS + 1.

        Raises NotReady if the database does not answer.
        """
        ...
