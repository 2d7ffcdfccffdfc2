"""Which worker does what of the open batches, and the results of their lines.

A worker holds a batch, to validate or to end it, or a chunk of its lines, until a lease ends; it renews the lease. When
a worker is lost, its leases end and others go on. Two properties do not depend on clocks: only the owner of a chunk
can write results of its lines, in the transaction that checks the owner, and a line has at most one result by the
primary key of the table. All calls block; they raise sqlalchemy.exc.SQLAlchemyError.

Transactions lock the row of the batch before rows of its chunks, so that they do not wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict

from sqlalchemy import Connection, Engine, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from serve_app.database import writing
from serve_app.jobs import files
from serve_app.jobs.batches import batch_of
from serve_app.jobs.records import OPEN, Batch, Chunk, Fault, Result, Status
from serve_app.jobs.tables import batches, chunks, results

# The time for which a worker holds what it does not renew. It renews three times in this time.
LEASE_S = 10.0


def claim_batch(database: Engine, owner: str, now: float) -> Batch | None:
    """A batch to validate or to end, which `owner` holds now. To end one takes its chunks from their owners."""
    unfinished = select(chunks.c.batch_id).where(chunks.c.batch_id == batches.c.id, ~chunks.c.done).exists()
    due = or_(batches.c.status != Status.IN_PROGRESS, batches.c.expires_at < now, ~unfinished)
    query = (
        select(batches)
        .where(batches.c.status.in_(OPEN), batches.c.lease_until < now, due)
        .order_by(batches.c.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    with writing(database) as connection:
        row = connection.execute(query).first()
        if row is None:
            return None
        changes = {"owner": owner, "lease_until": now + LEASE_S}
        if row.status == Status.IN_PROGRESS:
            outcome = Status.EXPIRED if row.expires_at < now and _has_chunks(connection, row.id) else Status.COMPLETED
            changes |= {"status": Status.FINALIZING, "outcome": outcome, "finalizing_at": now, "progress_at": now}
        if row.status != Status.VALIDATING:
            connection.execute(update(chunks).where(chunks.c.batch_id == row.id).values(owner="", lease_until=0.0))
        connection.execute(update(batches).where(batches.c.id == row.id).values(**changes))
        return batch_of(connection.execute(select(batches).where(batches.c.id == row.id)).one())


def _has_chunks(connection: Connection, batch_id: str) -> bool:
    """Whether a batch has chunks that are not done."""
    query = select(chunks.c.number).where(chunks.c.batch_id == batch_id, ~chunks.c.done).limit(1)
    return connection.execute(query).first() is not None


def start(database: Engine, owner: str, batch_id: str, found: Sequence[Chunk], now: float) -> None:
    """The input of a batch is valid: its chunks can be claimed. Without an effect if `owner` has lost the batch."""
    with writing(database) as connection:
        changed = connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, batches.c.owner == owner, batches.c.status == Status.VALIDATING)
            .values(
                status=Status.IN_PROGRESS,
                total=sum(chunk.lines for chunk in found),
                in_progress_at=now,
                progress_at=now,
                owner="",
                lease_until=0.0,
            )
        )
        if changed.rowcount:
            names = ("batch_id", "number", "first_line", "lines", "offset", "size")
            connection.execute(insert(chunks), [{name: getattr(chunk, name) for name in names} for chunk in found])


def fail(database: Engine, owner: str, batch_id: str, faults: Sequence[Fault], now: float) -> None:
    """The input of a batch is not valid. Without an effect if `owner` has lost the batch."""
    with writing(database) as connection:
        connection.execute(
            update(batches)
            .where(batches.c.id == batch_id, batches.c.owner == owner, batches.c.status == Status.VALIDATING)
            .values(
                status=Status.FAILED,
                errors=json.dumps([asdict(fault) for fault in faults]),
                ended_at=now,
                owner="",
                lease_until=0.0,
            )
        )


def claim_chunk(database: Engine, owner: str, now: float) -> tuple[Batch, Chunk] | None:
    """A chunk to run, which `owner` holds now. Batches take turns: that of the latest claim is the last."""
    free = (~chunks.c.done, chunks.c.lease_until < now)
    query = (
        select(batches)
        .where(batches.c.status == Status.IN_PROGRESS, batches.c.expires_at >= now)
        .where(select(chunks.c.batch_id).where(chunks.c.batch_id == batches.c.id, *free).exists())
        .order_by(batches.c.claimed_at, batches.c.created_at)
        .limit(1)
        .with_for_update()
    )
    with writing(database) as connection:
        batch = connection.execute(query).first()
        if batch is None:
            return None
        next_one = select(chunks).where(chunks.c.batch_id == batch.id, *free).order_by(chunks.c.number).limit(1)
        row = connection.execute(next_one).first()
        if row is None:  # another worker has claimed it since the first statement began
            return None
        here = (chunks.c.batch_id == row.batch_id, chunks.c.number == row.number)
        connection.execute(update(batches).where(batches.c.id == batch.id).values(claimed_at=now))
        connection.execute(update(chunks).where(*here).values(owner=owner, lease_until=now + LEASE_S))
        lines = select(results.c.line).where(
            results.c.batch_id == row.batch_id,
            results.c.line >= row.first_line,
            results.c.line < row.first_line + row.lines,
        )
        answered = frozenset(connection.execute(lines).scalars())
    return batch_of(batch), Chunk(row.batch_id, row.number, row.first_line, row.lines, row.offset, row.size, answered)


def renew(database: Engine, owner: str, now: float) -> set[tuple[str, int]]:
    """Renew all leases of `owner`. The chunks, by batch and number, that it still holds; not those of ended batches."""
    running = select(batches.c.id).where(batches.c.status == Status.IN_PROGRESS)
    with writing(database) as connection:
        connection.execute(
            update(batches)
            .where(batches.c.owner == owner, batches.c.status.in_(OPEN))
            .values(lease_until=now + LEASE_S)
        )
        held = connection.execute(
            update(chunks)
            .where(chunks.c.owner == owner, ~chunks.c.done, chunks.c.batch_id.in_(running))
            .values(lease_until=now + LEASE_S)
            .returning(chunks.c.batch_id, chunks.c.number)
        )
        return {(batch_id, number) for batch_id, number in held}


def write(database: Engine, owner: str, found: Collection[Result], now: float) -> None:
    """Keep results, each once. Results of chunks that `owner` has lost are dropped: others run these lines."""
    by_chunk: dict[tuple[str, int], list[Result]] = {}
    for result in found:
        by_chunk.setdefault((result.batch_id, result.chunk), []).append(result)
    with writing(database) as connection:
        for batch_id in sorted({batch_id for batch_id, _ in by_chunk}):
            connection.execute(update(batches).where(batches.c.id == batch_id).values(progress_at=now))
        for (batch_id, number), some in sorted(by_chunk.items()):
            _write_chunk(connection, owner, batch_id, number, some)


def _write_chunk(connection: Connection, owner: str, batch_id: str, number: int, found: Sequence[Result]) -> None:
    here = (chunks.c.batch_id == batch_id, chunks.c.number == number)
    held = connection.execute(select(chunks).where(*here, chunks.c.owner == owner).with_for_update()).first()
    if held is None:
        return
    rows = [{"batch_id": batch_id, "line": one.line, "failed": one.failed, "content": one.content} for one in found]
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    connection.execute(dialect.insert(results).on_conflict_do_nothing(), rows)
    lines = (results.c.line >= held.first_line, results.c.line < held.first_line + held.lines)
    count = select(func.count()).select_from(results).where(results.c.batch_id == batch_id, *lines)
    if connection.execute(count).scalar_one() == held.lines:
        connection.execute(update(chunks).where(*here).values(done=True, owner="", lease_until=0.0))


def chunks_of(database: Engine, batch_id: str) -> list[Chunk]:
    """The chunks of a batch in their order, each with the lines that have a result."""
    query = select(chunks).where(chunks.c.batch_id == batch_id).order_by(chunks.c.number)
    with database.connect() as connection:
        rows = connection.execute(query).all()
    return [Chunk(row.batch_id, row.number, row.first_line, row.lines, row.offset, row.size) for row in rows]


def results_of(database: Engine, chunk: Chunk) -> dict[int, Result]:
    """The results of a chunk's lines."""
    query = select(results).where(
        results.c.batch_id == chunk.batch_id,
        results.c.line >= chunk.first_line,
        results.c.line < chunk.first_line + chunk.lines,
    )
    with database.connect() as connection:
        rows = connection.execute(query).all()
    return {row.line: Result(row.batch_id, chunk.number, row.line, bool(row.failed), row.content) for row in rows}


def end(
    database: Engine, owner: str, batch: Batch, output: str | None, errors: str | None, failed: int, now: float
) -> bool:
    """End a batch whose files are written, show them, and delete its chunks and results; False if `owner` has lost it.

    `failed` is the number of lines in the file of errors.
    """
    status = Status.CANCELLED if batch.status is Status.CANCELLING else Status(batch.outcome)
    completed = select(func.count()).select_from(results)
    with writing(database) as connection:
        completed = completed.where(results.c.batch_id == batch.id, ~results.c.failed)
        changed = connection.execute(
            update(batches)
            .where(batches.c.id == batch.id, batches.c.owner == owner, batches.c.status == batch.status)
            .values(
                status=status,
                output_file=output,
                error_file=errors,
                completed=connection.execute(completed).scalar_one(),
                failed=failed,
                ended_at=now,
                progress_at=now,
                owner="",
                lease_until=0.0,
            )
        )
        if not changed.rowcount:
            return False
        files.show(connection, [file_id for file_id in (output, errors) if file_id is not None])
        connection.execute(delete(results).where(results.c.batch_id == batch.id))
        connection.execute(delete(chunks).where(chunks.c.batch_id == batch.id))
        return True


def release(database: Engine, owner: str) -> None:
    """Give back all that a worker holds, which ends."""
    with writing(database) as connection:
        connection.execute(update(batches).where(batches.c.owner == owner).values(owner="", lease_until=0.0))
        connection.execute(update(chunks).where(chunks.c.owner == owner).values(owner="", lease_until=0.0))
