"""Keeps batches in the database. All calls block; they raise sqlalchemy.exc.SQLAlchemyError."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, func, insert, select, update

from serve_app.core.tenants import Identity, Scope
from serve_app.database import writing
from serve_app.jobs.files import beyond
from serve_app.jobs.records import OPEN, Batch, Fault, Status
from serve_app.jobs.tables import batches, results

# OpenAI's only completion window.
WINDOW_S = 86_400.0


class TooManyBatches(Exception):
    """The tenant has as many batches that have not ended as it may have."""


def create(
    database: Engine,
    identity: Identity,
    endpoint: str,
    input_file: str,
    metadata: Mapping[str, str],
    now: float,
    max_open: int,
) -> Batch:
    """A new batch. Raises TooManyBatches."""
    row = {
        "id": f"batch_{secrets.token_hex(12)}",
        "tenant": identity.tenant,
        "key": identity.key,
        "models": json.dumps(None if identity.models is None else sorted(identity.models)),
        "endpoint": endpoint,
        "input_file": input_file,
        "metadata": json.dumps(dict(metadata)),
        "status": Status.VALIDATING,
        "created_at": now,
        "progress_at": now,
        "expires_at": now + WINDOW_S,
    }
    unfinished = (
        select(func.count()).select_from(batches).where(batches.c.tenant == identity.tenant, batches.c.status.in_(OPEN))
    )
    with writing(database) as connection:
        if connection.execute(unfinished).scalar_one() >= max_open:
            raise TooManyBatches
        connection.execute(insert(batches).values(**row))
        return batch_of(connection.execute(select(batches).where(batches.c.id == row["id"])).one())


def find(database: Engine, tenant: str, batch_id: str) -> Batch | None:
    """The tenant's batch of this id, with the number of its results."""
    query = select(batches).where(batches.c.id == batch_id, batches.c.tenant == tenant)
    with database.connect() as connection:
        return next(iter(_counted(connection, connection.execute(query).all())), None)


def page(database: Engine, tenant: str, after: str | None, limit: int) -> Sequence[Batch]:
    """Up to `limit` batches of a tenant, the newest first, from the one behind `after`."""
    place = (batches.c.created_at, batches.c.id)
    query = select(batches).where(batches.c.tenant == tenant).limit(limit)
    if after is not None:
        query = query.where(beyond(place, select(*place).where(batches.c.id == after), ascending=False))
    with database.connect() as connection:
        rows = connection.execute(query.order_by(*(column.desc() for column in place))).all()
        return _counted(connection, rows)


def cancel(database: Engine, tenant: str, batch_id: str, now: float) -> Batch | None:
    """The batch, which is cancelled unless it ends already; None if it does not exist."""
    possible = (Status.VALIDATING, Status.IN_PROGRESS)
    with writing(database) as connection:
        connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, batches.c.tenant == tenant, batches.c.status.in_(possible))
            # The process that holds the batch, to validate it, loses it.
            .values(status=Status.CANCELLING, cancelling_at=now, progress_at=now, owner="", lease_until=0.0)
        )
    return find(database, tenant, batch_id)


def sweep(database: Engine, ended_before: float) -> None:
    """Delete batches that ended before an instant."""
    with writing(database) as connection:
        connection.execute(delete(batches).where(batches.c.ended_at < ended_before))


def unfinished(database: Engine) -> tuple[int, float | None]:
    """The number of batches that have not ended, and the oldest instant of the last progress of one of them."""
    query = select(func.count(), func.min(batches.c.progress_at)).where(batches.c.status.in_(OPEN))
    with database.connect() as connection:
        number, oldest = connection.execute(query).one()
    return int(number), oldest


def batch_of(row: Row[Any]) -> Batch:
    """The batch of a row of the table; the counts of results are those of an ended batch."""
    models = json.loads(row.models)
    scopes = frozenset({Scope.INFERENCE})
    identity = Identity(row.tenant, row.key, scopes, None if models is None else frozenset(models))
    same = {
        name: getattr(row, name) for name in Batch.__dataclass_fields__ if hasattr(row, name) and name != "metadata"
    }
    return Batch(
        identity=identity,
        metadata=json.loads(row._mapping["metadata"]),
        faults=tuple(Fault(**fault) for fault in json.loads(row.errors)),
        **{**same, "status": Status(row.status)},
    )


def _counted(connection: Connection, rows: Sequence[Row[Any]]) -> list[Batch]:
    """The batches of rows; those that have not ended with the number of results so far."""
    found = [batch_of(row) for row in rows]
    active = [one.id for one in found if one.status in OPEN]
    counts: dict[tuple[str, bool], int] = {}
    if active:
        query = (
            select(results.c.batch_id, results.c.failed, func.count())
            .where(results.c.batch_id.in_(active))
            .group_by(results.c.batch_id, results.c.failed)
        )
        counts = {(batch_id, bool(failed)): number for batch_id, failed, number in connection.execute(query)}
    return [
        replace(one, completed=counts.get((one.id, False), 0), failed=counts.get((one.id, True), 0))
        if one.id in active
        else one
        for one in found
    ]
