"""The chunks of an input file are its lines, however its content arrives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.api.body import parse_document
from serve_app.jobs.input import LINES_PER_CHUNK, InvalidInput, Rules, chunks_of_input

from .service import chat_line

RULES = Rules("/v1/chat/completions", max_lines=1000, max_line_bytes=4000, parse=parse_document)


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 3 * LINES_PER_CHUNK + 1),
    blanks=st.lists(st.integers(0, 100), max_size=10),
    end=st.sampled_from([b"\n", b"\r\n"]),
    closed=st.booleans(),
    size=st.integers(1, 500),
    mark=st.booleans(),
)
def test_the_ranges_of_the_chunks_have_all_lines_once(
    count: int, blanks: list[int], end: bytes, closed: bool, size: int, mark: bool
) -> None:
    lines = [json.dumps(chat_line(number, "ü" * (number % 7)), ensure_ascii=False).encode() for number in range(count)]
    spread = [line for number, line in enumerate(lines) for line in (*[b" "] * blanks.count(number), line)]
    content = (b"\xef\xbb\xbf" if mark and 0 not in blanks else b"") + end.join(spread) + (end if closed else b"")
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    found = chunks_of_input("b", pieces, RULES)
    assert [chunk.number for chunk in found] == list(range(len(found)))
    read: list[object] = []
    for chunk in found:
        assert chunk.first_line == len(read)
        part = content[chunk.offset : chunk.offset + chunk.size]
        some = [parse_document(line) for line in part.split(b"\n") if line.strip()]
        assert len(some) == chunk.lines <= LINES_PER_CHUNK
        read += some
    assert read == [json.loads(line) for line in lines]


def test_a_file_without_line_ends_is_not_held_in_memory() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 100_000
            yield b"x" * 100_000

    with pytest.raises(InvalidInput) as refused:
        chunks_of_input("b", endless(), RULES)  # type: ignore[arg-type]
    assert [fault.code for fault in refused.value.faults] == ["line_too_long"]
    assert taken < 1_000_000


def test_the_faults_of_a_file_are_bounded() -> None:
    with pytest.raises(InvalidInput) as refused:
        chunks_of_input("b", [b"x\n" * 100_000], RULES)
    assert len(refused.value.faults) == 100
    assert [fault.line for fault in refused.value.faults] == list(range(1, 101))
