"""Model families that write tool calls in different formats, with the embedded model's tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from serve_app.config import template_path
from serve_app.core.requests import Tool, ToolChoice
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.text.tool_format import ToolCallFormat

from . import call_formats, chat_templates
from .sample_tokenizers import EMBEDDED_END, embedded_tokenizer, extended_tokenizer

SHIPPED_TEMPLATE = "builtin:chatml_tools"

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# The tools as a chat template shows them to the model.
OPENAI_TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "weather_now"}},
]
SHOWN_TOOLS = tuple(json.dumps(tool) for tool in OPENAI_TOOLS)
SCHEMAS = {"weather": PLACE, "weather_now": NO_ARGUMENTS}


def tool(name: str, schema: dict[str, Any], number: int = 0) -> Tool:
    return Tool(name, json.dumps(schema), f"tools[{number}].function.parameters")


TOOLS = tuple(tool(name, schema, number) for number, (name, schema) in enumerate(SCHEMAS.items()))


def choice(*names: str, required: bool = False, parallel: bool = True) -> ToolChoice:
    """A choice among all tools, or among the named ones."""
    return ToolChoice(tuple(tool for tool in TOOLS if tool.name in (names or SCHEMAS)), required, parallel)


@dataclass(frozen=True)
class Family:
    """A chat template, the tokens that the family adds, the special ones among them, and the format to be detected."""

    template: str
    call_format: ToolCallFormat
    tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()


_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
FAMILIES = {
    "shipped": Family(template_path(SHIPPED_TEMPLATE).read_text(), call_formats.HERMES),
    "qwen": Family(chat_templates.QWEN, call_formats.HERMES, _TAGS),
    "qwen 3": Family(chat_templates.QWEN_3, call_formats.HERMES, _TAGS),
    "smollm": Family(
        chat_templates.SMOLLM,
        ToolCallFormat(
            '<tool_call>[{"name": "', '", "arguments": ', '}, {"name": "', "}]</tool_call>", True, "<tool_call>", True
        ),
    ),
    "mistral": Family(chat_templates.MISTRAL, call_formats.MISTRAL, special_tokens=("[TOOL_CALLS]", "[/INST]", "</s>")),
    "llama": Family(chat_templates.LLAMA, call_formats.LLAMA),
    "deepseek": Family(
        chat_templates.DEEPSEEK,
        call_formats.DEEPSEEK,
        special_tokens=tuple(marker for marker, _ in call_formats.DEEPSEEK.markers),
    ),
    "name last": Family(chat_templates.NAME_LAST, call_formats.NAME_LAST),
    "tag": Family(
        chat_templates.FUNCTION_TAG,
        ToolCallFormat("<function=", ">", "</function><function=", "</function>", True, "<function=", True),
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def family_text(name: str) -> HFText:
    """The embedded model's tokenizer with the template and the tokens of a family."""
    family = FAMILIES[name]
    return text_with_tokens(family.template, family.tokens, family.special_tokens)


def text_with_tokens(template: str, tokens: tuple[str, ...] = (), special_tokens: tuple[str, ...] = ()) -> HFText:
    """An answer ends with `</s>` if this is one of the special tokens."""
    if not tokens and not special_tokens:
        tokenizer = embedded_tokenizer(template)
    else:
        tokenizer = extended_tokenizer(template, list(tokens), list(special_tokens))
    end = tokenizer.convert_tokens_to_ids("</s>") if "</s>" in special_tokens else EMBEDDED_END
    return HFText(tokenizer, frozenset({end}), len(tokenizer))


def call_format_of(text: HFText) -> ToolCallFormat:
    assert text.chat.tools is not None
    return text.chat.tools
