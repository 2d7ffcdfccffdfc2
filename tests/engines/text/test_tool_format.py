"""Tests of the detection of tool-call formats, and of prompts that contain tools and earlier calls."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from serve_app.core.requests import ChatMessage, ChatPrompt, ToolCall
from serve_app.engines.text.tokenizer import HFText
from serve_app.errors import InvalidRequest

from . import chat_templates
from .call_formats import write_calls
from .sample_tokenizers import EMBEDDED_VOCABULARY, embedded_tokenizer
from .tool_families import (
    FAMILIES,
    OPENAI_TOOLS,
    SHOWN_TOOLS,
    call_format_of,
    each_family,
    family_text,
    text_with_tokens,
)

pytestmark = pytest.mark.model

USER = ChatMessage("user", "How is it?")
CALLS = (ToolCall("call_abcdef", "weather", '{"city": "Łódź"}'), ToolCall("call_ghijkl", "weather_now", "{}"))


def rendered(text: HFText, *messages: ChatMessage, tools: tuple[str, ...] = SHOWN_TOOLS) -> str:
    """The text of a chat prompt."""
    (ids,) = text.encode([ChatPrompt(messages, tools)])
    assert isinstance(ids, list), ids
    prompt = text.detokenize(ids, skip_special_tokens=False)
    assert isinstance(prompt, str)
    return prompt


# Detection


@each_family
def test_format_of_each_family_is_detected(name: str) -> None:
    family, found = FAMILIES[name], call_format_of(family_text(name))
    expected = replace(
        family.call_format,
        markers=found.markers,
        special_markers=found.special_markers,
        content_markers=found.content_markers,
    )
    assert found == expected
    added = (*family.tokens, *family.special_tokens)
    assert [marker for marker, _ in found.markers] == [x for x in added if x in found.before + found.after]
    assert all(token >= EMBEDDED_VOCABULARY for _, token in found.markers)
    assert found.special_markers == tuple(x for x, _ in found.markers if x in family.special_tokens)


def test_other_markers_that_are_not_special_are_allowed_in_content() -> None:
    text = family_text("qwen 3")
    first, last = (text.detokenize([token], False) for token in call_format_of(text).content_markers[0])
    assert (first, last) == ("<think>", "</think>")
    assert len(call_format_of(text).content_markers) == 1


def test_format_is_detected_if_the_template_shortens_call_ids() -> None:
    """As Mistral Small 3.1 does."""
    template = chat_templates.MISTRAL.replace("length != 9", "length < 9").replace("c.id +", "c.id[-9:] +")
    assert template.count("[-9:]") == 1
    text = text_with_tokens(template, special_tokens=("[TOOL_CALLS]", "</s>"))
    found, expected = call_format_of(text), call_format_of(family_text("mistral"))
    assert replace(found, markers=expected.markers) == expected


def test_format_with_call_ids_outside_the_json_object_is_not_supported() -> None:
    template = chat_templates.FUNCTION_TAG.replace("'<function=' +", "'<function id=' + c.id + ' name=' +")
    assert "c.id" in template
    assert text_with_tokens(template).chat.tools is None


@pytest.mark.parametrize(
    "template", [chat_templates.NO_TOOLS, chat_templates.PARAMETERS, "{{ raise_exception('no') }}", "{% if %}", ""]
)
def test_tools_and_calls_are_refused_if_the_format_is_not_supported(template: str) -> None:
    text = text_with_tokens(template)
    assert text.chat.tools is None
    for prompt in (ChatPrompt((USER,), SHOWN_TOOLS), ChatPrompt((USER, ChatMessage("assistant", "", CALLS[:1])))):
        (refusal,) = text.encode([prompt])
        assert isinstance(refusal, InvalidRequest)
        if template:
            assert "chat template takes no tool" in str(refusal)
            assert refusal.param == ("tools" if prompt.tools else "messages")


def test_template_of_the_embedded_model_takes_no_tools() -> None:
    assert HFText(embedded_tokenizer(), frozenset({2}), EMBEDDED_VOCABULARY).chat.tools is None


# Prompts


@each_family
def test_prompt_contains_tools_and_earlier_calls_in_the_familys_format(name: str) -> None:
    text = family_text(name)
    call_format = call_format_of(text)
    calls = CALLS if call_format.between else CALLS[:1]
    results = [ChatMessage("tool", "sunny", tool_call_id=call.id, name=call.name) for call in calls]
    prompt = rendered(text, USER, ChatMessage("assistant", "", calls), *results)
    if name == "mistral":  # its template shows tools only with the last user message, and requires short call ids
        assert '"id": "call_' not in prompt
        assert prompt.count('"call_id": "') == 2
    else:
        assert '"description": "The weather."' in prompt
        assert write_calls(call_format, *((call.name, call.arguments) for call in calls)) in prompt
    assert prompt.count("sunny") == len(calls)


def test_template_that_takes_one_call_in_a_message_refuses_two() -> None:
    (refusal,) = family_text("llama").encode([ChatPrompt((USER, ChatMessage("assistant", "", CALLS)), SHOWN_TOOLS)])
    assert isinstance(refusal, InvalidRequest)
    assert "one call a message" in str(refusal)


def test_shipped_template_is_plain_chatml_without_tools() -> None:
    text = family_text("shipped")
    messages = (ChatMessage("system", "Be brief."), USER, ChatMessage("assistant", "Fine."), USER)
    assert rendered(text, *messages, tools=()) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow is it?<|im_end|>\n"
        "<|im_start|>assistant\nFine.<|im_end|>\n<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(text, USER, tools=()) == "<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n"


def test_the_role_developer_is_system_unless_the_template_has_it() -> None:
    brief = ChatMessage("developer", "Be brief.")
    text = family_text("shipped")
    assert rendered(text, brief, USER, tools=()) == rendered(text, replace(brief, role="system"), USER, tools=())
    template = "{% for m in messages %}{{ m.role == 'developer' }} {{ m.name }}: {{ m.content }}\n{% endfor %}"
    named = replace(USER, name="Ada")
    assert rendered(text_with_tokens(template), brief, named, tools=()) == "True : Be brief.\nFalse Ada: How is it?\n"


def test_shipped_template_lists_tools_in_the_system_turn_and_results_in_one_turn() -> None:
    results = [
        ChatMessage("tool", word, tool_call_id=call.id) for word, call in zip(("one", "two"), CALLS, strict=True)
    ]
    messages = (ChatMessage("system", "Be brief."), USER, ChatMessage("assistant", "I look.", CALLS), *results)
    system, _, rest = rendered(family_text("shipped"), *messages).partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n")
    assert [json.loads(line) for line in system.splitlines() if line.startswith('{"type"')] == OPENAI_TOOLS
    assert rest == (
        "<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather_now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
