"""Flattens a step into the rows of one forward pass, one row for each input token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from serve_app.engines.native.sequence import Step


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """Decode rows of consecutive slots; `positions` are the positions of their tokens."""

    first_row: int
    first_slot: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of one sequence from position `start`: a part of its prompt, or its last token and drafts."""

    first_row: int
    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """The rows of a step that use one LoRA adapter, and its weights as the runner made them."""

    weights: object
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Rows:
    """The N input rows of a step. `tokens`, `slots` and `positions` have one entry for each row.

    `runs` and `chunks` are the same rows grouped for attention. A token is sampled from the logits of each row of
    `sample_rows`. The logits of `logprob_rows` give log probabilities of prompt tokens; the last hidden states of
    `embedding_rows` are summed into embeddings. Rows that are not in `adapters` use the model without an adapter.
    """

    tokens: list[int]
    slots: list[int]
    positions: list[int]
    sample_rows: list[int]
    runs: list[DecodeRun]
    chunks: list[PromptChunk]
    logprob_rows: list[int] = field(default_factory=list)
    embedding_rows: list[int] = field(default_factory=list)
    adapters: list[AdapterRows] = field(default_factory=list)


def rows_of(step: Step) -> Rows:
    """The rows of a step, in the order of its advances."""
    rows = Rows([], [], [], [], [], [])
    of_adapter: dict[int, AdapterRows] = {}
    for advance in step.advances:
        sequence, first, start = advance.sequence, len(rows.tokens), advance.sequence.computed
        assert sequence.slot is not None
        rows.tokens.extend((*sequence.tokens[start : start + advance.count], *advance.drafts))
        rows.slots.extend([sequence.slot] * advance.rows)
        rows.positions.extend(range(start, start + advance.rows))
        if sequence.adapter is not None:
            weights = sequence.adapter.weights
            of_adapter.setdefault(id(weights), AdapterRows(weights, [])).rows.extend(range(first, first + advance.rows))
        if advance.samples:
            rows.sample_rows.extend(range(first + advance.count - 1, first + advance.rows))
        if sequence.readout is not None:
            target = rows.embedding_rows if sequence.embeds else rows.logprob_rows
            target.extend(first + row for row in advance.readout_rows)
        if advance.rows > 1:
            rows.chunks.append(PromptChunk(first, sequence.slot, start, advance.rows))
        else:
            _add_decode_row(rows, first, sequence.slot, start)
    rows.adapters.extend(of_adapter.values())
    return rows


def span(tokens: list[int], slot: int, start: int) -> Rows:
    """The rows of one sequence's tokens from position `start`; the last row is sampled."""
    count = len(tokens)
    chunks = [PromptChunk(0, slot, start, count)] if count > 1 else []
    runs = [] if chunks else [DecodeRun(0, slot, (start,))]
    return Rows(tokens, [slot] * count, list(range(start, start + count)), [count - 1], runs, chunks)


def _add_decode_row(rows: Rows, row: int, slot: int, position: int) -> None:
    last = rows.runs[-1] if rows.runs and not rows.chunks else None
    if last is not None and slot == last.first_slot + len(last.positions):
        rows.runs[-1] = replace(last, positions=(*last.positions, position))
    else:
        rows.runs.append(DecodeRun(row, slot, (position,)))
