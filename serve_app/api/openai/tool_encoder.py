"""OpenAI's answers of a chat whose model may call tools."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from serve_app.api.completion import CompletionState
from serve_app.api.openai.encoder import ChatEncoder, Json
from serve_app.api.openai.schema import Show
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import GenerationRequest
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_parser import Arguments, Begun, CallParser, Content, News, parse


class ToolEncoder(ChatEncoder):
    """A stream has a frame for each piece of text or of a call, and none for a token that makes neither."""

    def __init__(
        self,
        id: str,
        requests: Sequence[GenerationRequest],
        created: int,
        include_usage: bool,
        show: Show,
        syntax: ToolCallFormat,
    ) -> None:
        super().__init__(id, requests, created, include_usage, show)
        self._syntax = syntax
        self._turns = [_Turn(syntax) for _ in requests]

    def answer(self, tally: CompletionState) -> Json:
        content, calls = parse(self._syntax, tally.text)
        message: Json = {"role": "assistant", "content": content or (None if calls else "")}
        if calls:
            message["tool_calls"] = [_call(call.name, call.arguments) for call in calls]
        return {"message": message}

    def _frame(self, event: TokenEvent, index: int) -> bytes:
        self._tallies[index].count(event)
        deltas = self._turns[index].deltas(event)
        tells_tokens = self._request.params.logprobs is not None or self._show.token_ids
        if not deltas and not tells_tokens and event.finish_reason is None:
            return b""
        first, *others = deltas or [{}]
        told: list[tuple[Json, list[TokenEvent]]] = [(first, [event]), *((delta, []) for delta in others)]
        reasons = [None] * len(others) + [event.finish_reason]
        frames = []
        for (delta, events), reason in zip(told, reasons, strict=True):
            choice = self._choice(index, {"delta": delta}, events, 0, reason)
            choice |= self._beside([one.token_id for one in events], reason, event.stopped_by)
            frames.append(self.data(choice))
        return b"".join(frames)

    def _choice(
        self, index: int, said: Json, events: Sequence[TokenEvent], offset: int, finish: FinishReason | None
    ) -> Json:
        choice = super()._choice(index, said, events, offset, finish)
        message = said.get("message")
        called = "tool_calls" in message if isinstance(message, dict) else self._turns[index].calls > 0
        return choice | {"finish_reason": "tool_calls"} if called and finish is FinishReason.STOP else choice


class _Turn:
    """One answer's stream, with the number of its calls so far."""

    def __init__(self, syntax: ToolCallFormat) -> None:
        self._parser = CallParser(syntax)
        self.calls = 0

    def deltas(self, event: TokenEvent) -> list[Json]:
        news = self._parser.feed(event.text)
        if event.finish_reason is not None:
            news += self._parser.end()
        return [self._delta(one) for one in news]

    def _delta(self, news: News) -> Json:
        match news:
            case Content(text):
                return {"content": text}
            case Begun(name):
                self.calls += 1
                return {"tool_calls": [{"index": self.calls - 1} | _call(name, "")]}
            case Arguments(text):
                return {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": text}}]}


def _call(name: str, arguments: str) -> Json:
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
