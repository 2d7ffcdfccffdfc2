from __future__ import annotations

from hypothesis import given, strategies as st

from serve_app.core.events import Logprobs, TokenLogprob
from serve_app.engines.native.rows import DecodeRun, PromptChunk, rows_of, span
from serve_app.engines.native.sequence import Advance, Reading, Step

from .helpers import sequence


def advance(tokens: bytes, slot: int, computed: int, count: int) -> Advance:
    placed = sequence(list(tokens))
    placed.slot, placed.computed = slot, computed
    return Advance(placed, count)


def decode(slot: int, length: int) -> Advance:
    """One whose newest token is still to come in."""
    return advance(b"x" * length, slot, length - 1, 1)


def test_neighbours_that_decode_are_one_run() -> None:
    rows = rows_of(Step((decode(3, 7), decode(4, 2), decode(6, 5))))
    assert rows.runs == [DecodeRun(0, 3, (6, 1)), DecodeRun(2, 6, (4,))]
    assert (rows.slots, rows.positions, rows.chunks) == ([3, 4, 6], [6, 1, 4], [])
    assert rows.wanted == [0, 1, 2]


def test_a_prompt_is_a_chunk_and_only_its_last_token_is_sampled_from() -> None:
    rows = rows_of(Step((advance(b"abcdef", 2, 0, 4), advance(b"xyz", 0, 1, 2))))
    assert bytes(rows.tokens) == b"abcdyz"
    assert rows.chunks == [PromptChunk(0, 2, 0, 4), PromptChunk(4, 0, 1, 2)]
    assert (rows.slots, rows.positions) == ([2, 2, 2, 2, 0, 0], [0, 1, 2, 3, 1, 2])
    assert (rows.wanted, rows.runs) == ([5], [])


def test_a_last_token_of_a_prompt_behind_chunks_joins_no_run_of_those_before_them() -> None:
    rows = rows_of(Step((decode(0, 3), advance(b"abc", 5, 0, 2), advance(b"abc", 1, 0, 1))))
    assert rows.runs == [DecodeRun(0, 0, (2,)), DecodeRun(3, 1, (0,))]
    assert rows.chunks == [PromptChunk(1, 5, 0, 2)]


def test_rows_that_tell_of_a_prompt_are_those_that_are_not_known_yet() -> None:
    """One was computed before, up to its fourth row, and begins again; of the other the last token is sampled too."""
    again, told = advance(b"abcdef", 2, 0, 5), advance(b"xyz", 0, 1, 2)
    again.sequence.embeds, again.sequence.reading = True, Reading(6)
    again.sequence.reading.add_states([1.0], 3)
    told.sequence.reading = Reading(2)
    told.sequence.reading.add_logprobs([Logprobs(TokenLogprob(ord("y"), "y", 0.0), ())])
    rows = rows_of(Step((decode(7, 4), again, told)))
    assert (rows.wanted, rows.told, rows.embedded) == ([0, 7], [6], [4, 5])


def test_a_span_is_what_a_step_of_one_sequence_would_be() -> None:
    assert span(list(b"cd"), slot=4, start=2) == rows_of(Step((advance(b"abcd", 4, 2, 2),)))
    assert span(list(b"d"), slot=4, start=3) == rows_of(Step((advance(b"abcd", 4, 3, 1),)))


ADVANCES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 4)), max_size=8)


@given(shapes=ADVANCES)
def test_every_row_belongs_to_exactly_one_group_that_says_the_same_of_it(shapes: list[tuple[int, int, int]]) -> None:
    """Whatever the order of decoders and prompts."""
    advances = [
        advance(b"x" * length, slot, min(computed, length - 1), min(count, length - min(computed, length - 1)))
        for slot, (length, computed, count) in enumerate(shapes)
    ]
    rows = rows_of(Step(tuple(advances)))
    told = {run.first_row + i: (run.first_slot + i, p) for run in rows.runs for i, p in enumerate(run.positions)}
    told |= {chunk.first_row + i: (chunk.slot, chunk.start + i) for chunk in rows.chunks for i in range(chunk.count)}
    assert told == dict(enumerate(zip(rows.slots, rows.positions, strict=True)))
    assert sum(len(r.positions) for r in rows.runs) + sum(c.count for c in rows.chunks) == len(rows.tokens)
    assert len(rows.wanted) == sum(a.samples for a in advances)
