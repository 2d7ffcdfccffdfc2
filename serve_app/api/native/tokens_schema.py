"""The bodies of /tokenize and /detokenize: vLLM's, and Text Generation Inference's for the first."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from serve_app.api.native.schema import TokenId
from serve_app.api.openai.schema import Message, TextPart, conversation
from serve_app.api.schema import Body, Nested
from serve_app.core.queries import Tokenize
from serve_app.core.requests import ChatPrompt, Prompt, TextPrompt
from serve_app.errors import InvalidRequest

# What TokenizeBody.question refuses, as a JSON schema.
_ONE_OF_BOTH: Any = {
    "oneOf": [
        {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
        for one, other in (("prompt", "messages"), ("messages", "prompt"))
    ]
}


class TokenizeBody(Body):
    """`add_special_tokens` goes with a prompt: a chat's template writes its own."""

    model_config = ConfigDict(json_schema_extra=_ONE_OF_BOTH)

    model: str | None = None
    """Left out, the first of the configuration."""
    prompt: str | None = None
    """A text."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation, as the model's chat template writes it."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its special tokens around a text; left out, it does."""
    return_token_strs: bool = False
    """Whether the text of each token is told."""

    nested: ClassVar[Nested] = {"messages": Message, "content": TextPart}

    def question(self) -> Tokenize:
        """Raises InvalidRequest when fields contradict each other."""
        prompt = self._prompt()
        if isinstance(prompt, ChatPrompt) and self.add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens goes with prompt; a chat's template writes its own, leave it out",
                param="add_special_tokens",
            )
        return Tokenize(prompt, self.add_special_tokens is not False)

    def _prompt(self) -> Prompt:
        if self.messages is None and self.prompt is not None:
            return TextPrompt(self.prompt)
        if self.messages is None or self.prompt is not None:
            raise InvalidRequest("send exactly one of prompt and messages", param="prompt")
        return conversation(self.messages)


class TokenizeInputsBody(Body):
    model: str | None = None
    """Left out, the first of the configuration."""
    inputs: str
    """A text."""


class DetokenizeBody(Body):
    model: str | None = None
    """Left out, the first of the configuration."""
    tokens: Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
    """Token ids."""
