"""Keeps the answers to requests with an idempotency key in the database, for all ingresses."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, insert, select, update

from serve_app.database import writing
from serve_app.errors import NotReady
from serve_app.jobs.answers import KeptAnswer, Place, reused
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import kept_answers as table
from serve_app.jobs_config import IdempotencyOptions

log = logging.getLogger(__name__)

# The time for which a process holds a place that it does not renew. It renews three times in this time.
LEASE_S = 15.0
# The interval at which a request asks whether another process has computed the answer.
_POLL_S = 0.1


class SharedAnswers:
    """An AnswerStore in the database. `owner` is unique among all processes. `clock` returns seconds since the epoch.

    A process that is lost holds its places until their leases end; then another one computes their answers.
    """

    def __init__(
        self, store: JobStore, options: IdempotencyOptions, owner: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._options = options
        self._owner = owner
        self._clock = clock
        self._renewals: dict[Place, asyncio.Task[None]] = {}

    async def claim(self, place: Place, fingerprint: bytes) -> KeptAnswer | None:
        while True:
            found = await self._store.call(_claim, place, fingerprint, self._owner, self._clock())
            if isinstance(found, KeptAnswer):
                return found
            if found:
                self._renewals[place] = asyncio.create_task(self._renew(place))
                return None
            await asyncio.sleep(_POLL_S)

    async def keep(self, place: Place, fingerprint: bytes, answer: KeptAnswer) -> None:
        self._renewals.pop(place).cancel()
        await self._store.call(_keep, place, self._owner, answer, self._clock(), self._options)

    async def give_up(self, place: Place) -> None:
        self._renewals.pop(place).cancel()
        await self._store.call(_give_up, place, self._owner)

    async def close(self) -> None:
        for task in self._renewals.values():
            task.cancel()

    async def _renew(self, place: Place) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            try:
                await self._store.call(_renew, place, self._owner, self._clock())
            except NotReady:
                continue  # the store has logged it


def _is(place: Place) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return table.c.tenant == place.tenant, table.c.key == place.key


def _claim(database: Engine, place: Place, fingerprint: bytes, owner: str, now: float) -> KeptAnswer | bool:
    """The answer; True if `owner` has to compute it; False if another process does. Raises IdempotencyKeyReused."""
    with writing(database) as connection:
        _lock(connection, place)
        gone = (table.c.expires_at < now) | (table.c.status.is_(None) & (table.c.lease_until < now))
        connection.execute(delete(table).where(*_is(place), gone))
        row = connection.execute(select(table).where(*_is(place))).first()
        if row is None:
            lease = {"owner": owner, "lease_until": now + LEASE_S, "expires_at": now + 365 * 86_400}
            names = {"tenant": place.tenant, "key": place.key, "fingerprint": fingerprint}
            connection.execute(insert(table).values(**names, **lease))
            return True
    if bytes(row.fingerprint) != fingerprint:
        raise reused(place)
    if row.status is None:
        return False
    headers = tuple((name, value) for name, value in json.loads(row.headers))
    return KeptAnswer(row.status, headers, bytes(row.body))


def _lock(connection: Connection, place: Place) -> None:
    """PostgreSQL: others wait with the same place until the end of the transaction. SQLite has one writer at a time."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"{place.tenant}\n{place.key}"))))


def _keep(
    database: Engine, place: Place, owner: str, answer: KeptAnswer, now: float, options: IdempotencyOptions
) -> None:
    """Keep an answer, and delete the oldest answers of the tenant beyond its limits, and all that have expired."""
    values = {"status": answer.status, "headers": json.dumps(answer.headers), "body": answer.body}
    with writing(database) as connection:
        connection.execute(
            update(table).where(*_is(place), table.c.owner == owner).values(**values, expires_at=now + options.ttl_s)
        )
        connection.execute(delete(table).where(table.c.expires_at < now))
        _delete_excess(connection, place.tenant, options)


def _delete_excess(connection: Connection, tenant: str, options: IdempotencyOptions) -> None:
    own = (table.c.tenant == tenant, table.c.status.is_not(None))
    size = func.length(table.c.body)
    query = select(func.count(), func.coalesce(func.sum(size), 0)).where(*own)
    number, total = connection.execute(query).one()
    if number <= options.max_kept and total <= options.max_kept_bytes:
        return
    for row in connection.execute(select(table.c.key, size).where(*own).order_by(table.c.expires_at)).all():
        if number <= options.max_kept and total <= options.max_kept_bytes:
            return
        connection.execute(delete(table).where(*_is(Place(tenant, row[0]))))
        number, total = number - 1, total - row[1]


def _give_up(database: Engine, place: Place, owner: str) -> None:
    with writing(database) as connection:
        connection.execute(delete(table).where(*_is(place), table.c.owner == owner, table.c.status.is_(None)))


def _renew(database: Engine, place: Place, owner: str, now: float) -> None:
    with writing(database) as connection:
        here = (*_is(place), table.c.owner == owner, table.c.status.is_(None))
        connection.execute(update(table).where(*here).values(lease_until=now + LEASE_S))
