"""Reads the input file of a batch: checks its lines, divides it into chunks, and reads the lines of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import Engine

from serve_app.errors import ServeAppError
from serve_app.jobs import files
from serve_app.jobs.records import Chunk, Fault

# Lines of a chunk: a worker claims so many at a time.
LINES_PER_CHUNK = 32
_MAX_CUSTOM_ID = 512
# More faults are not reported.
_MAX_FAULTS = 100

Parse = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the lines of a batch must meet: its endpoint, the limits, and `parse`, which reads the JSON of a line.

    `parse` raises ServeAppError.
    """

    endpoint: str
    max_lines: int
    max_line_bytes: int
    parse: Parse


class InvalidInput(Exception):
    """The input file cannot be run."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(faults)
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an input file, without its end. `offset` is in bytes, `number` counts all lines from 1."""

    content: bytes
    offset: int
    number: int


def chunks_of_input(batch_id: str, content: Iterable[bytes], rules: Rules) -> list[Chunk]:
    """The chunks of an input file. Raises InvalidInput with the faults of its lines."""
    found: list[Chunk] = []
    faults: list[Fault] = []
    custom_ids: set[str] = set()
    pending: list[Line] = []
    for total, line in enumerate(_lines(content, rules.max_line_bytes), 1):
        fault = _check(line, rules, custom_ids)
        if fault is not None:
            faults.append(fault)
        if len(faults) == _MAX_FAULTS:
            break
        if total > rules.max_lines:
            message = f"The file has more than {rules.max_lines} lines. Divide it into several batches."
            raise InvalidInput([Fault("too_many_lines", message)])
        pending.append(line)
        if len(pending) == LINES_PER_CHUNK:
            found.append(_chunk(batch_id, found, pending))
            pending = []
    if faults:
        raise InvalidInput(faults)
    if pending:
        found.append(_chunk(batch_id, found, pending))
    if not found:
        raise InvalidInput([Fault("empty_file", "The file has no lines. Upload one request in a line.")])
    return found


def lines_of(database: Engine, input_file: str, chunk: Chunk) -> list[bytes]:
    """The lines of a chunk, without blank ones."""
    content = b"".join(files.read(database, input_file, chunk.offset, chunk.size))
    return [line for line in content.split(b"\n") if line.strip()]


def custom_id_of(document: object) -> str:
    """The `custom_id` of a line that has been checked."""
    assert isinstance(document, dict), "the line has been checked"
    return str(document["custom_id"])


def _chunk(batch_id: str, before: list[Chunk], lines: list[Line]) -> Chunk:
    first = before[-1].first_line + before[-1].lines if before else 0
    size = lines[-1].offset + len(lines[-1].content) - lines[0].offset
    return Chunk(batch_id, len(before), first, len(lines), lines[0].offset, size)


def _lines(content: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """The lines that are not blank. A line longer than `max_bytes` is cut to one byte more."""
    held, offset, number = b"", 0, 1
    for piece in content:
        *whole, rest = piece.split(b"\n")
        if whole:
            whole[0] = held + whole[0]
            for line in whole:
                if line.strip():
                    yield Line(line[: max_bytes + 1], offset, number)
                offset += len(line) + 1
                number += 1
            held = rest
        else:
            held += rest
        if len(held) > 2 * max_bytes + files.PART_BYTES:
            yield Line(held[: max_bytes + 1], offset, number)
            return
    if held.strip():
        yield Line(held[: max_bytes + 1], offset, number)


def _check(line: Line, rules: Rules, custom_ids: set[str]) -> Fault | None:
    """The fault of a line, if it has one; else its id is one of `custom_ids` afterwards."""
    if len(line.content) > rules.max_line_bytes:
        return Fault("line_too_long", f"The line has more than {rules.max_line_bytes} bytes.", line.number)
    try:
        document = rules.parse(line.content)
    except ServeAppError as error:
        return Fault("invalid_json_line", error.message.replace("The body", "The line"), line.number)
    if not isinstance(document, dict):
        return Fault("invalid_json_line", "The line should be a JSON object.", line.number)
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        message = f"'custom_id' should be a text of 1 to {_MAX_CUSTOM_ID} characters."
        return Fault("invalid_custom_id", message, line.number, "custom_id")
    if custom_id in custom_ids:
        return Fault("duplicate_custom_id", "An earlier line has the same 'custom_id'.", line.number, "custom_id")
    custom_ids.add(custom_id)
    return _check_request(document, line.number, rules.endpoint)


def _check_request(document: dict[str, object], number: int, endpoint: str) -> Fault | None:
    if document.get("method") != "POST":
        return Fault("invalid_method", "'method' should be \"POST\".", number, "method")
    if document.get("url") != endpoint:
        return Fault("mismatched_url", f"'url' should be the endpoint of the batch, {endpoint}.", number, "url")
    body = document.get("body")
    if not isinstance(body, dict):
        return Fault("invalid_body", "'body' should be a JSON object.", number, "body")
    if body.get("stream"):
        return Fault("invalid_body", "A line of a batch cannot be streamed. Leave 'stream' out.", number, "body.stream")
    return None
