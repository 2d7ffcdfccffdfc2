"""Requests that differ in a field that can change the answer have different keys."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any

import pytest

from serve_app.config import Model
from serve_app.core.requests import (
    Adapter,
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
)
from serve_app.gateway.cache_key import NOT_IN_IDENTITY, NOT_IN_KEY, CacheKeys, is_deterministic
from tests.configs import DEPLOYMENT, MODEL

KEYS = CacheKeys(Model(**MODEL), "")
MESSAGES = (
    ChatMessage("user", "What is 1 + 1?"),
    ChatMessage("assistant", "", (ToolCall("c1", "add", '{"a": 1}'),), reasoning="hm"),
    ChatMessage("tool", "2", tool_call_id="c1", name="add"),
)
FULL = GenerationRequest(
    "r",
    "m",
    ChatPrompt(MESSAGES, ('{"name": "add"}',), '{"x": 1}'),
    SamplingParams(
        temperature=0.5,
        seed=3,
        stop=("x",),
        stop_token_ids=(7,),
        logit_bias=((1, 0.5),),
        grammar=Grammar("choice", '["a"]', parts=(Grammar("regex", "a+"),)),
    ),
    1.0,
    2.0,
    tool_choice=ToolChoice((Tool("add", "{}", "tools.0"),)),
    adapter=Adapter("a", "/a", digest="d"),
)


# Characters that a representation escapes or uses itself.
CHARACTERS = "ab0 '\"\\\n(),=[]é\ud83d\x00"


def other(value: Any, draw: random.Random) -> Any:
    """A random different value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw.choice((-1, 1)) * draw.randrange(1, 2**40)
    if isinstance(value, float):
        return value + draw.choice((-1, 1)) * draw.uniform(1e-9, 2)
    if isinstance(value, str):
        return value + "".join(draw.choices(CHARACTERS, k=draw.randrange(1, 8)))
    if isinstance(value, tuple):
        return (*value, draw.choice((draw.randrange(1000), draw.random(), "".join(draw.choices(CHARACTERS, k=4)))))
    assert value is None, value
    return draw.randrange(2**40)


def variants(data: Any, rebuild: Callable[[Any], GenerationRequest]) -> Iterator[Callable[[random.Random], Any]]:
    """For each field below `data` a function that makes the request with another value of that field."""
    for field in fields(data):
        value = getattr(data, field.name)
        if data is FULL and field.name in NOT_IN_KEY:
            continue
        yield lambda draw, name=field.name, value=value: rebuild(  # type: ignore[misc]
            replace(data, **{name: None if is_dataclass(value) else other(value, draw)})
        )
        yield from parts_of(data, field, value, rebuild)


def parts_of(data: Any, field: Field[Any], value: Any, rebuild: Callable[[Any], GenerationRequest]) -> Iterator[Any]:
    if is_dataclass(value):
        yield from variants(value, lambda new: rebuild(replace(data, **{field.name: new})))
    elif isinstance(value, tuple):
        for at, member in enumerate(value):
            if is_dataclass(member):
                yield from variants(
                    member,
                    lambda new, at=at: rebuild(  # type: ignore[misc]
                        replace(data, **{field.name: (*value[:at], new, *value[at + 1 :])})
                    ),
                )


VARIANTS = list(variants(FULL, lambda request: request))


@pytest.mark.slow
def test_100_000_requests_that_differ_in_one_field_get_no_answer_of_the_other() -> None:
    draw = random.Random(5)
    assert len(VARIANTS) > 60
    wrong, seen = 0, {KEYS.key(FULL): FULL}
    for number in range(100_000):
        changed = VARIANTS[number % len(VARIANTS)](draw)
        wrong += seen.setdefault(KEYS.key(changed), changed) != changed
    assert wrong == 0
    assert len(seen) > 60_000, "a boolean has one other value"


@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_every_field_of_every_level_is_a_part_of_the_key(number: int) -> None:
    changed = VARIANTS[number](random.Random(1))
    assert changed != FULL
    assert KEYS.key(changed) != KEYS.key(FULL)


def test_the_fields_that_are_no_part_of_the_key_are_fields() -> None:
    names = {field.name for field in fields(GenerationRequest)}
    assert names >= NOT_IN_KEY
    assert Model.model_fields.keys() >= NOT_IN_IDENTITY
    for name in NOT_IN_KEY:
        change: Any = {name: other(getattr(FULL, name), random.Random(1))}
        assert KEYS.key(replace(FULL, **change)) == KEYS.key(FULL), name


def test_a_field_that_is_added_later_is_a_part_of_the_key() -> None:
    @dataclass(frozen=True, slots=True)
    class Later(GenerationRequest):
        later: str = ""

    values = {field.name: getattr(FULL, field.name) for field in fields(FULL)}
    keys = {KEYS.key(Later(**values, later=value)) for value in ("", "one", "two")}
    assert len(keys) == 3


def test_no_field_is_left_out_of_the_representation() -> None:
    kinds = (GenerationRequest, SamplingParams, Grammar, ToolCall, ChatMessage, ChatPrompt, TextPrompt, TokenPrompt)
    for kind in (*kinds, Tool, ToolChoice, Adapter):
        assert all(field.repr for field in fields(kind)), kind


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (TextPrompt("1"), TokenPrompt((1,))),
        (TextPrompt("a', special_tokens=True)"), TextPrompt("a")),
        (ChatPrompt((ChatMessage("user", "ab"), ChatMessage("user", ""))), ChatPrompt((ChatMessage("user", "ab"),))),
        (ChatPrompt((), ("a", "b")), ChatPrompt((), ("a', 'b",))),
        (TokenPrompt((1, 23)), TokenPrompt((12, 3))),
    ],
)
def test_prompts_of_different_kinds_or_parts_differ(one: Any, two: Any) -> None:
    assert KEYS.key(replace(FULL, prompt=one)) != KEYS.key(replace(FULL, prompt=two))


# For each option of a model that can change its answers another value.
OPTIONS: dict[str, Any] = {
    "name": "n",
    "source": "builtin:toy?step_ms=1",
    "revision": "abc",
    "trust_remote_code": True,
    "chat_template": "/t.jinja",
    "sanitize_control_tokens": False,
    "dtype": "bfloat16",
    "quantization": "int8",
    "device": "cpu",
    "device_map": "auto",
    "embeddings": True,
    "resources": {"num_cpus": 2},
    "engine": {"max_context": 64},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_model_and_its_options_are_a_part_of_the_key(option: str) -> None:
    assert CacheKeys(Model(**{**MODEL, option: OPTIONS[option]}), "").key(FULL) != KEYS.key(FULL)


def test_every_option_of_a_model_is_a_part_of_the_key_or_listed() -> None:
    assert OPTIONS.keys() | NOT_IN_IDENTITY == Model.model_fields.keys()


def test_the_scale_of_a_model_is_no_part_of_the_key_and_the_namespace_is() -> None:
    scaled = {**MODEL, "deployment": {**DEPLOYMENT, "num_replicas": 2}, "sampling_defaults": {"temperature": 0.1}}
    assert CacheKeys(Model(**scaled), "").key(FULL) == KEYS.key(FULL)
    assert CacheKeys(Model(**MODEL), "other").key(FULL) != KEYS.key(FULL)


@pytest.mark.parametrize(
    ("params", "more", "expected"),
    [
        (SamplingParams(temperature=0), {}, True),
        (SamplingParams(temperature=0.0, seed=1), {}, True),
        (SamplingParams(temperature=1, seed=0), {}, True),
        (SamplingParams(temperature=1), {}, False),
        (SamplingParams(temperature=1), {"embed": True}, True),
        (SamplingParams(temperature=0), {"resumed": (1,)}, False),
    ],
)
def test_requests_with_one_possible_answer_are_deterministic(
    params: SamplingParams, more: dict[str, Any], expected: bool
) -> None:
    assert is_deterministic(replace(FULL, params=params, **more)) is expected
