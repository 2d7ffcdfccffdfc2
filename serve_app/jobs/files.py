"""Keeps files in the database, in parts. All calls block; they raise sqlalchemy.exc.SQLAlchemyError."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

from sqlalchemy import Connection, Engine, Row, and_, delete, func, insert, or_, select, update

from serve_app.database import writing
from serve_app.jobs.records import OPEN, File
from serve_app.jobs.tables import batches, file_parts, files

PART_BYTES = 262_144
# Parts that are written in one transaction: others wait for its end.
_PARTS_PER_TRANSACTION = 16
# A file that is not complete by then was abandoned. An upload within `limits.request_timeout_s` takes less.
_INCOMPLETE_S = 3 * 3600
_COLUMNS = [files.c[name] for name in ("id", "tenant", "purpose", "filename", "size", "created_at", "expires_at")]


def save(
    database: Engine,
    tenant: str,
    purpose: str,
    filename: str,
    content: Iterable[bytes],
    now: float,
    expires_at: float,
    visible: bool = True,
) -> File:
    """A new file with this content, which is read in pieces of any size.

    Callers see the file when its content is complete; if not `visible`, when `show` is called.
    """
    file_id = f"file-{secrets.token_hex(12)}"
    size, number = 0, count()
    row = {"id": file_id, "tenant": tenant, "purpose": purpose, "filename": filename}
    with writing(database) as connection:
        connection.execute(insert(files).values(**row, size=0, created_at=now, expires_at=expires_at, complete=False))
    parts = _parts(content)
    while some := list(islice(parts, _PARTS_PER_TRANSACTION)):
        size += sum(map(len, some))
        rows = [{"file_id": file_id, "number": next(number), "content": part} for part in some]
        with writing(database) as connection:
            connection.execute(insert(file_parts), rows)
    with writing(database) as connection:
        connection.execute(update(files).where(files.c.id == file_id).values(size=size, complete=visible))
    return File(file_id, tenant, purpose, filename, size, now, expires_at)


def show(connection: Connection, file_ids: Sequence[str]) -> None:
    """Let callers see files, when the transaction is committed."""
    connection.execute(update(files).where(files.c.id.in_(file_ids)).values(complete=True))


def discard(database: Engine, file_ids: Sequence[str]) -> None:
    """Delete files that no client has seen."""
    with writing(database) as connection:
        connection.execute(delete(files).where(files.c.id.in_(file_ids), ~files.c.complete))


def _parts(content: Iterable[bytes]) -> Iterator[bytes]:
    """The content in parts of PART_BYTES; the last one may be shorter."""
    held = bytearray()
    for piece in content:
        held += piece
        while len(held) >= PART_BYTES:
            yield bytes(held[:PART_BYTES])
            del held[:PART_BYTES]
    if held:
        yield bytes(held)


def find(database: Engine, tenant: str, file_id: str, now: float) -> File | None:
    """The tenant's file of this id, unless it has expired."""
    query = select(*_COLUMNS).where(files.c.id == file_id, *_visible(tenant, now))
    with database.connect() as connection:
        row = connection.execute(query).first()
    return None if row is None else _file(row)


def page(
    database: Engine, tenant: str, purpose: str | None, after: str | None, limit: int, ascending: bool, now: float
) -> Sequence[File]:
    """Up to `limit` files of a tenant in the order of their creation, from the one behind `after`."""
    place = (files.c.created_at, files.c.id)
    query = select(*_COLUMNS).where(*_visible(tenant, now)).limit(limit)
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:
        query = query.where(beyond(place, select(*place).where(files.c.id == after), ascending))
    query = query.order_by(*place) if ascending else query.order_by(*(column.desc() for column in place))
    with database.connect() as connection:
        return [_file(row) for row in connection.execute(query)]


def beyond(place: Sequence[Any], of: Any, ascending: bool) -> Any:
    """The condition that a row's place, an instant and an id, is behind the place that a query finds."""
    found = of.subquery()
    instant, name = (select(column).scalar_subquery() for column in found.c)
    first, second = place
    if ascending:
        return or_(first > instant, and_(first == instant, second > name))
    return or_(first < instant, and_(first == instant, second < name))


def remove(database: Engine, tenant: str, file_id: str, now: float) -> bool:
    """Whether the file was deleted; not if it does not exist, or if a batch that has not ended reads it."""
    with writing(database) as connection:
        gone = connection.execute(
            delete(files).where(files.c.id == file_id, *_visible(tenant, now), ~_is_input(file_id))
        )
        return gone.rowcount > 0


def total_size(database: Engine, tenant: str) -> int:
    """The size of all files of a tenant, in bytes."""
    with database.connect() as connection:
        query = select(func.coalesce(func.sum(files.c.size), 0)).where(files.c.tenant == tenant)
        return int(connection.execute(query).scalar_one())


def read(database: Engine, file_id: str, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
    """The content from `offset` on, `size` bytes of it, in pieces of up to PART_BYTES."""
    first, skip = divmod(offset, PART_BYTES)
    for number in count(first):
        if size is not None and size <= 0:
            return
        part = read_part(database, file_id, number)
        if part is None:
            return
        piece = part[skip:] if size is None else part[skip : skip + size]
        skip, size = 0, None if size is None else size - len(piece)
        yield piece


def read_part(database: Engine, file_id: str, number: int) -> bytes | None:
    """One part of the content; None behind the last one."""
    query = select(file_parts.c.content).where(file_parts.c.file_id == file_id, file_parts.c.number == number)
    with database.connect() as connection:
        found = connection.execute(query).scalar_one_or_none()
    return None if found is None else bytes(found)


def sweep(database: Engine, now: float) -> None:
    """Delete files that have expired, unless a batch reads them, and those whose upload was abandoned."""
    expired = and_(files.c.complete, files.c.expires_at < now)
    abandoned = and_(~files.c.complete, files.c.created_at < now - _INCOMPLETE_S)
    with writing(database) as connection:
        connection.execute(delete(files).where(or_(expired, abandoned), ~_is_input(files.c.id)))


def _visible(tenant: str, now: float) -> tuple[Any, ...]:
    return files.c.tenant == tenant, files.c.complete, files.c.expires_at >= now


def _is_input(file_id: Any) -> Any:
    """The condition that a batch that has not ended reads the file."""
    return select(batches.c.id).where(batches.c.input_file == file_id, batches.c.status.in_(OPEN)).exists()


def _file(row: Row[Any]) -> File:
    return File(**row._mapping)


def peeked(lines: Iterator[bytes]) -> Iterator[bytes] | None:
    """The iterator, or None if it has nothing."""
    first = next(lines, None)
    return None if first is None else chain([first], lines)
