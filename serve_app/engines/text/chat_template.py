"""A model's chat template: renders conversations in the forms that the template takes, which it detects."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jinja2

from serve_app.core.requests import ChatMessage, ChatPrompt
from serve_app.engines.text.reasoning_format import ReasoningFormat, detect_reasoning
from serve_app.engines.text.time_limit import TimeLimit, TookTooLong
from serve_app.engines.text.tool_format import (
    MarkerTokens,
    MessageStyle,
    ToolCallFormat,
    detect_tool_template,
    wants_content_parts,
)
from serve_app.engines.text.tool_use import NO_TOOL_SUPPORT
from serve_app.errors import InvalidRequest, ServeAppError

logger = logging.getLogger(__name__)

_MESSAGES = "messages"
# Loops of a template can nest, so that a hostile one would never end.
_RENDER_S = 5.0
# Above the text of the largest body with `limits.max_body_bytes` of 16 MB. A template can repeat its messages.
_MAX_CHARACTERS = 32_000_000


class ChatTemplate:
    """The chat template of a transformers tokenizer. Its forms are detected by rendering samples.

    `markers` are the tokenizer's tokens that are no text to a grammar; None: the model has no grammars and no tools.
    With `sanitize`, a control token in the texts of a conversation is encoded as ordinary text. Control tokens are the
    special tokens and the added tokens that the template writes. `source` replaces the tokenizer's own template.
    """

    def __init__(self, tokenizer: Any, markers: MarkerTokens | None, sanitize: bool = True, source: str = "") -> None:
        self._tokenizer = tokenizer
        self._replacement = source or None
        self._source = source or str(tokenizer.chat_template or "")
        self._control_tokens = _longest_first(self._find_control_tokens()) if sanitize else []
        self._control_pattern = re.compile("|".join(map(re.escape, self._control_tokens)))
        parts = bool(self._source) and wants_content_parts(self._rendered_sample)
        tools = detect_tool_template(self._rendered_sample, markers, parts) if self._source and markers else None
        self._style = MessageStyle(content_parts=parts) if tools is None else tools.message_style
        self.tools: ToolCallFormat | None = None if tools is None else tools.call_format
        self.reasoning: ReasoningFormat | None = detect_reasoning(self._rendered_beginning, self._style, self._source)

    def encode_or_render(self, prompt: ChatPrompt) -> str | list[int] | ServeAppError:
        """The text of a conversation; its token ids if the text alone does not say what is a control token."""
        if not self._source:
            return InvalidRequest("this model has no chat template; use /v1/completions or /generate", param=_MESSAGES)
        error = self._unsupported_tools(prompt)
        if error is not None:
            return error
        try:
            return self._encode_or_render(prompt)
        except jinja2.TemplateError as error:
            return InvalidRequest(f"the model's chat template refuses these messages: {error}", param=_MESSAGES)
        except TookTooLong:
            logger.warning("the chat template ran for longer than %g s", _RENDER_S)
            return InvalidRequest("the model's chat template takes too long for these messages", param=_MESSAGES)
        except Exception as error:
            # A template is foreign code, and fails on values of other types than it expects. Its error must not fail
            # the other prompts of the batch.
            logger.warning("the chat template failed", exc_info=True)
            message = f"the model's chat template failed on these messages: {type(error).__name__}"
            return InvalidRequest(message, param=_MESSAGES)

    def _encode_or_render(self, prompt: ChatPrompt) -> str | list[int] | ServeAppError:
        messages: Any = [self._style.message(self._with_known_role(message)) for message in prompt.messages]
        tools: Any = [json.loads(tool) for tool in prompt.tools] or None
        variables: Any = json.loads(prompt.variables)
        marked = self._has_control_token((messages, tools, variables))
        if marked:
            messages, tools, variables = map(self._marked, (messages, tools, variables))
        try:
            with TimeLimit(_RENDER_S):
                text = self._rendered(messages, tools, variables, prompt)
            if len(text) > _MAX_CHARACTERS:
                return InvalidRequest(
                    "the model's chat template makes too long a text of these messages", param=_MESSAGES
                )
            return self._encode_marked(text) if marked else text
        except ValueError as error:  # the library's, for an answer that cannot be continued, or a token without a text
            return InvalidRequest(f"the model's chat template cannot use these messages: {error}", param=_MESSAGES)

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        prompt: ChatPrompt,
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._replacement,
                tokenize=False,
                add_generation_prompt=prompt.begins_answer and not prompt.continues,
                continue_final_message=prompt.continues,
                **variables,
            )
        )

    def _rendered_sample(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        return str(
            self._tokenizer.apply_chat_template(messages, tools=tools, chat_template=self._replacement, tokenize=False)
        )

    def _rendered_beginning(self, messages: list[dict[str, Any]], begins_answer: bool) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=self._replacement, tokenize=False, add_generation_prompt=begins_answer
            )
        )

    def _with_known_role(self, message: ChatMessage) -> ChatMessage:
        """A message of role `developer` becomes one of role `system`, unless the template has this role."""
        if message.role != "developer" or "developer" in self._source:
            return message
        return replace(message, role="system")

    def _unsupported_tools(self, prompt: ChatPrompt) -> InvalidRequest | None:
        if self.tools is not None:
            return None
        if prompt.tools:
            return InvalidRequest(NO_TOOL_SUPPORT, param="tools")
        if any(message.tool_calls or message.role == "tool" for message in prompt.messages):
            return InvalidRequest("this model's chat template takes no tool calls", param=_MESSAGES)
        return None

    def _find_control_tokens(self) -> list[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special or token.content in self._source]

    def _has_control_token(self, value: object) -> bool:
        return any(token in text for text in _strings(value) for token in self._control_tokens)

    def _encode_marked(self, text: str) -> list[int]:
        from transformers.utils.chat_template_utils import encode_marked_chat  # imports take seconds

        return list(encode_marked_chat(self._tokenizer, text))

    def _marked(self, value: Any) -> Any:
        """The value with marks around its control tokens, which are encoded as text."""
        from transformers.utils.chat_template_utils import mark_control_tokens  # imports take seconds

        if isinstance(value, dict):
            return {self._marked(key): self._marked(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._marked(one) for one in value]
        return mark_control_tokens(value, self._control_pattern)


def _strings(value: object) -> Iterable[str]:
    """The strings in JSON data, keys of objects included."""
    remaining = [value]
    while remaining:
        match remaining.pop():
            case str() as text:
                yield text
            case dict() as members:
                remaining += [*members.keys(), *members.values()]
            case list() | tuple() as items:
                remaining += items


def _longest_first(tokens: Iterable[str]) -> list[str]:
    """A token precedes the tokens that are a part of it, as a regular expression needs it."""
    return sorted(filter(None, tokens), key=len, reverse=True)
