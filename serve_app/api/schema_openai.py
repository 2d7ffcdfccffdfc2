"""The bodies of the OpenAI endpoints: the fields this service honours, and vLLM's names for the extra ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from serve_app.api.schema import SamplingFields, TokenCount, TokenId
from serve_app.api.schema_body import LIST, TEXT, Body
from serve_app.config import SamplingDefaults
from serve_app.errors import InvalidRequest
from serve_app.types import ChatMessage, ChatPrompt, Prompt, SamplingParams, TextPrompt, TokenPrompt


def _text_or_list(value: object) -> str | None:
    """Choose by the JSON type, so that a fault is reported for the member the caller meant."""
    return TEXT if isinstance(value, str) else LIST if isinstance(value, list) else None


class StreamOptions(Body):
    include_usage: bool = False


class OpenAIFields(SamplingFields):
    model: str | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    nested: ClassVar[Mapping[str, type[Body]]] = {"stream_options": StreamOptions}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def checked(self, defaults: SamplingDefaults, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest."""
        if self.n != 1:
            raise InvalidRequest("n can only be 1; send several requests for several answers", param="n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options goes with stream: true; leave it out or stream", param="stream_options"
            )
        return self.sampling(defaults, max_tokens, logprobs)


CompletionPrompt = Annotated[
    Annotated[str, Field(min_length=1), Tag(TEXT)]
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(
        _text_or_list,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string or a list of token ids",
    ),
]


class CompletionBody(OpenAIFields):
    prompt: CompletionPrompt
    max_tokens: TokenCount = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def asked(self) -> Prompt:
        return TextPrompt(self.prompt) if isinstance(self.prompt, str) else TokenPrompt(tuple(self.prompt))

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        return self.checked(defaults, self.max_tokens, self.logprobs)


class TextPart(Body):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag(TEXT)] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag(LIST)],
    Discriminator(
        _text_or_list,
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of text parts",
    ),
]


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Content

    def plain(self) -> ChatMessage:
        content = self.content
        return ChatMessage(self.role, content if isinstance(content, str) else "".join(part.text for part in content))


class ChatBody(OpenAIFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    nested: ClassVar[Mapping[str, type[Body]]] = {
        "stream_options": StreamOptions,
        "messages": Message,
        "content": TextPart,
    }

    def asked(self) -> Prompt:
        return ChatPrompt(tuple(message.plain() for message in self.messages))

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs goes with logprobs: true; set it or leave both out", param="top_logprobs"
            )
        return self.checked(defaults, self._limit(), (self.top_logprobs or 0) if self.logprobs else None)

    def _limit(self) -> int | None:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest(
                f"max_completion_tokens {new} and max_tokens {old} differ; send one of them",
                param="max_completion_tokens",
            )
        return new if old is None else old
