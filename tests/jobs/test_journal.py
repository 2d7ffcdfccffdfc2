"""The properties of the journal that no line is lost and none is repeated, over each kind of database."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, select

from serve_app.core.tenants import ANYONE
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.jobs import batches, files, journal, output, tables
from serve_app.jobs.records import Batch, Chunk, Result, Status
from serve_app.jobs.tables import results

CHUNKS, LINES = 12, 4
NOW = 1_000_000.0


@pytest.fixture
def database(database_options: DatabaseOptions) -> Iterator[Engine]:
    database = open_database(database_options)
    yield database
    database.dispose()


def started(database: Engine) -> Batch:
    """A batch whose chunks can be claimed."""
    batch = batches.create(database, ANYONE, "/v1/completions", "file-1", {}, NOW, max_open=10)
    claimed = journal.claim_batch(database, "starter", NOW)
    assert claimed is not None
    assert (claimed.id, claimed.status) == (batch.id, Status.VALIDATING)
    found = [Chunk(batch.id, number, number * LINES, LINES, 0, 1) for number in range(CHUNKS)]
    journal.start(database, "starter", batch.id, found, NOW)
    return batch


def results_of(chunk: Chunk, content: str) -> list[Result]:
    numbers = range(chunk.first_line, chunk.first_line + chunk.lines)
    return [Result(chunk.batch_id, chunk.number, line, False, content) for line in numbers]


def contents(database: Engine) -> dict[int, str]:
    with database.connect() as connection:
        rows = connection.execute(select(results.c.line, results.c.content)).all()
    assert len({row.line for row in rows}) == len(rows)
    return {row.line: row.content for row in rows}


def test_workers_that_claim_at_the_same_time_get_different_chunks(database: Engine) -> None:
    started(database)

    def claim_all(owner: str) -> list[int]:
        numbers = []
        while claimed := journal.claim_chunk(database, owner, NOW + 1):
            numbers.append(claimed[1].number)
        return numbers

    with ThreadPoolExecutor(4) as pool:
        found = [number for numbers in pool.map(claim_all, "abcd") for number in numbers]
    # A worker that finds another one at work asks again later.
    while claimed := journal.claim_chunk(database, "e", NOW + 1):
        found.append(claimed[1].number)
    assert Counter(found) == Counter(range(CHUNKS))


def test_a_worker_that_lost_its_chunk_cannot_write(database: Engine) -> None:
    started(database)
    claimed = journal.claim_chunk(database, "slow", NOW)
    assert claimed is not None
    _, chunk = claimed
    journal.write(database, "slow", results_of(chunk, "slow")[:1], NOW)
    after = NOW + journal.LEASE_S + 1
    heir = None
    while heir is None or heir.number != chunk.number:
        found = journal.claim_chunk(database, "heir", after)
        assert found is not None
        heir = found[1]
    assert heir.answered == {chunk.first_line}
    assert (chunk.batch_id, chunk.number) not in journal.renew(database, "slow", after)
    journal.write(database, "slow", results_of(chunk, "slow"), after)
    assert contents(database) == {chunk.first_line: "slow"}
    journal.write(database, "heir", results_of(chunk, "heir"), after)
    journal.write(database, "heir", results_of(chunk, "heir again"), after)
    assert list(contents(database).values()) == ["slow", "heir", "heir", "heir"]


def test_a_batch_ends_when_all_lines_have_results_and_not_earlier(database: Engine) -> None:
    batch = started(database)
    while claimed := journal.claim_chunk(database, "w", NOW):
        assert journal.claim_batch(database, "w", NOW + 1) is None
        journal.write(database, "w", results_of(claimed[1], "x"), NOW)
    ending = journal.claim_batch(database, "w", NOW + 1)
    assert ending is not None
    assert (ending.id, ending.status, ending.outcome) == (batch.id, Status.FINALIZING, Status.COMPLETED)
    assert journal.claim_batch(database, "other", NOW + 2) is None, "the first worker holds it"
    again = journal.claim_batch(database, "other", NOW + journal.LEASE_S + 2)
    assert again is not None
    assert not journal.end(database, "w", ending, None, None, 0, NOW), "it has lost the batch"
    assert journal.end(database, "other", again, "file-2", None, 0, NOW)
    found = batches.find(database, "", batch.id)
    assert found is not None
    assert (found.status, found.completed, found.output_file) == (Status.COMPLETED, CHUNKS * LINES, "file-2")
    assert contents(database) == {}


def test_the_files_of_a_worker_that_lost_its_batch_are_not_seen(database: Engine) -> None:
    batch = started(database)
    while claimed := journal.claim_chunk(database, "w", NOW):
        journal.write(database, "w", results_of(claimed[1], "x"), NOW)
    slow = journal.claim_batch(database, "slow", NOW + 1)
    heir = journal.claim_batch(database, "heir", NOW + journal.LEASE_S + 2)
    assert slow is not None
    assert heir is not None
    for owner, one in (("slow", slow), ("heir", heir), ("slow", slow)):
        output.finish(database, owner, one, json.loads, NOW, NOW + 100)
    found = batches.find(database, "", batch.id)
    assert found is not None
    (file,) = files.page(database, "", None, None, 10, True, NOW)
    assert (file.id, found.completed) == (found.output_file, CHUNKS * LINES)
    assert b"".join(files.read(database, file.id)) == b"x\n" * CHUNKS * LINES
    with database.connect() as connection:
        assert len(connection.execute(select(tables.files)).all()) == 1


def test_results_that_come_after_a_batch_is_cancelled_are_dropped(database: Engine) -> None:
    batch = started(database)
    claimed = journal.claim_chunk(database, "w", NOW)
    assert claimed is not None
    batches.cancel(database, "", batch.id, NOW)
    assert journal.claim_chunk(database, "w", NOW) is None
    ending = journal.claim_batch(database, "ender", NOW + 1)
    assert ending is not None
    assert ending.status is Status.CANCELLING
    journal.write(database, "w", results_of(claimed[1], "late"), NOW + 1)
    assert contents(database) == {}
    assert journal.end(database, "ender", ending, None, None, 0, NOW + 1)
    journal.write(database, "w", results_of(claimed[1], "late"), NOW + 1)
    assert contents(database) == {}


def test_what_a_worker_gives_back_is_free_at_once(database: Engine) -> None:
    started(database)
    first = journal.claim_chunk(database, "w", NOW)
    assert first is not None
    journal.release(database, "w")
    again = journal.claim_chunk(database, "x", NOW + 0.1)
    assert again is not None
    assert again[1] == first[1]
