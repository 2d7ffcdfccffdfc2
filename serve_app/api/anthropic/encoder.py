"""Encodes the events of a model as Anthropic's messages: as a whole answer, and as a stream of content blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from uuid import uuid4

from pydantic_core import from_json

from serve_app.api.anthropic.responses import (
    AnswerBlock,
    AnthropicMessage,
    AnthropicUsage,
    BlockPiece,
    MessageEvent,
    StopReason,
    anthropic_error,
)
from serve_app.api.completion import CompletionState
from serve_app.api.sse import named
from serve_app.core.events import Chunk, Delta, FinishReason, ReasoningDelta, TextDelta, TokenEvent, ToolCallDelta
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

# Clients want a signature for thinking blocks, and send it back. The service has no use for it.
SIGNATURE = "c2VydmVfYXBw"


class MessagesEncoder:
    """Encodes the answer to a request. `request_id` is the id that an error event quotes.

    With `omit_thinking` the thinking blocks are empty.
    """

    def __init__(self, id: str, request: GenerationRequest, request_id: str, omit_thinking: bool) -> None:
        self._id = id
        self._request = request
        self._request_id = request_id
        self._omit_thinking = omit_thinking
        self._state = CompletionState()
        # The delta that began the block that the stream is in, and the number of blocks that have begun.
        self._first: Delta | None = None
        self._blocks = 0

    def to_response(self, state: CompletionState) -> AnthropicMessage:
        deltas = [TextDelta(state.text)] if state.deltas is None else state.deltas
        blocks = [list(group) for _, group in groupby(filter(_has_content, deltas), _block_key)]
        body = self._message([self._block(block) for block in blocks], state)
        body["stop_reason"] = self._stop_reason(state)
        body["stop_sequence"] = _stop_sequence(state)
        return body

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        state = self._state
        state.add_facts(chunk)
        events: list[MessageEvent] = []
        if chunk.events and not state.tokens:
            events.append({"type": "message_start", "message": self._message([], state)})
        for event in chunk.events:
            state.add_event(event)
            for delta in filter(_has_content, _deltas(event)):
                events += self._delta(delta)
        return _encoded(events)

    def end(self) -> bytes:
        state = self._state
        return _encoded(
            [
                *self._end_of_block(),
                {
                    "type": "message_delta",
                    "delta": {"stop_reason": self._stop_reason(state), "stop_sequence": _stop_sequence(state)},
                    "usage": _usage(state),
                },
                {"type": "message_stop"},
            ]
        )

    def failure(self, error: ServeAppError) -> bytes:
        return _encoded([anthropic_error(error, self._request_id)])

    def _message(self, content: list[AnswerBlock], state: CompletionState) -> AnthropicMessage:
        return {
            "id": f"msg_{self._id}",
            "type": "message",
            "role": "assistant",
            "model": self._request.served_name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(state),
        }

    def _block(self, deltas: Sequence[Delta]) -> AnswerBlock:
        """A whole block of consecutive deltas."""
        block = _empty_block(deltas[0])
        match block["type"]:
            case "text":
                block["text"] = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
            case "thinking":
                block["signature"] = SIGNATURE
                if not self._omit_thinking:
                    block["thinking"] = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
            case "tool_use":
                arguments = "".join(delta.arguments for delta in deltas if isinstance(delta, ToolCallDelta))
                block["input"] = _parsed(arguments)
        return block

    def _delta(self, delta: Delta) -> Iterator[MessageEvent]:
        """The events of a delta, which can end a block and begin the next one."""
        if self._first is None or _block_key(delta) != _block_key(self._first):
            yield from self._end_of_block()
            self._first = delta
            self._blocks += 1
            yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": _empty_block(delta)}
        piece = self._piece(delta)
        if piece is not None:
            yield {"type": "content_block_delta", "index": self._blocks - 1, "delta": piece}

    def _end_of_block(self) -> Iterator[MessageEvent]:
        if self._first is None:
            return
        index = self._blocks - 1
        if isinstance(self._first, ReasoningDelta):
            signature: BlockPiece = {"type": "signature_delta", "signature": SIGNATURE}
            yield {"type": "content_block_delta", "index": index, "delta": signature}
        yield {"type": "content_block_stop", "index": index}

    def _piece(self, delta: Delta) -> BlockPiece | None:
        match delta:
            case TextDelta():
                return {"type": "text_delta", "text": delta.text}
            case ReasoningDelta():
                return None if self._omit_thinking else {"type": "thinking_delta", "thinking": delta.text}
            case ToolCallDelta():
                arguments = delta.arguments
                return {"type": "input_json_delta", "partial_json": arguments} if arguments else None

    def _stop_reason(self, state: CompletionState) -> StopReason:
        if state.reason is FinishReason.LENGTH:
            # An answer that is shorter than it may be has reached the end of the context.
            reached = state.tokens >= (self._request.params.max_tokens or 0)
            return "max_tokens" if reached else "model_context_window_exceeded"
        if _stop_sequence(state) is not None:
            return "stop_sequence"
        return "tool_use" if state.calls else "end_turn"


def ping(state: str) -> bytes:
    """The heartbeat of a stream. Anthropic's clients skip it; `state` is not shown."""
    return _encoded([{"type": "ping"}])


def _encoded(events: Iterable[MessageEvent]) -> bytes:
    return b"".join(named(event["type"], event) for event in events)


def _deltas(event: TokenEvent) -> Sequence[Delta]:
    return (TextDelta(event.text),) if event.deltas is None else event.deltas


def _has_content(delta: Delta) -> bool:
    return bool(delta.name or delta.arguments) if isinstance(delta, ToolCallDelta) else bool(delta.text)


def _block_key(delta: Delta) -> object:
    """Consecutive deltas with the same key make up one block."""
    return delta.index if isinstance(delta, ToolCallDelta) else type(delta)


def _empty_block(delta: Delta) -> AnswerBlock:
    """The block that a delta begins."""
    match delta:
        case TextDelta():
            return {"type": "text", "text": ""}
        case ReasoningDelta():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case ToolCallDelta():
            return {"type": "tool_use", "id": f"toolu_{uuid4().hex[:24]}", "name": delta.name, "input": {}}


def _parsed(arguments: str) -> dict[str, object]:
    """The JSON object, without a string at the end that was cut off; {} if the text is no JSON object."""
    try:
        parsed = from_json(arguments, allow_inf_nan=False, allow_partial=True)
        json.dumps(parsed, allow_nan=False)  # raises ValueError for a number that is too large, for example 1e999
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _stop_sequence(state: CompletionState) -> str | None:
    return state.stopped_by if isinstance(state.stopped_by, str) else None


def _usage(state: CompletionState) -> AnthropicUsage:
    usage: AnthropicUsage = {
        "input_tokens": state.prompt_tokens - state.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": state.cached_tokens,
        "output_tokens": state.tokens,
    }
    if state.reasoning_tokens:
        usage["output_tokens_details"] = {"thinking_tokens": state.reasoning_tokens}
    return usage
