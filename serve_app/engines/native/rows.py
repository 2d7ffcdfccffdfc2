"""A step as a model sees it: flat rows, one for every token that goes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from serve_app.engines.native.sequence import Step


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Decoding rows of consecutive slots; `positions` are those of the rows' new tokens."""

    first_row: int
    first_slot: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of one sequence, from position `start`: of its prompt, or its newest and guesses."""

    first_row: int
    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Lists of N: each row's token, its sequence's slot, its position there. `wanted` are rows to sample from.

    The same rows grouped: `runs` of decoding neighbours, and `chunks` of prompts. Of prompts that are read, `told` are
    rows whose logits say how likely the next token was, and `embedded` rows whose last hidden state is wanted.
    """

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    wanted: list[int]
    runs: list[DecodeRun]
    chunks: list[PromptChunk]
    told: list[int] = field(default_factory=list)
    embedded: list[int] = field(default_factory=list)


def rows_of(step: Step) -> Rows:
    """The rows of a step, decoding sequences first as it has them."""
    rows = Rows([], [], [], [], [], [])
    for advance in step.advances:
        sequence, first, start = advance.sequence, len(rows.tokens), advance.sequence.computed
        assert sequence.slot is not None
        rows.tokens.extend((*sequence.tokens[start : start + advance.count], *advance.drafts))
        rows.slots.extend([sequence.slot] * advance.rows)
        rows.positions.extend(range(start, start + advance.rows))
        if advance.samples:
            rows.wanted.extend(range(first + advance.count - 1, first + advance.rows))
        if sequence.reading is not None:
            read = rows.embedded if sequence.embeds else rows.told
            read.extend(first + row for row in advance.reads)
        if advance.rows > 1:
            rows.chunks.append(PromptChunk(first, sequence.slot, start, advance.rows))
        else:
            _decode(rows, first, sequence.slot, start)
    return rows


def span(tokens: list[int], slot: int, start: int) -> Rows:
    """The rows of one sequence's tokens from `start`, the last one wanted."""
    count = len(tokens)
    chunks = [PromptChunk(0, slot, start, count)] if count > 1 else []
    runs = [] if chunks else [DecodeRun(0, slot, (start,))]
    return Rows(tokens, [slot] * count, list(range(start, start + count)), [count - 1], runs, chunks)


def _decode(rows: Rows, row: int, slot: int, position: int) -> None:
    last = rows.runs[-1] if rows.runs and not rows.chunks else None
    if last is not None and slot == last.first_slot + len(last.positions):
        rows.runs[-1] = replace(last, positions=(*last.positions, position))
    else:
        rows.runs.append(DecodeRun(row, slot, (position,)))
