"""The messages of a conversation, in Anthropic's form: content blocks, among them tool calls and their results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from serve_app.api.anthropic.tools import ToolName
from serve_app.api.openai.tools import CallId
from serve_app.api.schema import LIST, MAX_NAME_LENGTH, TEXT, Body, Nested
from serve_app.api.unused import Hint, Only, Replayed
from serve_app.core.requests import ChatMessage, ChatPrompt, ToolCall
from serve_app.errors import InvalidRequest

_NO_TOOLSETS = Only(reason="the service has no toolsets")


class TextBlock(Body):
    type: Literal["text"]
    text: str
    """The text of the block."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    citations: Annotated[object, Replayed()] = None
    """Anthropic's answers have them."""
    parsed_output: Annotated[object, Replayed()] = None
    """Anthropic's client adds it to answers."""


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    """The model's reasoning before an earlier answer; the chat template shows it or leaves it out."""
    signature: Annotated[object, Replayed()] = None
    """Answers have it. The service does not check it."""


class RedactedThinkingBlock(Body):
    type: Literal["redacted_thinking"]
    data: Annotated[object, Replayed()] = None
    """Anthropic's answers have it. The service cannot read it."""


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: CallId
    """The id by which a `tool_result` refers to the call."""
    name: ToolName
    """The name of the tool."""
    input: dict[str, object]
    """The input of the tool."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    caller: Annotated[object, Replayed()] = None
    """Anthropic's answers have it."""
    toolset_name: Annotated[object, _NO_TOOLSETS] = None
    """The service has no toolsets."""

    def to_call(self) -> ToolCall:
        return ToolCall(self.id, self.name, json.dumps(self.input, ensure_ascii=False))


def _only(*supported: str) -> BeforeValidator:
    """Refuses blocks of other types by name, for example images. Other errors are left to the validator of blocks."""

    def refuse(value: object) -> object:
        kind = _kind(value)
        if kind is not None and kind not in supported:
            message = "Input is a block of type '{kind}', which is not supported here. Supported types: {supported}"
            context = {"kind": kind[:MAX_NAME_LENGTH], "supported": ", ".join(supported)}
            raise PydanticCustomError("block_type", message, context)
        return value

    return BeforeValidator(refuse)


def _kind(block: object) -> str | None:
    kind = block.get("type") if isinstance(block, dict) else None
    return kind if isinstance(kind, str) else None


def _block_tag(kind: str) -> str:
    return f"<{kind} block>"


def _tag_of_block(value: object) -> str | None:
    kind = _kind(value)
    return None if kind is None else _block_tag(kind)


def _tag(value: object) -> str | None:
    """The union's member by the JSON type of the value, so that an error is reported for the intended member."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


_TextBlock = Annotated[TextBlock, _only("text")]
_IS_TEXT_OR_BLOCKS = Discriminator(
    _tag,
    custom_error_type="content_type",
    custom_error_message="Input should be a string or a list of content blocks",
)
TextContent = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[_TextBlock], Field(fail_fast=True), Tag(LIST)], _IS_TEXT_OR_BLOCKS
]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: CallId
    """The id of the call."""
    content: TextContent = ""
    """The result: a text, or text blocks."""
    is_error: bool = False
    """Whether the tool failed. The model then sees the result with `Error: ` before it."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    toolset_name: Annotated[object, _NO_TOOLSETS] = None
    """The service has no toolsets."""

    nested: ClassVar[Nested] = {"content": TextBlock}

    def to_message(self, name: str) -> ChatMessage:
        text = to_text(self.content)
        if self.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        return ChatMessage("tool", text, tool_call_id=self.tool_use_id, name=name)


_BLOCKS: dict[str, type[Body]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
_BLOCKS_OF_ROLE: dict[str, set[str]] = {
    "user": {"text", "tool_result"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use"},
    "system": {"text"},
}
Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock
_AnyBlock = Annotated[
    Annotated[TextBlock, Tag(_block_tag("text"))]
    | Annotated[ThinkingBlock, Tag(_block_tag("thinking"))]
    | Annotated[RedactedThinkingBlock, Tag(_block_tag("redacted_thinking"))]
    | Annotated[ToolUseBlock, Tag(_block_tag("tool_use"))]
    | Annotated[ToolResultBlock, Tag(_block_tag("tool_result"))],
    Discriminator(
        _tag_of_block,
        custom_error_type="no_block",
        custom_error_message="Input should be a content block: an object with a type",
    ),
    _only(*_BLOCKS),
]
Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[_AnyBlock], Field(fail_fast=True), Tag(LIST)], _IS_TEXT_OR_BLOCKS
]


class Turn(Body):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    """Who the message is from. If the last message is from the assistant, the answer continues it."""
    content: Content
    """A text, or content blocks. Which blocks are allowed depends on the role."""

    nested: ClassVar[Nested] = {_block_tag(kind): body for kind, body in _BLOCKS.items()}

    @property
    def blocks(self) -> Sequence[Block]:
        content = self.content
        return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def to_text(content: str | Iterable[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def to_prompt(system: TextContent | None, turns: Sequence[Turn], tools: tuple[str, ...], variables: str) -> ChatPrompt:
    """The conversation. Consecutive messages of one role become one message.

    Raises InvalidRequest for a block that its role cannot have, and for a result without an earlier call.
    """
    text = to_text(system or "")
    messages = [ChatMessage("system", text)] if text else []
    names: dict[str, str] = {}
    for number, turn in enumerate(turns):
        for message in _messages(turn, f"messages[{number}]", names):
            if messages and messages[-1].role == message.role in ("user", "assistant"):
                message = _joined(messages.pop(), message)
            messages.append(message)
    continues = turns[-1].role == "assistant"
    if continues and messages[-1].tool_calls:
        field = f"messages[{len(turns) - 1}]"
        raise InvalidRequest(
            f"Field '{field}' is the last message and has a call of a tool. Send the results of its calls in a message "
            "of role 'user' after it.",
            param=field,
        )
    return ChatPrompt(tuple(messages), tools, variables, continues)


def _messages(turn: Turn, field: str, names: dict[str, str]) -> Iterator[ChatMessage]:
    """The messages for the chat template. `names` are the tools of the calls so far by id, to which calls are added."""
    for number, block in enumerate(turn.blocks):
        if block.type not in _BLOCKS_OF_ROLE[turn.role]:
            raise _not_allowed(turn, block, f"{field}.content[{number}]")
        if isinstance(block, ToolUseBlock):
            names[block.id] = block.name
        if isinstance(block, ToolResultBlock) and block.tool_use_id not in names:
            raise _without_call(f"{field}.content[{number}].tool_use_id")
    if turn.role == "assistant":
        yield _assistant(turn.blocks)
        return
    if not turn.blocks:
        yield ChatMessage(turn.role, "")
    for is_text, blocks in groupby(turn.blocks, lambda block: isinstance(block, TextBlock)):
        if is_text:
            yield ChatMessage(turn.role, _text_of(blocks))
        else:
            yield from (one.to_message(names[one.tool_use_id]) for one in blocks if isinstance(one, ToolResultBlock))


def _assistant(blocks: Sequence[Block]) -> ChatMessage:
    return ChatMessage(
        "assistant",
        _text_of(blocks),
        tuple(block.to_call() for block in blocks if isinstance(block, ToolUseBlock)),
        reasoning="".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)),
    )


def _text_of(blocks: Iterable[Block]) -> str:
    return to_text(block for block in blocks if isinstance(block, TextBlock))


def _joined(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    """Two messages of one role as one, whose texts are paragraphs."""
    return replace(
        first,
        content="\n\n".join(text for text in (first.content, second.content) if text),
        tool_calls=first.tool_calls + second.tool_calls,
        reasoning="\n\n".join(text for text in (first.reasoning, second.reasoning) if text),
    )


def _not_allowed(turn: Turn, block: Block, field: str) -> InvalidRequest:
    allowed = ", ".join(f"'{kind}'" for kind in sorted(_BLOCKS_OF_ROLE[turn.role]))
    return InvalidRequest(
        f"Field '{field}' is a block of type '{block.type}'. A message of role '{turn.role}' can have blocks of the "
        f"types {allowed} only.",
        param=field,
    )


def _without_call(field: str) -> InvalidRequest:
    return InvalidRequest(
        f"Field '{field}' is the id of no earlier call. Send the assistant's message with its 'tool_use' block too.",
        param=field,
    )
