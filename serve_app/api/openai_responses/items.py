"""The items of a request's input: messages, reasoning, function calls and their outputs, and references to items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from serve_app.api.openai.tools import CalledFunction, CallId
from serve_app.api.openai_responses.conversation import Item, make_item
from serve_app.api.openai_responses.objects import InputItemObject, OutputItem
from serve_app.api.openai_responses.open_items import new_id
from serve_app.api.openai_responses.unused_fields import (
    UnusedByCallItems,
    UnusedByItems,
    UnusedByMessageItems,
    UnusedByParts,
)
from serve_app.api.schema import LIST, TEXT, Body, Nested
from serve_app.api.unused import Replayed
from serve_app.core.requests import ChatMessage

PART, REFUSAL = "<part>", "<refusal>"
MESSAGE, CALL, OUTPUT = "<message>", "<function_call>", "<function_call_output>"
REASONING, REFERENCE = "<reasoning>", "<item_reference>"
ItemId = Annotated[str, Field(min_length=1, max_length=128)]


class InputPart(UnusedByParts):
    type: Literal["input_text", "output_text"]
    """`input_text` or `output_text`; they are read alike."""
    text: str
    """The text of the part."""


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str
    """The text of the refusal, which is the text of the part."""

    @property
    def text(self) -> str:
        return self.refusal


def _part_tag(value: object) -> str:
    return REFUSAL if isinstance(value, dict) and value.get("type") == "refusal" else PART


def _content_tag(value: object) -> str | None:
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


Parts = Annotated[
    list[Annotated[Annotated[InputPart, Tag(PART)] | Annotated[RefusalPart, Tag(REFUSAL)], Discriminator(_part_tag)]],
    Field(fail_fast=True),
]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[Parts, Tag(LIST)],
    Discriminator(
        _content_tag,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


def _texts(content: str | Sequence[InputPart | RefusalPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


class MessageItem(UnusedByMessageItems):
    type: Literal["message"] = "message"
    """A message needs no type."""
    id: ItemId | None = None
    """The id of the item. The default is a new id."""
    role: Literal["system", "developer", "user", "assistant"]
    """Who the message is from. `developer` is `system`, if the chat template has no role `developer`."""
    content: Content
    """The text, or text parts."""

    nested: ClassVar[Nested] = {"content": InputPart}

    def to_item(self) -> Item:
        texts = _texts(self.content)
        return make_item(self._shown(texts), ChatMessage(self.role, "".join(texts)))

    def _shown(self, texts: list[str]) -> InputItemObject:
        item_id = self.id or new_id("msg")
        if self.role == "assistant":
            return {
                "id": item_id,
                "type": "message",
                "role": self.role,
                "status": "completed",
                "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts],
            }
        return {
            "id": item_id,
            "type": "message",
            "role": self.role,
            "status": "completed",
            "content": [{"type": "input_text", "text": text} for text in texts],
        }


class FunctionCallItem(UnusedByCallItems, CalledFunction):
    type: Literal["function_call"]
    id: ItemId | None = None
    """The id of the item. The default is a new id."""
    call_id: CallId
    """The id by which the output of the call refers to it."""
    asynchronous: Annotated[object, Replayed()] = Field(None, alias="async")
    """OpenAI's answers have it."""

    def to_item(self) -> Item:
        call = self.to_call(self.call_id)
        shown: InputItemObject = {
            "id": self.id or new_id("fc"),
            "type": "function_call",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments if isinstance(self.arguments, str) else call.arguments,
            "status": "completed",
        }
        return make_item(shown, ChatMessage("assistant", "", (call,)))


class FunctionCallOutputItem(UnusedByCallItems):
    type: Literal["function_call_output"]
    id: ItemId | None = None
    """The id of the item. The default is a new id."""
    call_id: CallId
    """The id of the call that this is the output of."""
    output: Content
    """The output as a text, or as text parts."""
    name: Annotated[str, Field(max_length=256)] | None = None
    """The name of the tool. The default is that of the call."""

    nested: ClassVar[Nested] = {"output": InputPart}

    def to_item(self) -> Item:
        text = "".join(_texts(self.output))
        shown: InputItemObject = {
            "id": self.id or new_id("fco"),
            "type": "function_call_output",
            "call_id": self.call_id,
            "output": text,
            "status": "completed",
        }
        return make_item(shown, ChatMessage("tool", text, tool_call_id=self.call_id, name=self.name or ""))


class SummaryPart(Body):
    type: Literal["summary_text"]
    text: str
    """A part of the summary."""


class ReasoningPart(Body):
    type: Literal["reasoning_text"]
    text: str
    """A part of the reasoning."""


class ReasoningItem(UnusedByItems):
    type: Literal["reasoning"]
    id: ItemId | None = None
    """The id of the item. The default is a new id."""
    summary: Annotated[list[SummaryPart], Field(default_factory=list, fail_fast=True)]
    """The summary of the reasoning, which the model reads if there is no `content`."""
    content: Annotated[list[ReasoningPart], Field(default_factory=list, fail_fast=True)]
    """The text of the reasoning, for a chat template that shows it."""
    encrypted_content: Annotated[object, Replayed()] = None
    """OpenAI's answers have it; the service cannot read it."""

    nested: ClassVar[Nested] = {"summary": SummaryPart, "content": ReasoningPart}

    def to_item(self) -> Item:
        content, summary = [part.text for part in self.content], [part.text for part in self.summary]
        shown: InputItemObject = {
            "id": self.id or new_id("rs"),
            "type": "reasoning",
            "status": "completed",
            "summary": [{"type": "summary_text", "text": text} for text in summary],
            "content": [{"type": "reasoning_text", "text": text} for text in content],
        }
        return make_item(shown, ChatMessage("assistant", "", reasoning="".join(content or summary)))


class ItemReference(Body):
    type: Literal["item_reference"] = "item_reference"
    """A reference needs no type."""
    id: ItemId
    """The id of an item of a stored response."""


_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _item_tag(value: object) -> str | None:
    if not isinstance(value, dict):
        return MESSAGE
    kind = value.get("type")
    if kind is None:
        kind = "item_reference" if "id" in value and "role" not in value else "message"
    return f"<{kind}>" if kind in _TYPES else None


InputItem = Annotated[
    Annotated[MessageItem, Tag(MESSAGE)]
    | Annotated[FunctionCallItem, Tag(CALL)]
    | Annotated[FunctionCallOutputItem, Tag(OUTPUT)]
    | Annotated[ReasoningItem, Tag(REASONING)]
    | Annotated[ItemReference, Tag(REFERENCE)],
    Discriminator(
        _item_tag,
        custom_error_type="item_type",
        custom_error_message="Input should be an item of type "
        + ", ".join(f"'{kind}'" for kind in _TYPES[:-1])
        + f" or '{_TYPES[-1]}'",
    ),
]
TYPES: Nested = {
    PART: InputPart,
    REFUSAL: RefusalPart,
    MESSAGE: MessageItem,
    CALL: FunctionCallItem,
    OUTPUT: FunctionCallOutputItem,
    REASONING: ReasoningItem,
    REFERENCE: ItemReference,
}
_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


def to_items(output: Sequence[OutputItem]) -> tuple[Item, ...]:
    """The output of a response as items of the conversation, as if a client sent them back."""
    items = _ITEMS.validate_python(output)
    return tuple(item.to_item() for item in items if not isinstance(item, ItemReference))
