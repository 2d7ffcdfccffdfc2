"""Builds the output items of a response from the events of a model, and the events of a stream on the way."""

from __future__ import annotations

from collections.abc import Iterator

from serve_app.api.openai.chat_encoder import chosen_token
from serve_app.api.openai.responses import ChatChosenToken
from serve_app.api.openai_responses.events import ItemEvent
from serve_app.api.openai_responses.objects import ItemStatus, OutputItem
from serve_app.api.openai_responses.open_items import OpenCall, OpenItem, OpenMessage, OpenReasoning
from serve_app.core.events import Delta, FinishReason, ReasoningDelta, TextDelta, TokenEvent, ToolCallDelta


class Output:
    """The output of one response. Each change returns its events, whose numbers come from `numbers`.

    `logprobs` is whether texts have the log probabilities of their tokens. An item ends where one of another kind, or
    another call, begins. An answer without reasoning, text and calls is one empty message.
    """

    def __init__(self, numbers: Iterator[int], logprobs: bool) -> None:
        self._numbers = numbers
        self._logprobs = logprobs
        self._closed: list[OutputItem] = []
        self._open: OpenItem | None = None
        # Of tokens whose text is held back: the log probabilities belong to the item that the text turns out to be in.
        self._pending: list[ChatChosenToken] = []

    @property
    def items(self) -> list[OutputItem]:
        """The items so far. The one that is not complete has the status `incomplete`."""
        return [*self._closed, *([] if self._open is None else [self._open.item("incomplete")])]

    def add(self, event: TokenEvent) -> list[ItemEvent]:
        if self._logprobs and event.logprobs is not None:
            self._pending.append(chosen_token(event.logprobs))
        deltas = (TextDelta(event.text),) if event.deltas is None else event.deltas
        return [found for delta in deltas for found in self._add(delta)]

    def end(self, reason: FinishReason) -> list[ItemEvent]:
        """Close the last item, which is incomplete if the answer reached its maximum length."""
        begun = [] if self._closed or self._open else self._begin(OpenMessage(0, self._numbers))
        return begun + self._close("incomplete" if reason is FinishReason.LENGTH else "completed")

    def _add(self, delta: Delta) -> list[ItemEvent]:
        if isinstance(delta, ToolCallDelta):
            begun = self._begin(OpenCall(self._next_index, self._numbers, delta.name)) if delta.name else []
            assert isinstance(self._open, OpenCall), "the first part of a call has its name, and the others follow it"
            return begun + self._grow(delta.arguments)
        if not delta.text:
            return []
        kind = OpenReasoning if isinstance(delta, ReasoningDelta) else OpenMessage
        begun = [] if isinstance(self._open, kind) else self._begin(kind(self._next_index, self._numbers))
        return begun + self._grow(delta.text)

    def _grow(self, text: str) -> list[ItemEvent]:
        assert self._open is not None
        pending, self._pending = self._pending, []
        return [self._open.add(text, pending)] if text else []

    def _begin(self, item: OpenItem) -> list[ItemEvent]:
        closed = self._close("completed")
        self._open = item
        return closed + item.open()

    def _close(self, status: ItemStatus) -> list[ItemEvent]:
        if self._open is None:
            return []
        events, item = self._open.close(status), self._open.item(status)
        self._closed.append(item)
        self._open = None
        return events

    @property
    def _next_index(self) -> int:
        return len(self._closed) + (self._open is not None)
