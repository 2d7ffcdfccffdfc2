"""The body of a request for a response, with vLLM's additional fields for sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from serve_app.api.openai.schema import User, refuse_other_forms
from serve_app.api.openai_responses.conversation import Item, call_ids, to_messages
from serve_app.api.openai_responses.items import TYPES, InputItem, ItemReference, MessageItem
from serve_app.api.openai_responses.objects import RequestEcho, Truncation
from serve_app.api.openai_responses.settings import (
    SCHEMA,
    ReasoningFields,
    ResponseStreamOptions,
    SchemaFormat,
    TextSettings,
)
from serve_app.api.openai_responses.tools import ResponseToolFields
from serve_app.api.openai_responses.unused_fields import UnusedByResponses
from serve_app.api.sampling import MAX_TOKENS, SamplingFields, TokenCount
from serve_app.api.schema import LIST, TEXT, Nested
from serve_app.config import SamplingDefaults
from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar, SamplingParams
from serve_app.errors import InvalidRequest, NotFound

LOGPROBS = "message.output_text.logprobs"

# The other values are about tools of OpenAI and about encryption; they ask for nothing here.
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


def _tag(value: object) -> str | None:
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(
        _tag, custom_error_type="input_type", custom_error_message="Input should be a string or a list of items"
    ),
]


class ResponsesBody(UnusedByResponses, ResponseToolFields, SamplingFields):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    input: Input
    """A text, or the items of the conversation: messages, function calls with their outputs, and reasoning."""
    instructions: str | None = None
    """A system message before the conversation. It does not apply to later responses."""
    previous_response_id: str | None = None
    """The id of a stored response, whose conversation the input continues."""
    max_output_tokens: TokenCount | None = None
    """The maximum number of tokens of the answer and its reasoning. The default is the rest of the model's context."""
    include: Annotated[list[Includable], Field(max_length=32, fail_fast=True, default_factory=list)]
    """`message.output_text.logprobs`: the log probability of each token of the text is reported."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """With `include` of the log probabilities: report this number of the most likely tokens beside each token."""
    text: TextSettings = TextSettings()
    """The form of the text."""
    reasoning: ReasoningFields = ReasoningFields()
    """Settings of the model's reasoning."""
    truncation: Truncation = "disabled"
    """`auto`: the oldest turns of a conversation that is too long for the model are left out; else it is an error."""
    store: bool = True
    """Whether the response is kept, so that it can be read and continued by its id."""
    stream: bool = False
    """Whether the response comes as events."""
    stream_options: ResponseStreamOptions | None = None
    """Options of a stream."""
    metadata: Annotated[Metadata, Field(default_factory=dict)]
    """Returned in the response."""
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Returned in the response. It limits calls of OpenAI's own tools."""
    prompt_cache_key: str | None = None
    """Returned in the response. The prefix cache finds equal prompts without a key."""
    safety_identifier: str | None = None
    """Returned in the response. The service does not check users."""
    user: User | None = None
    """Returned in the response, and written to the log with the request's id."""

    nested: ClassVar[Nested] = {
        **ResponseToolFields.nested,
        **TYPES,
        SCHEMA: SchemaFormat,
        "input": MessageItem,
        "text": TextSettings,
        "reasoning": ReasoningFields,
        "stream_options": ResponseStreamOptions,
    }

    def items(self, earlier: Sequence[Item], find: Callable[[str], Item | None]) -> list[Item]:
        """The items of the input after the `earlier` ones. `find` returns the stored item with an id.

        Raises NotFound for a reference to an item that is not stored, and InvalidRequest for the output of a call that
        is not in the conversation.
        """
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input).to_item()]
        found = [_resolve(item, number, find) for number, item in enumerate(self.input)]
        called = {call for item in (*earlier, *found) for call in call_ids(item)}
        for number, item in enumerate(found):
            if item.message.role == "tool" and item.message.tool_call_id not in called:
                param = f"input[{number}].call_id"
                raise InvalidRequest(
                    f"Field '{param}' is the id of no earlier call. Send the function call too, or the id of the "
                    "response that has it as 'previous_response_id'.",
                    param=param,
                )
        return found

    def to_prompt(self, items: Sequence[Item]) -> ChatPrompt:
        """The prompt for the items of the whole conversation."""
        instructions = (ChatMessage("system", self.instructions),) if self.instructions is not None else ()
        return ChatPrompt((*instructions, *to_messages(items)), self.for_template(), self.reasoning.for_template())

    def grammars(self) -> list[Grammar]:
        formatted = self.text.format.grammar()
        return [*([formatted] if formatted is not None else []), *super().grammars()]

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "Field 'stream_options' requires stream: true. Leave it out or stream.", param="stream_options"
            )
        if self.top_logprobs and LOGPROBS not in self.include:
            raise InvalidRequest(
                f"Field 'top_logprobs' requires '{LOGPROBS}' in 'include'. Include it or leave both out.",
                param="top_logprobs",
            )
        if self.may_call:
            refuse_other_forms(self.grammars())
        return self.sampling(defaults, self.max_output_tokens, self.top_logprobs if LOGPROBS in self.include else None)

    def echo(self, params: SamplingParams, stored: bool) -> RequestEcho:
        """The fields of the request that the response repeats."""
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": self.reasoning.to_object(),
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": stored,
            "temperature": params.temperature,
            "text": self.text.to_object(),
            "tool_choice": self.choice_object(),
            "tools": [tool.to_object() for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs,
            "top_p": params.top_p,
            "truncation": self.truncation,
            "user": self.user,
        }


def _resolve(item: InputItem, number: int, find: Callable[[str], Item | None]) -> Item:
    if not isinstance(item, ItemReference):
        return item.to_item()
    found = find(item.id)
    if found is None:
        raise NotFound(
            # OpenAI's words, by which clients recognize this error.
            f"Item with id '{item.id}' not found. Items are not persisted when `store` is set to false. Send the item "
            "itself.",
            param=f"input[{number}].id",
        )
    return found
