"""How templates write calls of tools is learned, and answers call tools in just that way."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from serve_app.api.openai.tools import ToolFields
from serve_app.config import template_path
from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.queries import GetModelInfo, ModelInfo
from serve_app.core.requests import ChatMessage, ChatPrompt, Grammar, SamplingParams, ToolCall
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.loader import SourceError, builtin_gguf, convert_gguf, load
from serve_app.engines.native.sampler import sample
from serve_app.engines.native.sequence import Sequence
from serve_app.engines.text.tokenizer import HFText
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_grammar import Tool, tool_grammar
from serve_app.engines.text.tool_parser import Call, CallParser, parse
from serve_app.errors import InvalidRequest
from tests.api import syntaxes
from tests.api.syntaxes import written
from tests.api.test_tool_calls import together
from tests.engines.native.helpers import request, streams, tokens_of
from tests.models import templates, tiny
from tests.models.crowd import ask, model_config, running
from tests.models.schemas import schema

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

SHIPPED = "builtin:chatml_tools"
END = 2
# Template, tokens of its own, those that are special, what it has to be found to write.
FAMILIES: dict[str, tuple[str, list[str], list[str], ToolCallFormat]] = {
    "shipped": (template_path(SHIPPED).read_text(), [], [], syntaxes.HERMES),
    "qwen": (templates.QWEN, ["<tool_call>", "</tool_call>", "<think>", "</think>"], [], syntaxes.HERMES),
    "qwen 3": (templates.QWEN_3, ["<tool_call>", "</tool_call>", "<think>", "</think>"], [], syntaxes.HERMES),
    "smollm": (
        templates.SMOLLM,
        [],
        [],
        ToolCallFormat(
            '<tool_call>[{"name": "', '", "arguments": ', '}, {"name": "', "}]</tool_call>", True, "<tool_call>", True
        ),
    ),
    "mistral": (templates.MISTRAL, [], ["[TOOL_CALLS]", "[/INST]", "</s>"], syntaxes.MISTRAL),
    "llama": (templates.LLAMA, [], [], syntaxes.LLAMA),
    "deepseek": (templates.DEEPSEEK, [], [sign for sign, _ in syntaxes.MARKS.signs], syntaxes.MARKS),
    "name last": (templates.NAME_LAST, [], [], syntaxes.NAME_LAST),
    "tag": (
        templates.FUNCTION_TAG,
        [],
        [],
        ToolCallFormat("<function=", ">", "</function><function=", "</function>", True, "<function=", True),
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "weather_now"}},
]
NOTHING = {"type": "object", "maxProperties": 0}
SCHEMAS: dict[str, dict[str, Any]] = {"weather": PLACE, "weather_now": NOTHING}
CALLS = (ToolCall("call_abcdef", "weather", '{"city": "Łódź"}'), ToolCall("call_ghijkl", "weather_now", "{}"))
USER = ChatMessage("user", "How is it?")
OFFERED = tuple(json.dumps(tool) for tool in TOOLS)


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert_gguf(builtin_gguf(), lambda stage: None)


def family_text(folder: Path, family: str) -> HFText:
    """The embedded model's tokenizer with the template and the tokens of a family."""
    template, tokens, special, _ = FAMILIES[family]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("</s>") if "</s>" in special else END
    return HFText(tokenizer, frozenset({end}), len(tokenizer))


def syntax_of(text: HFText) -> ToolCallFormat:
    assert text.tools is not None
    return text.tools


def prompt_text(text: HFText, *messages: ChatMessage, tools: tuple[str, ...] = OFFERED) -> str:
    (ids,) = text.encode([ChatPrompt(messages, tools)])
    assert isinstance(ids, list), ids
    return text._rust.decode(ids, skip_special_tokens=False)


# What is learned


@families
def test_a_familys_way_is_found(folder: Path, family: str) -> None:
    found, expected = syntax_of(family_text(folder, family)), FAMILIES[family][3]
    assert replace(found, signs=expected.signs, hidden=expected.hidden, free=()) == expected
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, tokens, special, _ = FAMILIES[family]
    assert [sign for sign, _ in found.signs] == [x for x in (*tokens, *special) if x in found.before + found.after]
    assert all(token >= len(tokenizer) for _, token in found.signs)
    assert found.hidden == tuple(sign for sign, _ in found.signs if sign in special)


def test_what_may_be_thought_before_a_call_is_free(folder: Path) -> None:
    """Tokens like <think>, which are no text to a grammar and yet not special."""
    text = family_text(folder, "qwen 3")
    think = [text._rust.token_to_id(token) for token in ("<think>", "</think>")]
    assert syntax_of(text).free == ((think[0], think[1]),)


def test_ids_that_a_template_shortens_are_no_part_of_a_call(folder: Path) -> None:
    """As Mistral Small 3.1 does. It is told short ones, then."""
    shortening = templates.MISTRAL.replace("length != 9", "length < 9").replace("c.id +", "c.id[-9:] +")
    assert shortening.count("[-9:]") == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[TOOL_CALLS]", "</s>"], special_tokens=True)
    tokenizer.chat_template = shortening
    text = HFText(tokenizer, frozenset({tokenizer.convert_tokens_to_ids("</s>")}), len(tokenizer))
    assert syntax_of(text) == syntax_of(family_text(folder, "mistral"))


def test_ids_elsewhere_than_in_a_calls_object_are_not_understood(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates.FUNCTION_TAG.replace("'<function=' +", "'<function id=' + c.id + ' name=' +")
    assert "c.id" in tokenizer.chat_template
    assert HFText(tokenizer, frozenset({END}), len(tokenizer)).tools is None


@pytest.mark.parametrize(
    "template", [templates.DEAF, templates.PARAMETERS, "{{ raise_exception('no') }}", "{% if %}", ""]
)
def test_a_template_that_takes_no_tools_or_writes_no_json_is_known(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    text = HFText(tokenizer, frozenset({END}), len(tokenizer))
    assert text.tools is None
    for prompt in (ChatPrompt((USER,), OFFERED), ChatPrompt((USER, ChatMessage("assistant", "", CALLS[:1])))):
        (refusal,) = text.encode([prompt])
        assert isinstance(refusal, InvalidRequest)
        if template:
            assert "takes no tools" in str(refusal)
            assert refusal.param == ("tools" if prompt.tools else "messages")


def test_the_embedded_models_own_template_takes_no_tools(folder: Path) -> None:
    assert HFText(AutoTokenizer.from_pretrained(folder), frozenset({END}), 49152).tools is None


# Prompts


@families
def test_a_prompt_holds_tools_and_earlier_calls_as_the_family_writes_them(folder: Path, family: str) -> None:
    text = family_text(folder, family)
    syntax = syntax_of(text)
    calls = CALLS if syntax.between else CALLS[:1]
    answers = [ChatMessage("tool", "sunny", tool_call_id=call.id, name=call.name) for call in calls]
    said = prompt_text(text, USER, ChatMessage("assistant", "", calls), *answers)
    if family == "mistral":  # it shows tools with the last message of a user only, and ids of its own length
        assert '"id": "call_' not in said
        assert said.count('"call_id": "') == 2
    else:
        assert '"description": "The weather."' in said
        assert written(syntax, *((call.name, call.arguments) for call in calls)) in said
    assert said.count("sunny") == len(calls)


def test_a_template_that_takes_one_call_a_message_refuses_two(folder: Path) -> None:
    (refusal,) = family_text(folder, "llama").encode([ChatPrompt((USER, ChatMessage("assistant", "", CALLS)), OFFERED)])
    assert isinstance(refusal, InvalidRequest)
    assert "one call a message" in str(refusal)


def test_the_shipped_template_is_plain_chatml_without_tools(folder: Path) -> None:
    text = family_text(folder, "shipped")
    said = prompt_text(
        text, ChatMessage("system", "Be brief."), USER, ChatMessage("assistant", "Fine."), USER, tools=()
    )
    assert said == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow is it?<|im_end|>\n"
        "<|im_start|>assistant\nFine.<|im_end|>\n<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt_text(text, USER, tools=()) == "<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\n"


def test_the_shipped_template_shows_tools_to_the_system_and_their_answers_in_one_turn(folder: Path) -> None:
    answers = [
        ChatMessage("tool", word, tool_call_id=call.id) for word, call in zip(("one", "two"), CALLS, strict=True)
    ]
    said = prompt_text(
        family_text(folder, "shipped"),
        ChatMessage("system", "Be brief."),
        USER,
        ChatMessage("assistant", "I look.", CALLS),
        *answers,
    )
    system, _, rest = said.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\n")
    assert [json.loads(line) for line in system.splitlines() if line.startswith('{"type"')] == TOOLS
    assert rest == (
        "<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather_now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# What may be said


def asked(choice: object = "auto", parallel: bool | None = None, tools: list[Any] = TOOLS) -> ToolFields:
    return ToolFields.parse({"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel})


def wish(syntax: ToolCallFormat, fields: ToolFields, **params: Any) -> SamplingParams:
    return fields.constrained(SamplingParams(**params), syntax)


def may_say(text: HFText, grammar: Grammar | None, answer: str) -> bool | None:
    """Whether the answer is complete; None if it may not be said."""
    assert grammar is not None
    constraint, complete = text.constraint(grammar, False), False
    assert not isinstance(constraint, InvalidRequest), constraint
    for token in text._rust.encode(answer, add_special_tokens=False).ids:
        bits = constraint.allowed()  # type: ignore[union-attr]
        assert isinstance(bits, bytearray)
        if complete or not bits[token // 8] >> token % 8 & 1:
            return None
        complete = constraint.accept(token)  # type: ignore[union-attr]
    bits = constraint.allowed()  # type: ignore[union-attr]
    (end,) = text.end_ids
    assert isinstance(bits, bytearray)
    return complete or bool(bits[end // 8] >> end % 8 & 1)


GOOD = ("weather", '{"city": "Rome", "days": 2}')
OTHER = ("weather_now", "{}")


@families
def test_one_that_has_to_call_says_calls_and_nothing_else(folder: Path, family: str) -> None:
    text = family_text(folder, family)
    syntax = syntax_of(text)
    grammar = wish(syntax, asked("required")).grammar
    assert may_say(text, grammar, written(syntax, GOOD))
    assert may_say(text, grammar, written(syntax, OTHER))
    assert may_say(text, grammar, written(syntax, GOOD, OTHER, GOOD)) is (True if syntax.between else None)
    assert may_say(text, grammar, written(syntax, GOOD).removesuffix(syntax.after)) is False
    assert may_say(text, grammar, "It is warm.") is None
    assert may_say(text, grammar, written(syntax, ("clock", "{}"))) is None
    assert may_say(text, grammar, written(syntax, ("weather", '{"city": 5}'))) is None
    assert may_say(text, grammar, written(syntax, ("weather", "{}"))) is None
    assert may_say(text, grammar, written(syntax, ("weather_now", '{"a": 1}'))) is None


@families
def test_one_that_may_call_says_what_it_likes_or_calls(folder: Path, family: str) -> None:
    text = family_text(folder, family)
    syntax = syntax_of(text)
    grammar = wish(syntax, asked()).grammar
    said = "Let me look.\n" if syntax.anywhere else ""
    assert may_say(text, grammar, "It is warm, < 30 {°C}\n")
    assert may_say(text, grammar, "")
    assert may_say(text, grammar, said + written(syntax, GOOD))
    assert may_say(text, grammar, said + written(syntax, GOOD, OTHER)) is (True if syntax.between else None)
    assert may_say(text, grammar, said + syntax.trigger) is False
    assert may_say(text, grammar, written(syntax, ("clock", "{}"))) is None
    assert may_say(text, grammar, written(syntax, ("weather", '{"city": 5}'))) is None
    assert may_say(text, grammar, written(syntax, GOOD) + " Done.") is None


@families
def test_one_call_is_one_call(folder: Path, family: str) -> None:
    text = family_text(folder, family)
    syntax = syntax_of(text)
    named = asked({"type": "function", "function": {"name": "weather"}})
    for fields in (asked("required", parallel=False), asked(parallel=False), named):
        grammar = wish(syntax, fields).grammar
        assert may_say(text, grammar, written(syntax, GOOD))
        assert may_say(text, grammar, written(syntax, GOOD, GOOD)) is None
    assert may_say(text, wish(syntax, named).grammar, written(syntax, OTHER)) is None


def test_thoughts_may_come_before_a_call(folder: Path) -> None:
    text = family_text(folder, "qwen 3")
    grammar = wish(syntax_of(text), asked()).grammar
    assert may_say(text, grammar, "<think>\nHm.\n</think>\n\n" + written(syntax_of(text), GOOD))
    assert may_say(text, grammar, "<think>\nHm.\n</think>\n\nWarm.")


def test_a_trigger_that_is_spelt_is_one_as_well(folder: Path) -> None:
    """Where it has a token of its own, and a model writes its characters instead."""
    text = family_text(folder, "qwen")
    grammar = wish(syntax_of(text), asked()).grammar
    assert grammar is not None
    constraint = text.constraint(grammar, False)
    plain = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    for token in plain.encode("Now <tool_call>", add_special_tokens=False).ids:
        assert not constraint.accept(token)  # type: ignore[union-attr]
    bits = constraint.allowed()  # type: ignore[union-attr]
    assert isinstance(bits, bytearray)
    allowed = {token for token in range(text.vocabulary) if bits[token // 8] >> token % 8 & 1}
    assert allowed
    assert all('\n{"name": "'.startswith(text.token_text(token)) for token in allowed)


@pytest.mark.parametrize(
    ("schemas", "field", "says"),
    [
        ([PLACE, {"properties": {"a": {"type": "strange"}}}], "tools[1].function.parameters", "strange"),
        ([{"not": {"type": "string"}}, PLACE], "tools[0].function.parameters", "does not compile"),
        ([{"description": "x" * 70_000}], "tools[0].function.parameters", "at most 65536"),
        ([{"description": "x" * 30_000}, {"description": "x" * 40_000}], "tools", "at most 65536"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_its_tool(
    folder: Path, schemas: list[Any], field: str, says: str
) -> None:
    text = family_text(folder, "shipped")
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": s}} for n, s in enumerate(schemas)]
    grammar = wish(syntax_of(text), asked("required", tools=tools)).grammar
    assert grammar is not None
    refusal = text.constraint(grammar, False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == field
    assert says in str(refusal)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("syntax", syntaxes.ALL.values(), ids=syntaxes.ALL)
def test_any_walk_is_calls_whose_arguments_fit(syntax: ToolCallFormat, number: int) -> None:
    """Bytes by the roll of a die, through schemas with escapes, patterns and what not."""
    text = HFText(tiny.tokenizer(), frozenset({256}), tiny.VOCABULARY)
    rng = random.Random(number)
    tools = [Tool(f"tool-{n}", schema(2000 + 10 * number + n), f"tools[{n}]") for n in range(rng.randint(1, 3))]
    spelt = replace(syntax, signs=(), hidden=())
    grammar = tool_grammar(spelt, tools, must=True, several=True)
    constraint = text.constraint(grammar, False)
    assert not isinstance(constraint, InvalidRequest), constraint
    (stream,) = streams([request("x", params=SamplingParams(seed=number, grammar=grammar))])
    walk = Sequence(stream, [5], text.end_ids, 6000, constraint)  # type: ignore[arg-type]
    reason = None
    while reason is None:
        (sampled,) = tokens_of(sample(torch.zeros(1, tiny.VOCABULARY), [walk], text.token_text))
        reason = walk.accept(sampled, 0.0).finish_reason
    assert reason is FinishReason.STOP
    answer = text._rust.decode([token for token in walk.tokens[1:] if token != 256])
    content, calls = parse(spelt, answer)
    assert content == ""
    assert calls
    schemas = {tool.name: tool.schema for tool in tools}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name], jsonschema.Draft202012Validator)


# The embedded model, with the template that ships


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    config = model_config("builtin:smollm2-135m", max_running=16, max_context=1024, max_step_tokens=96, threads=1)
    with running(config.model_copy(update={"dtype": "bfloat16", "chat_template": SHIPPED})) as engine:
        yield engine


def known(engine: NativeEngine) -> ToolCallFormat:
    info = engine.answer(GetModelInfo())
    assert isinstance(info, ModelInfo)
    assert info.tools is not None
    return info.tools


async def say(engine: NativeEngine, fields: ToolFields, *messages: ChatMessage, **params: Any) -> list[TokenEvent]:
    params = {"max_tokens": 200, "temperature": 1.0} | params
    prompt = ChatPrompt(messages or (ChatMessage("user", "What is the weather in Paris?"),), fields.offered())
    return await ask(engine, prompt, wish(known(engine), fields, **params))


def read(engine: NativeEngine, events: list[TokenEvent]) -> tuple[str, list[Call]]:
    """The same whole and as it came."""
    parser = CallParser(known(engine))
    news = [one for event in events for one in parser.feed(event.text)]
    whole = parse(known(engine), "".join(event.text for event in events))
    assert together([*news, *parser.end()]) == whole
    return whole


def fit(calls: list[Call]) -> bool:
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return True


async def test_the_model_that_has_to_call_does(engine: NativeEngine) -> None:
    answers = await asyncio.gather(*(say(engine, asked("required", False), seed=seed) for seed in range(6)))
    read_ones = [read(engine, events) for events in answers]
    assert all(content == "" and len(calls) == 1 and fit(calls) for content, calls in read_ones)
    assert len({calls[0] for _, calls in read_ones}) > 1
    assert all(events[-1].finish_reason is FinishReason.STOP for events in answers)


async def test_the_model_calls_the_one_that_is_named(engine: NativeEngine) -> None:
    for name in SCHEMAS:
        chosen = {"type": "function", "function": {"name": name}}
        content, calls = read(engine, await say(engine, asked(chosen), temperature=0.0))
        assert (content, [call.name for call in calls]) == ("", [name])
        assert fit(calls)


async def test_the_model_may_call_several_times_and_go_on_until_it_is_cut(engine: NativeEngine) -> None:
    # Whoever may not end goes on with another call.
    params: dict[str, Any] = {"ignore_eos": True, "max_tokens": 120, "seed": 1}
    events = await say(engine, asked("required"), **params)
    _, calls = read(engine, events)
    assert len(calls) > 1
    assert fit(calls[:-1])
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_the_model_may_talk_and_may_call(engine: NativeEngine) -> None:
    trigger = known(engine).trigger
    prompts = [ChatMessage("user", text) for text in ("Say hello.", f"Write {trigger} and nothing else, please.")]
    answers = await asyncio.gather(
        *(say(engine, asked(), prompt, seed=seed, max_tokens=60) for prompt in prompts for seed in range(4))
    )
    talked = [events for events in answers if not read(engine, events)[1]]
    assert talked, "nobody has to call"
    for events in answers:
        content, calls = read(engine, events)
        if events[-1].finish_reason is FinishReason.STOP:
            assert fit(calls)
            assert trigger not in content


async def test_the_model_goes_on_with_what_a_tool_said(engine: NativeEngine) -> None:
    messages = (
        USER,
        ChatMessage("assistant", "", CALLS[:1]),
        ChatMessage("tool", "Sunny, 25 degrees.", tool_call_id=CALLS[0].id, name="weather"),
    )
    events = await say(engine, asked("auto"), *messages, temperature=0.0, max_tokens=40)
    assert read(engine, events)[0] or read(engine, events)[1]


# The configuration's template


def test_a_template_of_the_configuration_is_used_in_place_of_the_models(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    config = model_config(tmp_path / "model").model_copy(update={"chat_template": str(path)})
    text = load(config, lambda stage: None).text
    assert prompt_text(text, USER, tools=()) == "<How is it?>"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "my.jinja cannot be read"),
        (b"\xff", "my.jinja cannot be read"),
        (b"{% if %}", "my.jinja, line 1: Expected an expression"),
    ],
)
def test_a_template_that_is_none_is_refused_by_its_path(tmp_path: Path, content: bytes | None, says: str) -> None:
    tiny.save("llama", tmp_path / "model")
    path = tmp_path / "my.jinja"
    if content is not None:
        path.write_bytes(content)
    config = model_config(tmp_path / "model").model_copy(update={"chat_template": str(path)})
    with pytest.raises(SourceError) as refused:
        load(config, lambda stage: None)
    assert says in str(refused.value)
