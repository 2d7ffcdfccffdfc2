"""Reports of the usage for people and programs: their parameters as text, and their rows with costs in dollars."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from serve_app.core.usage import COUNTS, NANODOLLARS, Group

# 9999-12-31, the last day that a date can have.
_LATEST_S = 253_402_300_799
COST = "cost_dollars"


def instant(text: str) -> float:
    """Seconds since 1970, from a date, a date with a time (ISO 8601, UTC by default), or such a number.

    Raises ValueError.
    """
    if text.isascii() and text.replace(".", "", 1).isdecimal():
        seconds = float(text)
    else:
        at = datetime.fromisoformat(text)
        seconds = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    if not 0 <= seconds <= _LATEST_S:
        raise ValueError(f"{text[:64]} is not between 1970 and 9999")
    return seconds


def month_begin() -> float:
    """The beginning of the current month in UTC, in seconds since 1970."""
    now = datetime.now(UTC)
    return datetime(now.year, now.month, 1, tzinfo=UTC).timestamp()


def groups_of(text: str) -> tuple[Group, ...]:
    """The groups of a list with commas, each once. Raises ValueError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [group.value for group in Group]
    for name in names:
        if name not in known:
            raise ValueError(f"'{name[:64]}' is not one of {', '.join(known)}")
    return tuple(dict.fromkeys(map(Group, names)))


def with_cost(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a report with its cost in dollars in place of nanodollars."""
    shown = {name: value for name, value in row.items() if name != "nanodollars"}
    return shown | {COST: row["nanodollars"] / NANODOLLARS}


def to_csv(rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> str:
    """The rows by RFC 4180, with a header. A cost has nine digits after the point."""
    text = io.StringIO()
    csv.writer(text).writerows(table(rows, groups))
    return text.getvalue()


def table(rows: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[list[str]]:
    """The names of the columns, then the values of each row, as text."""
    columns = [*(group.value for group in groups), *(name for name in COUNTS if name != "nanodollars"), COST]
    lines = [[f"{row[name]:.9f}" if name == COST else str(row[name]) for name in columns] for row in rows]
    return [columns, *lines]
