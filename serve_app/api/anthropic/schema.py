"""The bodies of Anthropic's messages and token counts."""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from serve_app.api.anthropic.messages import TextBlock, TextContent, Turn, to_prompt
from serve_app.api.anthropic.tools import OfferedTools
from serve_app.api.anthropic.unused_fields import UnusedByAnswers, UnusedByConversations
from serve_app.api.sampling import MAX_TOKENS, StopString, TokenCount
from serve_app.api.schema import Body, Nested
from serve_app.api.unused import Hint
from serve_app.config import SamplingDefaults
from serve_app.core.queries import Tokenize
from serve_app.core.requests import ChatPrompt, Grammar, SamplingParams
from serve_app.errors import InvalidRequest


class ThinkingConfig(Body):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    """Whether the chat template enables the model's reasoning: `enabled` and `adaptive` do."""
    budget_tokens: Annotated[object, Hint()] = None
    """No model has a setting for the length of its reasoning."""
    display: Literal["summarized", "updates", "omitted"] | None = None
    """With `omitted`, the thinking blocks of the answer are empty. Otherwise they have the whole reasoning."""
    block_binding: Annotated[object, Hint()] = None
    """The service does not check the signatures of thinking blocks."""


class OutputFormat(Body):
    type: Literal["json_schema"]
    definition: Annotated[dict[str, object], Field(alias="schema")]
    """The JSON schema that the answer follows."""

    def grammar(self, field: str) -> Grammar:
        return Grammar("json_schema", json.dumps(self.definition), field)


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Passed to the chat template as `reasoning_effort`."""
    format: OutputFormat | None = None
    """The form of the answer."""
    task_budget: Annotated[object, Hint()] = None
    """No model has a setting for the tokens of a task."""

    nested: ClassVar[Nested] = {"format": OutputFormat}


class RequestMetadata(Body):
    user_id: Annotated[str, Field(max_length=512)] | None = None
    """Written to the log with the request's id."""


class ConversationFields(UnusedByConversations, OfferedTools):
    """The fields that messages and token counts share."""

    model: str | None = None
    """The name of the model. The default is the first model of the configuration."""
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    """The conversation so far, for the model's chat template."""
    system: TextContent | None = None
    """The system prompt: a text, or text blocks."""
    thinking: ThinkingConfig | None = None
    """Whether the model reasons before its answer. The default is that of the chat template."""
    output_config: OutputConfig | None = None
    """The form of the answer, and the effort of the model."""
    output_format: OutputFormat | None = None
    """The older name of `output_config.format`."""

    nested: ClassVar[Nested] = {
        **OfferedTools.nested,
        "messages": Turn,
        "system": TextBlock,
        "thinking": ThinkingConfig,
        "output_config": OutputConfig,
        "output_format": OutputFormat,
    }

    def to_prompt(self) -> ChatPrompt:
        """Raises InvalidRequest."""
        return to_prompt(self.system, self.messages, self.for_template(), json.dumps(self._variables()))

    def _variables(self) -> dict[str, object]:
        """The variables of the chat template."""
        variables: dict[str, object] = {}
        if self.thinking is not None:
            variables["enable_thinking"] = self.thinking.type in ("enabled", "adaptive")
        if self.output_config is not None and self.output_config.effort is not None:
            variables["reasoning_effort"] = self.output_config.effort
        return variables


class CountTokensBody(ConversationFields):
    def to_query(self) -> Tokenize:
        """Raises InvalidRequest."""
        return Tokenize(self.to_prompt())


class MessagesBody(UnusedByAnswers, ConversationFields):
    max_tokens: TokenCount
    """The maximum number of tokens of the answer."""
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    """The sampling temperature; 0 is greedy. The default is that of the model."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens that together have this probability. The default is that of the model."""
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    """Sample from this number of the most likely tokens; 0 samples from all tokens."""
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True, default_factory=list)]
    """The answer ends before the first of these strings that occurs in it."""
    stream: bool = False
    """Whether the answer comes as events."""
    metadata: RequestMetadata | None = None
    """Who the request is from."""

    nested: ClassVar[Nested] = {**ConversationFields.nested, "metadata": RequestMetadata}

    @property
    def user(self) -> str | None:
        return None if self.metadata is None else self.metadata.user_id

    @property
    def omits_thinking(self) -> bool:
        """Whether the answer's thinking blocks are empty."""
        return self.thinking is not None and self.thinking.display == "omitted"

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop_sequences),
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        given = {
            "output_config.format": None if self.output_config is None else self.output_config.format,
            "output_format": self.output_format,
        }
        grammars = [value.grammar(field) for field, value in given.items() if value is not None]
        if len(grammars) > 1:
            raise InvalidRequest(
                "Fields 'output_config.format' and 'output_format' each set the form of the answer. Send one of them.",
                param="output_format",
            )
        return grammars[0] if grammars else None
