from __future__ import annotations

from hypothesis import given, strategies as st

from serve_app.core.events import Logprobs, TokenLogprob
from serve_app.engines.native.rows import DecodeRun, PromptChunk, rows_of, span
from serve_app.engines.native.sequence import Advance, PromptReadout, Step

from .helpers import sequence


def advance(tokens: bytes, slot: int, computed: int, count: int) -> Advance:
    placed = sequence(list(tokens))
    placed.slot, placed.computed = slot, computed
    return Advance(placed, count)


def decode(slot: int, length: int) -> Advance:
    """The advance of a decoding sequence of `length` tokens."""
    return advance(b"x" * length, slot, length - 1, 1)


def test_decode_rows_of_consecutive_slots_are_one_run() -> None:
    rows = rows_of(Step((decode(3, 7), decode(4, 2), decode(6, 5))))
    assert rows.runs == [DecodeRun(0, 3, (6, 1)), DecodeRun(2, 6, (4,))]
    assert (rows.slots, rows.positions, rows.chunks) == ([3, 4, 6], [6, 1, 4], [])
    assert rows.sample_rows == [0, 1, 2]


def test_a_prompt_is_a_chunk_and_only_its_last_token_is_sampled() -> None:
    rows = rows_of(Step((advance(b"abcdef", 2, 0, 4), advance(b"xyz", 0, 1, 2))))
    assert bytes(rows.tokens) == b"abcdyz"
    assert rows.chunks == [PromptChunk(0, 2, 0, 4), PromptChunk(4, 0, 1, 2)]
    assert (rows.slots, rows.positions) == ([2, 2, 2, 2, 0, 0], [0, 1, 2, 3, 1, 2])
    assert (rows.sample_rows, rows.runs) == ([5], [])


def test_a_single_prompt_token_after_chunks_starts_a_new_run() -> None:
    rows = rows_of(Step((decode(0, 3), advance(b"abc", 5, 0, 2), advance(b"abc", 1, 0, 1))))
    assert rows.runs == [DecodeRun(0, 0, (2,)), DecodeRun(3, 1, (0,))]
    assert rows.chunks == [PromptChunk(1, 5, 0, 2)]


def test_only_rows_that_are_not_collected_yet_are_read_out() -> None:
    """The first prompt was collected up to its third row and starts again; the second one is sampled as well."""
    restarted, continued = advance(b"abcdef", 2, 0, 5), advance(b"xyz", 0, 1, 2)
    restarted.sequence.embeds, restarted.sequence.readout = True, PromptReadout(6)
    restarted.sequence.readout.add_states([1.0], 3)
    continued.sequence.readout = PromptReadout(2)
    continued.sequence.readout.add_logprobs([Logprobs(TokenLogprob(ord("y"), "y", 0.0), ())])
    rows = rows_of(Step((decode(7, 4), restarted, continued)))
    assert (rows.sample_rows, rows.logprob_rows, rows.embedding_rows) == ([0, 7], [6], [4, 5])


def test_a_span_equals_a_step_of_one_sequence() -> None:
    assert span(list(b"cd"), slot=4, start=2) == rows_of(Step((advance(b"abcd", 4, 2, 2),)))
    assert span(list(b"d"), slot=4, start=3) == rows_of(Step((advance(b"abcd", 4, 3, 1),)))


ADVANCES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8), st.integers(1, 4)), max_size=8)


@given(shapes=ADVANCES)
def test_every_row_is_in_exactly_one_group_with_its_slot_and_position(shapes: list[tuple[int, int, int]]) -> None:
    """For every order of decoding sequences and prompts."""
    advances = [
        advance(b"x" * length, slot, min(computed, length - 1), min(count, length - min(computed, length - 1)))
        for slot, (length, computed, count) in enumerate(shapes)
    ]
    rows = rows_of(Step(tuple(advances)))
    grouped = {run.first_row + i: (run.first_slot + i, p) for run in rows.runs for i, p in enumerate(run.positions)}
    grouped |= {chunk.first_row + i: (chunk.slot, chunk.start + i) for chunk in rows.chunks for i in range(chunk.count)}
    assert grouped == dict(enumerate(zip(rows.slots, rows.positions, strict=True)))
    assert sum(len(r.positions) for r in rows.runs) + sum(c.count for c in rows.chunks) == len(rows.tokens)
    assert len(rows.sample_rows) == sum(a.samples for a in advances)
