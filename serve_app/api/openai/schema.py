"""The bodies of OpenAI's completions and chat completions, with vLLM's additional fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Discriminator, Field, Tag

from serve_app.api.openai.encoder import Show
from serve_app.api.openai.messages import Message
from serve_app.api.openai.response_format import JsonSchema, ResponseFormat, StructuredOutputs
from serve_app.api.openai.template_fields import TemplateFields, effort_variables
from serve_app.api.openai.tools import ChosenFunction, ChosenTool, Function, OfferedTool, ToolFields
from serve_app.api.openai.unused_fields import UnusedByChats, UnusedByCompletions, UnusedFields
from serve_app.api.sampling import MAX_ANSWERS, MAX_TOKENS, SamplingFields, Text, TokenCount, TokenId
from serve_app.api.schema import LIST, LISTS, TEXT, TEXTS, Body, Nested
from serve_app.api.unused import Hint
from serve_app.config import SamplingDefaults
from serve_app.core.requests import Grammar, Prompt, SamplingParams, TextPrompt, TokenPrompt, ToolChoice
from serve_app.errors import InvalidRequest


class StreamOptions(Body):
    include_usage: bool = False
    """Whether a last chunk has the usage."""
    continuous_usage_stats: bool = False
    """With `include_usage`: whether every chunk has the usage so far."""
    include_obfuscation: Annotated[object, Hint()] = None
    """Events have no padding."""


User = Annotated[str, Field(max_length=128)]


class OpenAIFields(UnusedFields, SamplingFields):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    """The number of answers to each prompt."""
    response_format: ResponseFormat | None = None
    """The form of the answer."""
    structured_outputs: StructuredOutputs | None = None
    """The form of the answer, as in vLLM."""
    stream: bool = False
    """Whether the answer comes as events."""
    stream_options: StreamOptions | None = None
    """Options of a stream."""
    user: User | None = None
    """Written to the log with the request's id."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report the log probability of each token of the prompt, and of this number of the most likely tokens."""
    return_token_ids: bool = False
    """Whether the token ids of the prompt and of the answer are reported."""
    max_completion_tokens: TokenCount | None = None
    """The newer name of `max_tokens`, which it overrides."""

    nested: ClassVar[Nested] = {
        "stream_options": StreamOptions,
        "response_format": ResponseFormat,
        "json_schema": JsonSchema,
        "structured_outputs": StructuredOutputs,
    }

    def grammars(self) -> list[Grammar]:
        formatted = self.response_format.grammar() if self.response_format is not None else None
        structured = self.structured_outputs.to_grammar() if self.structured_outputs is not None else None
        return [*(one for one in (formatted, structured) if one is not None), *super().grammars()]

    @property
    def sampled(self) -> int:
        """The number of answers that are sampled to one prompt; n of them are returned."""
        return self.n

    @property
    def show(self) -> Show:
        options = self.stream_options or StreamOptions()
        return Show(
            token_ids=self.return_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            usage=options.include_usage,
            usage_so_far=options.include_usage and options.continuous_usage_stats,
        )

    def _params(self, defaults: SamplingDefaults, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "Field 'stream_options' requires stream: true. Leave it out or stream.", param="stream_options"
            )
        newer = self.max_completion_tokens
        params = self.sampling(defaults, max_tokens if newer is None else newer, logprobs)
        return params if self.prompt_logprobs is None else replace(params, prompt_logprobs=self.prompt_logprobs)


TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _tag(value: object) -> str | None:
    """The union's member by the first item: several texts, several lists of token ids, or one of either."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return TEXTS if isinstance(value[0], str) else LISTS
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


CompletionPrompt = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[TokenIds, Tag(LIST)]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag(TEXTS)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag(LISTS)],
    Discriminator(
        _tag,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string or a list of token ids, or a list of either",
    ),
]


def to_prompts(given: CompletionPrompt, special_tokens: bool = True) -> list[Prompt]:
    several = isinstance(given, list) and isinstance(given[0], str | list)
    return [
        TextPrompt(one, special_tokens) if isinstance(one, str) else TokenPrompt(tuple(one))  # type: ignore[arg-type]
        for one in (given if several else [given])
    ]


class CompletionBody(UnusedByCompletions, OpenAIFields):
    prompt: CompletionPrompt
    """A text or a list of token ids, or a list of either."""
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 16
    """The maximum number of tokens of the answer; 0 with `echo` returns the prompt only."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report the log probability of each token, and of this number of the most likely tokens at its place."""
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    """Sample this number of answers, and return the n answers with the highest mean log probability of a token."""
    echo: bool = False
    """Whether the prompt precedes its answer, with `logprobs` also the prompt's tokens."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens to a text."""

    @property
    def sampled(self) -> int:
        return self.n if self.best_of is None else self.best_of

    @property
    def show(self) -> Show:
        return replace(super().show, echo=self.echo, answer=self.max_tokens > 0)

    def to_prompts(self) -> list[Prompt]:
        return to_prompts(self.prompt, self.add_special_tokens)

    def choice(self) -> ToolChoice | None:
        return None

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        if self.sampled < self.n:
            raise InvalidRequest(
                f"Field 'best_of' is {self.sampled}, below n {self.n}. Raise it or lower n.", param="best_of"
            )
        if self.sampled > self.n and self.stream:
            raise InvalidRequest(
                f"Field 'best_of' is {self.sampled}, above n {self.n}. The best answers are known only when all have "
                "ended. Do not stream, or leave it out.",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "Field 'max_tokens' is 0, which requires echo: true. Raise it, or set 'echo'.", param="max_tokens"
            )
        # The model computes one token to know that it has read the prompt; the answer leaves it out.
        params = self._params(defaults, self.max_tokens or 1, self.logprobs)
        if not self.echo or self.logprobs is None:
            return params
        return replace(params, prompt_logprobs=max(self.logprobs, params.prompt_logprobs or 0))


def refuse_other_forms(grammars: Sequence[Grammar]) -> None:
    """Raises InvalidRequest if an answer that may call tools has a grammar that is not JSON."""
    wrong = next((one for one in grammars if not one.kind.startswith("json")), None)
    if wrong is not None:
        raise InvalidRequest(
            f"Field '{wrong.field}' sets a form of the answer that is not JSON, and 'tools' sets another one. Send "
            "one of them, a JSON schema, or tool_choice: none.",
            param=wrong.field,
        )


class ChatBody(UnusedByChats, TemplateFields, ToolFields, OpenAIFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far, for the model's chat template."""
    max_tokens: TokenCount | None = None
    """The maximum number of tokens of the answer. The default is the rest of the model's context."""
    logprobs: bool = False
    """Whether the log probability of each token is reported."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """With `logprobs`: report this number of the most likely tokens at the place of each token."""
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    """How much the model reasons, for a chat template that has the variable. It also sets `enable_thinking`."""
    include_reasoning: bool = True
    """Whether the answer shows the model's reasoning."""

    nested: ClassVar[Nested] = {
        **OpenAIFields.nested,
        "messages": Message,
        "tools": OfferedTool,
        "tool_choice": ChosenTool,
        "functions": Function,
        "function_call": ChosenFunction,
    }

    @property
    def show(self) -> Show:
        return replace(super().show, reasoning=self.include_reasoning, legacy_calls=self.legacy_calls)

    def to_prompts(self) -> list[Prompt]:
        """Raises InvalidRequest if fields contradict each other."""
        return [self.rendered_with(self.messages, self.for_template(), effort_variables(self.reasoning_effort))]

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "Field 'top_logprobs' requires logprobs: true. Set it or leave both out.", param="top_logprobs"
            )
        if self.may_call:
            refuse_other_forms(self.grammars())
        return self._params(defaults, self.max_tokens, (self.top_logprobs or 0) if self.logprobs else None)
