"""The bodies of /tokenize and /detokenize, as in vLLM; /tokenize also takes the body of Text Generation Inference."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from serve_app.api.openai.messages import Message, TextPart
from serve_app.api.openai.template_fields import TemplateFields
from serve_app.api.openai.tools import MAX_TOOLS, OfferedTool, for_template
from serve_app.api.sampling import TokenId
from serve_app.api.schema import Body, Nested
from serve_app.core.queries import Detokenize, Tokenize
from serve_app.core.requests import ChatPrompt, Prompt, TextPrompt
from serve_app.errors import InvalidRequest

# The rule of TokenizeBody.to_query as a JSON schema.
_EITHER_PROMPT_OR_MESSAGES: Any = {
    "oneOf": [
        {"required": [one], "properties": {one: {"not": {"type": "null"}}, other: {"type": "null"}}}
        for one, other in (("prompt", "messages"), ("messages", "prompt"))
    ]
}


class TokenizeBody(TemplateFields):
    model_config = ConfigDict(json_schema_extra=_EITHER_PROMPT_OR_MESSAGES)

    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    prompt: str | None = None
    """A text."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation, for the model's chat template."""
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the chat template shows to the model."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds its special tokens to a text; the default is true. A chat template writes its own."""
    return_token_strs: bool = False
    """Whether the text of each token is returned."""

    nested: ClassVar[Nested] = {"messages": Message, "content": TextPart, "tools": OfferedTool}

    def to_query(self) -> Tokenize:
        """Raises InvalidRequest if fields contradict each other."""
        prompt = self._prompt()
        if isinstance(prompt, ChatPrompt) and self.add_special_tokens:
            raise InvalidRequest(
                "Field 'add_special_tokens' applies to 'prompt' only, because a chat template writes its own special "
                "tokens. Leave it out.",
                param="add_special_tokens",
            )
        return Tokenize(prompt, self.add_special_tokens is not False)

    def _prompt(self) -> Prompt:
        if self.messages is None and self.prompt is not None:
            return TextPrompt(self.prompt)
        if self.messages is None or self.prompt is not None:
            raise InvalidRequest("Send either 'prompt' or 'messages'.", param="prompt")
        functions = [tool.function for tool in self.tools or ()]
        tools = tuple(for_template(one.name, one.description, one.parameters) for one in functions)
        return self.rendered_with(self.messages, tools, {})


class TokenizeInputsBody(Body):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    inputs: str
    """A text."""

    def to_query(self) -> Tokenize:
        return Tokenize(TextPrompt(self.inputs))


class DetokenizeBody(Body):
    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    tokens: Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
    """Token ids."""

    def to_query(self) -> Detokenize:
        return Detokenize(tuple(self.tokens))
