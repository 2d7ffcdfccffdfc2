"""Turns chunks into lists of plain values and back, for encodings such as msgpack."""

from __future__ import annotations

from typing import Any, Final

from serve_app.core.events import (
    Chunk,
    Delta,
    FinishReason,
    Logprobs,
    PromptDetails,
    ReasoningDelta,
    TextDelta,
    TextToken,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
)

_DELTAS: Final = (TextDelta, ReasoningDelta, ToolCallDelta)


def packed(chunk: Chunk) -> list[Any]:
    """The fields of a chunk. `replayed` is left out: a chunk of an engine is not, one of a cache always is."""
    prompt = None if chunk.prompt is None else _packed_prompt(chunk.prompt)
    events = [_packed_event(event) for event in chunk.events]
    return [
        events, chunk.prompt_tokens, chunk.queue_s, chunk.cached_tokens, prompt, chunk.embedding, chunk.began_ns
    ]  # fmt: skip


def packed_without_times(chunk: Chunk) -> list[Any]:
    """The fields of a chunk, with 0 for all times."""
    fields = packed(chunk)
    for event in fields[0]:
        event[2] = 0
    fields[2] = fields[6] = 0
    return fields


def unpacked(fields: list[Any], offset_s: float = 0.0) -> Chunk:
    """The chunk with these fields. `offset_s` is added to its times, which count from the request's arrival."""
    events, prompt_tokens, queue_s, cached_tokens, prompt, embedding, began_ns = fields
    return Chunk(
        tuple([_event(event, offset_s) for event in events]),
        prompt_tokens,
        queue_s + offset_s,
        cached_tokens,
        None if prompt is None else _prompt(prompt),
        None if embedding is None else tuple(embedding),
        began_ns,
    )


def last_elapsed_s(fields: list[Any]) -> float | None:
    """The time of the chunk's last token since the arrival of the request; None if the chunk has no tokens."""
    events = fields[0]
    return events[-1][2] if events else None


def _packed_event(event: TokenEvent) -> list[Any]:
    """Three fields if the others are empty, because most events have neither log probabilities nor deltas."""
    fields: list[Any] = [event.token_id, event.text, event.elapsed_s]
    rest = (event.finish_reason, event.logprobs, event.stopped_by, event.deltas)
    if rest == (None, None, None, None):
        return fields
    logprobs = None if event.logprobs is None else _packed_logprobs(event.logprobs)
    deltas = None
    if event.deltas is not None:
        deltas = [[_DELTAS.index(type(delta)), *_values(delta)] for delta in event.deltas]
    return [*fields, event.finish_reason, logprobs, event.stopped_by, deltas]


def _packed_logprobs(logprobs: Logprobs) -> list[Any]:
    return [_values(logprobs.chosen), [_values(token) for token in logprobs.top], logprobs.rank]


def _packed_prompt(prompt: PromptDetails) -> list[Any]:
    return [
        [_values(token) for token in prompt.tokens],
        prompt.text,
        [_packed_logprobs(one) for one in prompt.logprobs],
    ]


def _values(data: Delta | TokenLogprob | TextToken) -> list[Any]:
    return [getattr(data, name) for name in data.__slots__]


def _event(fields: list[Any], offset_s: float) -> TokenEvent:
    if len(fields) == 3:
        token_id, text, elapsed_s = fields
        return TokenEvent(token_id, text, elapsed_s + offset_s)
    token_id, text, elapsed_s, reason, logprobs, stopped_by, deltas = fields
    return TokenEvent(
        token_id,
        text,
        elapsed_s + offset_s,
        None if reason is None else FinishReason(reason),
        None if logprobs is None else _logprobs(logprobs),
        stopped_by,
        None if deltas is None else tuple([_DELTAS[kind](*values) for kind, *values in deltas]),
    )


def _logprobs(fields: list[Any]) -> Logprobs:
    chosen, top, rank = fields
    return Logprobs(TokenLogprob(*chosen), tuple([TokenLogprob(*token) for token in top]), rank)


def _prompt(fields: list[Any]) -> PromptDetails:
    tokens, text, logprobs = fields
    return PromptDetails(
        tuple([TextToken(*token) for token in tokens]), text, tuple([_logprobs(one) for one in logprobs])
    )
