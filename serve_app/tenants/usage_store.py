"""Adds up the usage of keys in the database, and reads it.

The calls block, and raise sqlalchemy.exc.SQLAlchemyError.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Column, ColumnElement, Engine, String, Table, func, select, update
from sqlalchemy.exc import IntegrityError

from serve_app.core.usage import COUNTS, MOST_ROWS, Group, Usage, UsageQuery
from serve_app.database import metadata

HOUR_S = 3600
_DAY_S = 86_400
LONGEST_NAME = 256
_NAME = String(LONGEST_NAME)

# One row for each hour, tenant, key and model that were used. `hour` is the beginning of the hour, in seconds since
# 1970. `key` is the public id of a key, or the subject of a token.
usage = Table(
    "usage",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant", _NAME, primary_key=True),
    Column("key", _NAME, primary_key=True),
    Column("model", _NAME, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in COUNTS),
)


@dataclass(frozen=True, slots=True)
class Place:
    """The row of the usage: its hour, as seconds since 1970, its tenant, key and model."""

    hour: int
    tenant: str
    key: str
    model: str


@dataclass(slots=True)
class Sums:
    """The counts of several requests. `nanodollars` is their cost."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    nanodollars: int = 0

    def add(self, other: Sums) -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @classmethod
    def of(cls, one: Usage) -> Sums:
        """The counts of one request."""
        return cls(1, one.prompt_tokens, one.cached_tokens, one.output_tokens, one.reasoning_tokens, one.nanodollars)


class UsageStore:
    def __init__(self, database: Engine) -> None:
        self._database = database

    def close(self) -> None:
        """Close the connections."""
        self._database.dispose()

    def add(self, sums: Mapping[Place, Sums]) -> None:
        """Add to the rows of these places, in one transaction."""
        try:
            self._add(sums)
        except IntegrityError:  # another process has inserted a row meanwhile, which exists now
            self._add(sums)

    def _add(self, sums: Mapping[Place, Sums]) -> None:
        columns = usage.c
        with self._database.begin() as connection:
            # All processes lock the rows in the same order, so that they never wait for each other.
            for place in sorted(sums, key=lambda one: (one.hour, one.tenant, one.key, one.model)):
                counts = {name: getattr(sums[place], name) for name in COUNTS}
                is_here = (
                    (columns.hour == place.hour)
                    & (columns.tenant == place.tenant)
                    & (columns.key == place.key)
                    & (columns.model == place.model)
                )
                more = {name: columns[name] + count for name, count in counts.items()}
                if not connection.execute(update(usage).where(is_here).values(more)).rowcount:
                    row = {"hour": place.hour, "tenant": place.tenant, "key": place.key, "model": place.model}
                    connection.execute(usage.insert().values(**row, **counts))

    def report(self, query: UsageQuery) -> list[dict[str, Any]]:
        """The sums of each group, in order: the values of `query.groups`, then the counts."""
        groups = [_GROUPS[group].label(group.value) for group in query.groups]
        sums = [func.coalesce(func.sum(usage.c[name]), 0).label(name) for name in COUNTS]
        statement = select(*groups, *sums).where(*_conditions(query)).group_by(*groups).order_by(*groups)
        statement = statement.limit(None if Group.MONTH in query.groups else MOST_ROWS + 1)
        with self._database.connect() as connection:
            rows = connection.execute(statement).mappings().all()
        return _by_month([_readable(row, query.groups) for row in rows], query.groups)

    def used_of_budgets(self, now: float | None = None) -> dict[str, int]:
        """What the current day and month have used, by the names of the counters (`gateway/counters.py`)."""
        moment = datetime.fromtimestamp(time.time() if now is None else now, UTC)
        day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        found: dict[str, int] = {}
        for word, begin, period in (("day", day, f"{day:%Y-%m-%d}"), ("month", day.replace(day=1), f"{day:%Y-%m}")):
            for group in (Group.KEY, Group.TENANT):
                for row in self.report(UsageQuery(begin=begin.timestamp(), groups=(group,))):
                    subject = f"{group.value}:{row[group.value]}"
                    found[f"{subject}:tokens_per_{word}:{period}"] = row["prompt_tokens"] + row["output_tokens"]
                    found[f"{subject}:dollars_per_{word}:{period}"] = row["nanodollars"]
        return found


_GROUPS: dict[Group, ColumnElement[Any]] = {
    Group.HOUR: usage.c.hour,
    Group.DAY: usage.c.hour - usage.c.hour % _DAY_S,
    Group.MONTH: usage.c.hour - usage.c.hour % _DAY_S,  # databases differ in their calendars: summed in Python
    Group.TENANT: usage.c.tenant,
    Group.KEY: usage.c.key,
    Group.MODEL: usage.c.model,
}


def _conditions(query: UsageQuery) -> Iterable[ColumnElement[bool]]:
    if query.begin is not None:
        yield usage.c.hour >= query.begin // HOUR_S * HOUR_S
    if query.end is not None:
        yield usage.c.hour < query.end
    for name in ("tenant", "key", "model"):
        if (wanted := getattr(query, name)) is not None:
            yield usage.c[name] == wanted


def _readable(row: Mapping[Any, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """A row with its instants as text, and with whole numbers, which PostgreSQL returns as decimals."""
    formats = {Group.HOUR: "%Y-%m-%dT%H:00Z", Group.DAY: "%Y-%m-%d", Group.MONTH: "%Y-%m"}
    values: dict[str, Any] = {}
    for group in groups:
        value = row[group.value]
        form = formats.get(group)
        values[group.value] = value if form is None else datetime.fromtimestamp(int(value), UTC).strftime(form)
    return values | {name: int(row[name]) for name in COUNTS}


def _by_month(rows: list[dict[str, Any]], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Add up the rows of equal groups, if they are grouped by the month."""
    if Group.MONTH not in groups:
        return rows
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        place = tuple(row[group.value] for group in groups)
        if place not in found:
            found[place] = row
            continue
        for name in COUNTS:
            found[place][name] += row[name]
    return list(found.values())
