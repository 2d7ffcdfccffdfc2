"""Encodes the chunks and errors of any number of streams as one frame from a model replica to an ingress.

A frame is a 4-byte length (big endian) and a msgpack list of `[stream, is_chunk, fields]`. In contrast to pickle,
reading a frame executes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final, NamedTuple

import msgpack

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
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError

LENGTH: Final = struct.Struct(">I")
# Far above the largest frame of one request: 65,536 log probabilities of a prompt, each with the text of its token.
MAX_FRAME_BYTES: Final = 64 * 2**20

Item = Chunk | ServeAppError


class Packed(NamedTuple):
    """An item of a frame that has not been decoded yet."""

    stream: int
    is_chunk: bool
    fields: list[Any]

    @property
    def elapsed_s(self) -> float | None:
        """The time of the last token since the arrival of the request; None for an item without tokens."""
        events = self.fields[0] if self.is_chunk else None
        return events[-1][2] if events else None


_ERRORS: Final = {kind.code: kind for kind in ServeAppError.__subclasses__()}
_DELTAS: Final = (TextDelta, ReasoningDelta, ToolCallDelta)


def pack(items: Iterable[tuple[int, Item]]) -> bytes:
    """A frame with its length. Each item has the number of its stream."""
    body: bytes = msgpack.packb([[stream, *_packed(item)] for stream, item in items], unicode_errors="surrogatepass")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> list[Packed]:
    """The items of a frame, which is given without its length. Raises ValueError for bytes that are not a frame."""
    try:
        items = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogatepass")
        return [Packed(*item) for item in items]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a frame of chunks: {error}") from None


def decode(packed: Packed, offset_s: float = 0.0) -> Item:
    """The item. `offset_s` is added to its times, which are relative to the arrival of the request."""
    if not packed.is_chunk:
        code, *arguments = packed.fields
        return _ERRORS.get(code, InternalError)(*arguments)
    events, prompt_tokens, queue_s, cached_tokens, prompt, embedding, began_ns = packed.fields
    return Chunk(
        tuple([_event(event, offset_s) for event in events]),
        prompt_tokens,
        queue_s + offset_s,
        cached_tokens,
        None if prompt is None else _prompt(prompt),
        None if embedding is None else tuple(embedding),
        began_ns,
    )


def outgoing(request: GenerationRequest, now: float) -> GenerationRequest:
    """The request with instants relative to `now`, for a process whose clock has another origin."""
    return replace(request, arrived=request.arrived - now, deadline=request.deadline - now)


def incoming(request: GenerationRequest, now: float) -> GenerationRequest:
    """The inverse of `outgoing`, in the process that received the request at `now`."""
    return replace(request, arrived=request.arrived + now, deadline=request.deadline + now)


def _packed(item: Item) -> tuple[bool, list[Any]]:
    if isinstance(item, ServeAppError):
        return False, [item.code, *item.args]
    prompt = None if item.prompt is None else _packed_prompt(item.prompt)
    events = [_packed_event(event) for event in item.events]
    return True, [
        events, item.prompt_tokens, item.queue_s, item.cached_tokens, prompt, item.embedding, item.began_ns
    ]  # fmt: skip


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
