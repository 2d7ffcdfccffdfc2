"""The events of a streamed response, as typed dictionaries. Their `type` is also the name of the server-sent event.

`sequence_number` counts all events of a response from 0. `output_index` is the place of an item in the output, and
`content_index` that of a part in the item, which is always 0.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from serve_app.api.openai.responses import ChatChosenToken, OpenAIErrorDetails
from serve_app.api.openai_responses.objects import OutputItem, OutputText, ReasoningText, ResponseObject
from serve_app.api.responses import exact

LifecycleEventType = Literal[
    "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
]
ItemEventType = Literal["response.output_item.added", "response.output_item.done"]
PartEventType = Literal["response.content_part.added", "response.content_part.done"]


class ItemPlace(TypedDict):
    sequence_number: int
    item_id: str
    output_index: int


class PartPlace(ItemPlace):
    content_index: int


@exact
class ResponseEvent(TypedDict):
    """The first two events and the last one of a stream have the whole response."""

    type: LifecycleEventType
    sequence_number: int
    response: ResponseObject


@exact
class OutputItemEvent(TypedDict):
    type: ItemEventType
    sequence_number: int
    output_index: int
    item: OutputItem


@exact
class ContentPartEvent(PartPlace):
    type: PartEventType
    part: OutputText | ReasoningText


@exact
class OutputTextDelta(PartPlace):
    """`logprobs` are those of the tokens of the delta."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChatChosenToken]


@exact
class OutputTextDone(PartPlace):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChatChosenToken]


@exact
class ReasoningTextDelta(PartPlace):
    type: Literal["response.reasoning_text.delta"]
    delta: str


@exact
class ReasoningTextDone(PartPlace):
    type: Literal["response.reasoning_text.done"]
    text: str


@exact
class ArgumentsDelta(ItemPlace):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


@exact
class ArgumentsDone(ItemPlace):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


@exact
class ResponseErrorEvent(TypedDict):
    """An error, after which `response.failed` ends the stream.

    OpenAI documents `code`, `message` and `param`, but sends `error`. Clients read one or the other.
    """

    type: Literal["error"]
    sequence_number: int
    code: str
    message: str
    param: str | None
    error: OpenAIErrorDetails


ItemEvent = (
    OutputItemEvent
    | ContentPartEvent
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
)
StreamEvent = ResponseEvent | ItemEvent | ResponseErrorEvent
