"""Encodes the events of a model as OpenAI's chat completions, with tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from serve_app.api.completion import CompletionState
from serve_app.api.openai.encoder import OpenAIEncoder
from serve_app.api.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChosenToken,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatToken,
    FunctionDelta,
    ToolCall,
    ToolCallPart,
)
from serve_app.api.responses import finite
from serve_app.api.sse import data
from serve_app.core.events import (
    Delta,
    FinishReason,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenEvent,
    TokenLogprob,
    ToolCallDelta,
)

_FINISH_REASONS: dict[FinishReason, ChatFinishReason] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class ChatEncoder(OpenAIEncoder):
    def to_response(self, states: Sequence[CompletionState], shown: Sequence[int]) -> ChatCompletion:
        body: ChatCompletion = {
            "id": f"chatcmpl-{self._id}",
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, states[number]) for index, number in enumerate(shown)],
            "usage": self.total_usage(states),
        }
        self.add_prompt(body, states[0].prompt)
        return body

    def opening(self, index: int) -> bytes:
        choice: ChatChunkChoice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        body = self._chunk([choice])
        self.add_prompt(body, self._states[index].prompt)
        return data(body)

    def event(self, event: TokenEvent, index: int) -> bytes:
        state = self._states[index]
        state.add_event(event)
        if event.deltas is None:
            return self._data(index, {"content": event.text}, [event], event.finish_reason)
        deltas = [self._encoded(delta) for delta in event.deltas if self._shows(delta)]
        if not deltas:
            if not (self._logprobs or self._show.token_ids or event.finish_reason is not None):
                return b""
            deltas = [{}]
        # The facts of the token come with its first delta, and the finish reason with its last one.
        tokens = [[event], *[[]] * (len(deltas) - 1)]
        reasons = [*[None] * (len(deltas) - 1), event.finish_reason]
        return b"".join(self._data(index, *parts) for parts in zip(deltas, tokens, reasons, strict=True))

    def usage_event(self) -> bytes:
        body = self._chunk([])
        body["usage"] = self.total_usage(self._states)
        return data(body)

    def _data(self, index: int, delta: ChatDelta, tokens: Sequence[TokenEvent], reason: FinishReason | None) -> bytes:
        """One event with a delta, the facts of `tokens` (one or none), and the reason if it is the last one."""
        state = self._states[index]
        choice: ChatChunkChoice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(tokens) if self._logprobs else None,
            "finish_reason": None if reason is None else self._finish_reason(reason, state),
        }
        if reason is not None:
            choice["stop_reason"] = state.stopped_by
        if self._show.token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        return data(self._chunk([choice]))

    def _choice(self, index: int, state: CompletionState) -> ChatChoice:
        choice: ChatChoice = {
            "index": index,
            "message": self._message(state),
            "logprobs": _logprobs(state.logprob_events) if self._logprobs else None,
            "finish_reason": self._finish_reason(state.reason, state),
            "stop_reason": state.stopped_by,
        }
        if self._show.token_ids:
            choice["token_ids"] = state.token_ids
        return choice

    def _message(self, state: CompletionState) -> AssistantMessage:
        message: AssistantMessage = {"role": "assistant", "content": state.content}
        if state.reasoning and self._show.reasoning:
            message["reasoning_content"] = message["reasoning"] = state.reasoning
        calls = state.calls
        if calls:
            message["content"] = state.content or None
        if calls and self._show.legacy_calls:
            name, arguments = calls[0]
            message["function_call"] = {"name": name, "arguments": arguments}
        elif calls:
            message["tool_calls"] = [_call(name, arguments) for name, arguments in calls]
        return message

    def _finish_reason(self, reason: FinishReason, state: CompletionState) -> ChatFinishReason:
        if reason is FinishReason.STOP and any(isinstance(delta, ToolCallDelta) for delta in state.deltas or ()):
            return "function_call" if self._show.legacy_calls else "tool_calls"
        return _FINISH_REASONS[reason]

    def _shows(self, delta: Delta) -> bool:
        return self._show.reasoning or not isinstance(delta, ReasoningDelta)

    def _encoded(self, delta: Delta) -> ChatDelta:
        match delta:
            case TextDelta():
                return {"content": delta.text}
            case ReasoningDelta():
                return {"reasoning_content": delta.text, "reasoning": delta.text}
            case ToolCallDelta() if self._show.legacy_calls:
                return {"function_call": _function_part(delta)}
            case ToolCallDelta():
                return {"tool_calls": [_call_part(delta)]}

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        body: ChatChunk = {
            "id": f"chatcmpl-{self._id}",
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._show.usage:
            body["usage"] = self.chunk_usage()
        return body


def _call(name: str, arguments: str) -> ToolCall:
    return {"id": _new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}


def _function_part(delta: ToolCallDelta) -> FunctionDelta:
    return {"name": delta.name, "arguments": delta.arguments} if delta.name else {"arguments": delta.arguments}


def _call_part(delta: ToolCallDelta) -> ToolCallPart:
    function = _function_part(delta)
    if not delta.name:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": _new_id(), "type": "function", "function": function}


def _new_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def _logprobs(events: Sequence[TokenEvent]) -> ChatLogprobs:
    return {"content": [chosen_token(event.logprobs) for event in events if event.logprobs is not None]}


def chosen_token(logprobs: Logprobs) -> ChatChosenToken:
    return {**_token(logprobs.chosen), "top_logprobs": [_token(token) for token in logprobs.top]}


def _token(token: TokenLogprob) -> ChatToken:
    raw = token.token.encode() if token.raw is None else token.raw
    return {"token": token.token, "bytes": list(raw), "logprob": finite(token.logprob)}
