"""Output items that still grow, with the events by which a client follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from uuid import uuid4

from serve_app.api.openai.responses import ChatChosenToken
from serve_app.api.openai_responses.events import (
    ContentPartEvent,
    ItemEvent,
    ItemEventType,
    ItemPlace,
    OutputItemEvent,
    PartEventType,
    PartPlace,
)
from serve_app.api.openai_responses.objects import (
    FunctionCallObject,
    ItemStatus,
    OutputItem,
    OutputMessageObject,
    OutputText,
    ReasoningObject,
    ReasoningText,
)


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


class OpenItem(ABC):
    """An output item that still grows. `index` is its place in the output, `numbers` are the events' numbers."""

    prefix: str

    def __init__(self, index: int, numbers: Iterator[int]) -> None:
        self._index = index
        self._numbers = numbers
        self._id = new_id(self.prefix)
        self._texts: list[str] = []

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """The item so far; without its content while it is in progress."""

    @abstractmethod
    def open(self) -> list[ItemEvent]:
        """The events before the first delta."""

    @abstractmethod
    def add(self, text: str, logprobs: list[ChatChosenToken]) -> ItemEvent:
        """Take in a part of the text. Returns its event."""

    @abstractmethod
    def close(self, status: ItemStatus) -> list[ItemEvent]:
        """The events after the last delta."""

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _place(self) -> ItemPlace:
        """The fields of a new event about this item."""
        return {"sequence_number": next(self._numbers), "item_id": self._id, "output_index": self._index}

    def _part_place(self) -> PartPlace:
        return {**self._place(), "content_index": 0}

    def _added(self) -> OutputItemEvent:
        return self._item_event("response.output_item.added", "in_progress")

    def _done(self, status: ItemStatus) -> OutputItemEvent:
        return self._item_event("response.output_item.done", status)

    def _item_event(self, kind: ItemEventType, status: ItemStatus) -> OutputItemEvent:
        return {
            "type": kind,
            "sequence_number": next(self._numbers),
            "output_index": self._index,
            "item": self.item(status),
        }


class _TextItem(OpenItem):
    """An item whose text is in one part."""

    @abstractmethod
    def _part(self) -> OutputText | ReasoningText:
        """The part so far."""

    def open(self) -> list[ItemEvent]:
        return [self._added(), self._part_event("response.content_part.added")]

    def _part_event(self, kind: PartEventType) -> ContentPartEvent:
        return {**self._part_place(), "type": kind, "part": self._part()}


class OpenMessage(_TextItem):
    prefix = "msg"

    def __init__(self, index: int, numbers: Iterator[int]) -> None:
        super().__init__(index, numbers)
        self._logprobs: list[ChatChosenToken] = []

    def item(self, status: ItemStatus) -> OutputMessageObject:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self._part()],
        }

    def add(self, text: str, logprobs: list[ChatChosenToken]) -> ItemEvent:
        self._texts.append(text)
        self._logprobs += logprobs
        return {**self._part_place(), "type": "response.output_text.delta", "delta": text, "logprobs": logprobs}

    def close(self, status: ItemStatus) -> list[ItemEvent]:
        return [
            {
                **self._part_place(),
                "type": "response.output_text.done",
                "text": self._text,
                "logprobs": [*self._logprobs],
            },
            self._part_event("response.content_part.done"),
            self._done(status),
        ]

    def _part(self) -> OutputText:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": [*self._logprobs]}


class OpenReasoning(_TextItem):
    prefix = "rs"

    def item(self, status: ItemStatus) -> ReasoningObject:
        return {
            "id": self._id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [] if status == "in_progress" else [self._part()],
        }

    def add(self, text: str, logprobs: list[ChatChosenToken]) -> ItemEvent:
        self._texts.append(text)
        return {**self._part_place(), "type": "response.reasoning_text.delta", "delta": text}

    def close(self, status: ItemStatus) -> list[ItemEvent]:
        return [
            {**self._part_place(), "type": "response.reasoning_text.done", "text": self._text},
            self._part_event("response.content_part.done"),
            self._done(status),
        ]

    def _part(self) -> ReasoningText:
        return {"type": "reasoning_text", "text": self._text}


class OpenCall(OpenItem):
    prefix = "fc"

    def __init__(self, index: int, numbers: Iterator[int], name: str) -> None:
        super().__init__(index, numbers)
        self._call_id = f"call_{uuid4().hex[:24]}"
        self._name = name

    def item(self, status: ItemStatus) -> FunctionCallObject:
        return {
            "id": self._id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self._text,
            "status": status,
        }

    def open(self) -> list[ItemEvent]:
        return [self._added()]

    def add(self, text: str, logprobs: list[ChatChosenToken]) -> ItemEvent:
        self._texts.append(text)
        return {**self._place(), "type": "response.function_call_arguments.delta", "delta": text}

    def close(self, status: ItemStatus) -> list[ItemEvent]:
        return [
            {
                **self._place(),
                "type": "response.function_call_arguments.done",
                "name": self._name,
                "arguments": self._text,
            },
            self._done(status),
        ]
