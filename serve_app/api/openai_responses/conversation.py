"""The conversation of a response: its items as clients see them, and as the messages that the model reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from serve_app.api.openai_responses.objects import InputItemObject
from serve_app.core.requests import ChatMessage

# About the memory of an item besides the characters of its texts, in bytes.
_ITEM_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Item:
    """One item: as clients see it, and as a message for the model.

    The message of a function call or of reasoning is a part of an assistant's message, see `to_messages`. `size` is
    about the memory of the item in bytes.
    """

    shown: InputItemObject
    message: ChatMessage
    size: int

    @property
    def id(self) -> str:
        return self.shown["id"]


def make_item(shown: InputItemObject, message: ChatMessage) -> Item:
    # Both have the texts.
    return Item(shown, message, _ITEM_BYTES + 2 * len(json.dumps(shown, ensure_ascii=False).encode()))


def to_messages(items: Iterable[Item]) -> tuple[ChatMessage, ...]:
    """The messages of a conversation, as a chat has them.

    The reasoning, the text and the calls of one answer become one message. The result of a call has the call's name.
    """
    messages: list[ChatMessage] = []
    for item in items:
        if messages and _are_one_answer(messages[-1], item.message):
            messages[-1] = _join(messages[-1], item.message)
        else:
            messages.append(item.message)
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return tuple(replace(one, name=one.name or names.get(one.tool_call_id, "")) for one in messages)


def call_ids(item: Item) -> list[str]:
    """The id of the function call, if the item is one."""
    return [call.id for call in item.message.tool_calls]


def _are_one_answer(earlier: ChatMessage, later: ChatMessage) -> bool:
    """Whether the later message continues the earlier one.

    An answer begins with its reasoning. Two texts without a call between them are two answers.
    """
    if earlier.role != "assistant" or later.role != "assistant":
        return False
    if later.reasoning:
        return not (earlier.content or earlier.tool_calls)
    return bool(later.tool_calls or earlier.tool_calls or not earlier.content)


def _join(earlier: ChatMessage, later: ChatMessage) -> ChatMessage:
    return replace(
        earlier,
        content=earlier.content + later.content,
        tool_calls=earlier.tool_calls + later.tool_calls,
        reasoning=earlier.reasoning + later.reasoning,
    )
