"""Writes the output file and the error file of a batch that ends, and ends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from sqlalchemy import Engine

from serve_app.jobs import files, journal
from serve_app.jobs.input import Parse, custom_id_of, lines_of
from serve_app.jobs.lines import encode_missing
from serve_app.jobs.records import Batch, Chunk, Result, Status

PURPOSE = "batch_output"
_EXPIRED = "batch_expired", "The line was not run within the completion window. Submit it again in a new batch."
_CANCELLED = "batch_cancelled", "The batch was cancelled before the line was run."


def finish(database: Engine, owner: str, batch: Batch, parse: Parse, now: float, expires_at: float) -> Counter[str]:
    """End a batch that `owner` holds, with its files. Returns the number of lines without a result, by their code.

    Each line of the input is in one of the two files, in the order of the input. Nothing is changed if `owner` has
    lost the batch meanwhile: its files are deleted.
    """
    found = journal.chunks_of(database, batch.id)
    missing: Counter[str] = Counter()
    failed = 0

    def completed() -> Iterator[bytes]:
        for chunk in found:
            yield from _encoded(one for one in _sorted(database, chunk) if not one.failed)

    def errors() -> Iterator[bytes]:
        nonlocal failed
        for chunk in found:
            lines = [*(one for one in _sorted(database, chunk) if one.failed)]
            absent = _missing(database, batch, chunk, parse)
            failed += len(lines) + len(absent)
            missing.update({_reason(batch)[0]: len(absent)} if absent else {})
            yield from _encoded(sorted([*lines, *absent], key=lambda one: one.line))

    written: list[str | None] = []
    for name, lines in (("output", completed()), ("error", errors())):
        some = files.peeked(lines)
        tenant = batch.identity.tenant
        filename = f"{batch.id}_{name}.jsonl"
        file = some and files.save(database, tenant, PURPOSE, filename, some, now, expires_at, visible=False)
        written.append(file.id if file else None)
    if journal.end(database, owner, batch, written[0], written[1], failed, now):
        return missing
    files.discard(database, [file_id for file_id in written if file_id is not None])
    return Counter()


def _reason(batch: Batch) -> tuple[str, str]:
    return _CANCELLED if batch.status is Status.CANCELLING else _EXPIRED


def _missing(database: Engine, batch: Batch, chunk: Chunk, parse: Parse) -> list[Result]:
    """Results for the lines of a chunk that have none."""
    answered = journal.results_of(database, chunk)
    if len(answered) == chunk.lines:
        return []
    code, message = _reason(batch)
    absent = []
    for line, content in enumerate(lines_of(database, batch.input_file, chunk), chunk.first_line):
        if line not in answered:
            encoded = encode_missing(batch.id, line, custom_id_of(parse(content)), code, message)
            absent.append(Result(batch.id, chunk.number, line, True, encoded))
    return absent


def _sorted(database: Engine, chunk: Chunk) -> list[Result]:
    return [result for _, result in sorted(journal.results_of(database, chunk).items())]


def _encoded(found: Iterable[Result]) -> Iterator[bytes]:
    for one in found:
        yield one.content.encode() + b"\n"
