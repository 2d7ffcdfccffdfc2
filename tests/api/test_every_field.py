"""Every field of every body has an effect that a test shows, and an unknown field is refused.

A new field fails here until EFFECTS has an entry for it. That a field which reaches the engine works there is tested in
the engine's tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import httpx
import pytest
from pydantic import ValidationError

import serve_app.api.app  # noqa: F401 (imports the bodies of every route)
from serve_app.api.operations import OPERATIONS
from serve_app.api.sampling import SamplingFields
from serve_app.api.schema import Body
from serve_app.api.unused import Unused
from serve_app.core.events import Chunk
from serve_app.core.requests import (
    Grammar,
    GrammarKind,
    TextPrompt,
    TokenPrompt,
)

from .chat_effects import CHATS
from .effects import MODEL, TOOL, USER, Effect, prompt, shown
from .message_effects import MESSAGE, MESSAGES
from .response_effects import RESPONSES
from .scripted import POSTS, ScriptedEngine
from .test_fields import SCHEMA
from .test_prompt_details import with_details
from .toy import toy

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"


# The sampling fields, which the native and OpenAI's bodies share.
SAMPLING = {
    "temperature": Effect({"temperature": 0.7}, {"temperature": 0.7}),
    "top_p": Effect({"top_p": 0.5}, {"top_p": 0.5}),
    "top_k": Effect({"top_k": 4}, {"top_k": 4}),
    "min_p": Effect({"min_p": 0.1}, {"min_p": 0.1}),
    "repetition_penalty": Effect({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "presence_penalty": Effect({"presence_penalty": -2}, {"presence_penalty": -2}),
    "frequency_penalty": Effect({"frequency_penalty": 2}, {"frequency_penalty": 2}),
    "seed": Effect({"seed": 7}, {"seed": 7}),
    "stop": Effect({"stop": ["x"]}, {"stop": ("x",)}),
    "stop_token_ids": Effect({"stop_token_ids": [7]}, {"stop_token_ids": (7,)}),
    "ignore_eos": Effect({"ignore_eos": True}, {"ignore_eos": True}),
    "min_tokens": Effect({"min_tokens": 2}, {"min_tokens": 2}),
    "logit_bias": Effect({"logit_bias": {"7": 1}}, {"logit_bias": ((7, 1),)}),
    "skip_special_tokens": Effect({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    "include_stop_str_in_output": Effect({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
    "guided_json": Effect(
        {"guided_json": SCHEMA}, {"grammar": Grammar("json_schema", json.dumps(SCHEMA), "guided_json")}
    ),
    "guided_regex": Effect({"guided_regex": "a+"}, {"grammar": Grammar("regex", "a+", "guided_regex")}),
    "guided_choice": Effect({"guided_choice": ["a"]}, {"grammar": Grammar("choice", '["a"]', "guided_choice")}),
    "guided_grammar": Effect(
        {"guided_grammar": 'start: "a"'}, {"grammar": Grammar("lark", 'start: "a"', "guided_grammar")}
    ),
    "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5}),
    "priority": Effect({"priority": -3}, {"priority": -3}),
    "cache_salt": Effect({"cache_salt": "mine"}, {"cache_salt": "mine"}),
}

QUERIED_MODEL = Effect({"model": "org/large"}, {"model": "org/large"})
GRAMMAR = Grammar("json_schema", json.dumps(SCHEMA), "response_format", strict=False)
WITH_SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
WITH_ANY_SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


def parts(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}


# Conversations and tools in Anthropic's form.


def structured(field: str, kind: GrammarKind, text: str = "") -> dict[str, Any]:
    return {"grammar": Grammar(kind, text, f"structured_outputs.{field}")}


INPUTS: dict[str, Any] = {"inputs": "a b"}

# TGI's parameters that make an answer sampled, and what reaches the engine then.
SAMPLING_PARAMETERS: list[tuple[str, Any, dict[str, Any]]] = [
    ("do_sample", True, {"temperature": 0.2}),
    ("temperature", 0.7, {"temperature": 0.7}),
    ("top_k", 4, {"temperature": 0.2, "top_k": 4}),
    ("top_p", 0.5, {"temperature": 0.2, "top_p": 0.5}),
]

# By path, then by body and field.
EFFECTS: dict[str, dict[str, dict[str, Effect]]] = {
    "/generate": {
        "NativeFields": {
            "model": MODEL,
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "do_sample": Effect({"do_sample": False}, {"temperature": 0}),
            "logprobs": Effect({"logprobs": 2}, {"logprobs": 2}),
        },
        "GenerateBody": {"prompt": Effect({"prompt": "a"}, {"prompt": TextPrompt("a")})},
        "TgiBody": {
            "model": Effect(INPUTS | {"model": "org/large"}, {"model": "org/large", "top_p": 1.0}, base=INPUTS),
            "inputs": Effect({"inputs": "c"}, {"prompt": TextPrompt("c")}, base=INPUTS),
            "parameters": Effect({"parameters": {"max_new_tokens": 5}}, {"max_tokens": 5}, base=INPUTS),
        },
        "Parameters": {
            name: Effect({"parameters": {name: value}}, {attribute: becomes}, base=INPUTS)
            for name, value, attribute, becomes in [
                ("max_new_tokens", 5, "max_tokens", 5),
                ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
                ("frequency_penalty", -2, "frequency_penalty", -2),
                ("seed", 9, "seed", 9),
                ("stop", ["x"], "stop", ("x",)),
                ("truncate", 7, "truncate_prompt_tokens", 7),
            ]
        }
        | {
            name: Effect(
                {"parameters": {"seed": 1, name: value}},
                engine,
                base=INPUTS | {"parameters": {"seed": 1}},
            )
            for name, value, engine in SAMPLING_PARAMETERS
        }
        | {
            "return_full_text": Effect({"parameters": {"return_full_text": True}}, answer=True, base=INPUTS),
            "details": Effect({"parameters": {"details": True}}, {"logprobs": 0}, base=INPUTS),
            "decoder_input_details": Effect(
                {"parameters": {"details": True, "decoder_input_details": True}},
                {"prompt_logprobs": 0, "prompt_details": True},
                base=INPUTS | {"parameters": {"details": True}},
            ),
            "best_of": Effect(
                {"parameters": {"do_sample": True, "details": True, "seed": 1, "best_of": 2}},
                {"count": 2, "group": True},
                base=INPUTS | {"parameters": {"do_sample": True, "details": True, "seed": 1}},
            ),
            "top_n_tokens": Effect(
                {"parameters": {"details": True, "top_n_tokens": 3}},
                {"logprobs": 3},
                base=INPUTS | {"parameters": {"details": True}},
            ),
            "grammar": Effect(
                {"parameters": {"grammar": {"type": "regex", "value": "a"}}},
                {"grammar": Grammar("regex", "a", "parameters.grammar")},
                base=INPUTS,
            ),
            **{name: Effect({"parameters": {name: None}}, base=INPUTS) for name in ("typical_p",)},
        },
        "GrammarField": {
            "type": Effect(
                {"parameters": {"grammar": {"type": "json", "value": "{}"}}},
                {"grammar": Grammar("json_schema", "{}", "parameters.grammar")},
                base=INPUTS | {"parameters": {"grammar": {"type": "regex", "value": "{}"}}},
            ),
            "value": Effect(
                {"parameters": {"grammar": {"type": "regex", "value": "b"}}},
                {"grammar": Grammar("regex", "b", "parameters.grammar")},
                base=INPUTS | {"parameters": {"grammar": {"type": "regex", "value": "a"}}},
            ),
        },
    },
    "/": {"TgiBody": {"stream": Effect({"stream": True}, {"logprobs": 0, "wake_wait_s": None}, base=INPUTS)}},
    "/generate_stream": {"StreamBody": {"include_text": Effect({"include_text": False}, answer=True)}},
    "/generate_batch": {
        "BatchBody": {
            "prompts": Effect({"prompts": ["a", "b"]}, {"prompt": TextPrompt("a"), "count": 2}),
            "requests": Effect({"prompts": None, "requests": [{"prompt": "a"}]}, {"prompt": TextPrompt("a")}),
        }
    },
    COMPLETIONS: {
        "OpenAIFields": {
            "model": MODEL,
            "n": Effect({"n": 2}, {"count": 2, "group": True}),
            "response_format": Effect({"response_format": WITH_SCHEMA}, {"grammar": GRAMMAR}),
            "stream": Effect({"stream": True}, {"wake_wait_s": None}),
            "stream_options": Effect(
                {"stream": True, "stream_options": {"include_usage": True}},
                answer=True,
                base={"prompt": "hi", "stream": True},
            ),
            "user": Effect({"user": "me"}),
            "prompt_logprobs": Effect({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
            "return_token_ids": Effect({"return_token_ids": True}, {"prompt_details": True}),
            "max_completion_tokens": Effect({"max_completion_tokens": 5}, {"max_tokens": 5}),
            "structured_outputs": Effect(
                {"structured_outputs": {"json_object": True}}, structured("json_object", "json_object")
            ),
        },
        "StructuredOutputs": {
            "json": Effect({"structured_outputs": {"json": "{}"}}, structured("json", "json_schema", "{}")),
            "regex": Effect({"structured_outputs": {"regex": "a"}}, structured("regex", "regex", "a")),
            "choice": Effect({"structured_outputs": {"choice": ["a"]}}, structured("choice", "choice", '["a"]')),
            "grammar": Effect({"structured_outputs": {"grammar": "a"}}, structured("grammar", "lark", "a")),
            "json_object": Effect(
                {"structured_outputs": {"json_object": True}}, structured("json_object", "json_object")
            ),
        },
        "StreamOptions": {
            "include_usage": Effect(
                {"stream_options": {"include_usage": True}},
                answer=True,
                base={"prompt": "hi", "stream": True, "stream_options": {}},
            ),
            "continuous_usage_stats": Effect(
                {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
                answer=True,
                base={"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}},
            ),
        },
        "ResponseFormat": {
            "type": Effect(
                {"response_format": {"type": "json_object"}},
                {"grammar": Grammar("json_object", field="response_format")},
            ),
            "json_schema": Effect(
                {"response_format": WITH_SCHEMA},
                {"grammar": GRAMMAR},
                base={"prompt": "hi", "response_format": WITH_ANY_SCHEMA},
            ),
            **{
                name: Effect({"response_format": {"type": "json_object", name: SCHEMA}}, {"grammar": GRAMMAR})
                for name in ("schema", "value")
            },
        },
        "JsonSchema": {
            "schema": Effect(
                {"response_format": WITH_SCHEMA},
                {"grammar": GRAMMAR},
                base={"prompt": "hi", "response_format": WITH_ANY_SCHEMA},
            ),
            **{
                name: Effect(
                    {"response_format": parts(**{name: value})}, base={"prompt": "hi", "response_format": WITH_SCHEMA}
                )
                for name, value in [("name", "y")]
            },
            "strict": Effect(
                {"response_format": parts(strict=True)},
                {"grammar": Grammar("json_schema", json.dumps(SCHEMA), "response_format")},
                base={"prompt": "hi", "response_format": WITH_SCHEMA},
            ),
        },
        "CompletionBody": {
            "prompt": Effect({"prompt": [7]}, {"prompt": TokenPrompt((7,))}),
            "max_tokens": Effect({"max_tokens": 5}, {"max_tokens": 5}),
            "logprobs": Effect({"logprobs": 2}, {"logprobs": 2}),
            "best_of": Effect({"best_of": 2}, {"count": 2, "group": True, "logprobs": 0}),
            "echo": Effect({"echo": True}, {"prompt_details": True}),
            "add_special_tokens": Effect({"add_special_tokens": False}, {"prompt": TextPrompt("hi", False)}),
        },
    },
    "/v1/chat/completions": CHATS,
    "/v1/messages": MESSAGES,
    EMBEDDINGS: {
        "EmbeddingsBody": {
            "model": Effect({"model": "small"}),
            "input": Effect({"input": "b"}, {"prompt": TextPrompt("b")}),
            "encoding_format": Effect({"encoding_format": "base64"}, answer=True),
            "dimensions": Effect({"dimensions": 2}),
            "user": Effect({"user": "me"}),
            "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 5}, {"truncate_prompt_tokens": 5}),
            "priority": Effect({"priority": 1}, {"priority": 1}),
        }
    },
    "/v1/responses": RESPONSES,
    "/tokenize": {
        "TokenizeBody": {
            "model": QUERIED_MODEL,
            "prompt": Effect({"prompt": "b"}, {"prompt": TextPrompt("b")}),
            "messages": Effect({"prompt": None, "messages": [USER]}, {"prompt": prompt()}),
            "tools": Effect({"tools": [TOOL]}, {"prompt": prompt(tools=shown())}, base={"messages": [USER]}),
            "add_special_tokens": Effect({"add_special_tokens": False}, {"special_tokens": False}),
            "return_token_strs": Effect({"return_token_strs": True}, answer=True),
        },
        "TokenizeInputsBody": {
            "model": Effect({"model": "org/large"}, {"model": "org/large"}, base={"inputs": "a"}),
            "inputs": Effect({"inputs": "b"}, {"prompt": TextPrompt("b")}, base={"inputs": "a"}),
        },
    },
    "/detokenize": {
        "DetokenizeBody": {
            "model": QUERIED_MODEL,
            "tokens": Effect({"tokens": [7]}, {"token_ids": (7,)}),
        }
    },
}
# The fields of endpoints that change what the service has.
SHOWN_IN_TEST_LORA = {
    *(("LoadAdapterBody", field) for field in ("lora_name", "lora_path", "load_inplace", "base_model_name")),
    ("UnloadAdapterBody", "lora_name"),
}
SHOWN_IN_TESTS_OF_JOBS = {
    *(("SubmitBody", field) for field in ("input_file_id", "endpoint", "completion_window", "metadata")),
    *(("UploadForm", field) for field in ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")),
}
SHOWN_IN_TEST_EXPERIMENTS = {("FeedbackBody", field) for field in ("request_id", "rating", "score", "comment")}
BASES: dict[str, dict[str, Any]] = {
    **POSTS,
    "/": INPUTS,
    "/v1/messages": MESSAGE,
    EMBEDDINGS: {"input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
CASES = [
    pytest.param(path, effect, id=f"{path} {body}.{field}")
    for path, of_bodies in EFFECTS.items()
    for body, effects in of_bodies.items()
    for field, effect in effects.items()
] + [
    pytest.param(path, effect, id=f"{path} SamplingFields.{field}")
    for path in POSTS
    for field, effect in SAMPLING.items()
]


def bodies(of: type[Body] = Body) -> Iterator[type[Body]]:
    """Every class of a body, whole or nested."""
    for body in of.__subclasses__():
        if body.__module__.startswith("serve_app."):
            yield body
            yield from bodies(body)


every_body = pytest.mark.parametrize(
    "body", {body.__name__: body for body in bodies()}.values(), ids=lambda b: b.__name__
)


def own_fields(body: type[Body]) -> set[str]:
    """The fields that this class declares itself, and uses."""
    return {
        field.alias or name
        for name, field in body.model_fields.items()
        if name in body.__annotations__ and not any(isinstance(one, Unused) for one in field.metadata)
    }


def test_every_field_has_an_effect() -> None:
    listed = {
        (body, field) for of_bodies in EFFECTS.values() for body, effects in of_bodies.items() for field in effects
    }
    listed |= {("SamplingFields", field) for field in SAMPLING}
    listed |= SHOWN_IN_TEST_LORA | SHOWN_IN_TEST_EXPERIMENTS | SHOWN_IN_TESTS_OF_JOBS
    assert listed == {(body.__name__, field) for body in bodies() for field in own_fields(body)}
    assert SAMPLING.keys() == set(SamplingFields.names())


def test_the_document_has_no_other_bodies() -> None:
    documented = [get_args(one.body) or (one.body,) for one in OPERATIONS if one.body is not None]
    assert {body for each in documented for body in each} <= set(bodies())


@every_body
def test_an_unknown_field_is_refused(body: type[Body]) -> None:
    with pytest.raises(ValidationError) as refused:
        body.model_validate({"surely_unknown": None})
    assert [error["loc"] for error in refused.value.errors() if error["type"] == "extra_forbidden"] == [
        ("surely_unknown",)
    ]


@every_body
def test_every_field_is_documented(body: type[Body]) -> None:
    """A field with one possible value needs no description."""
    undocumented = {
        field.alias or name
        for name, field in body.model_fields.items()
        if not field.description and len(get_args(field.annotation)) != 1
    }
    assert undocumented <= {"type", "text"}


def reached(engine: ScriptedEngine) -> dict[str, Any]:
    """The attributes of the first request or query that reached the engine, without ids and times."""
    if not engine.requests:
        model, query = engine.queries[0]
        return {"model": model} | {field.name: getattr(query, field.name) for field in fields(query)}  # type: ignore[arg-type]
    request = engine.requests[0]
    found = {field.name: getattr(one, field.name) for one in (request, request.params) for field in fields(one)}
    found |= {"group": request.group != "", "count": len(engine.requests)}
    return {name: value for name, value in found.items() if name not in ("id", "params", "arrived", "deadline")}


TIMES_AND_IDS = re.compile(r'"(id|item_id|created|created_at|completed_at|elapsed_ms)":("[^"]*"|[0-9.]+)')


async def sent(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """What reached the engine, and the answer without ids and times of its own."""
    engine.requests.clear()
    engine.queries.clear()
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return reached(engine), TIMES_AND_IDS.sub("", answer.text)


@pytest.mark.parametrize(("path", "effect"), CASES)
async def test_a_field_has_its_effect_and_no_other(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, effect: Effect
) -> None:
    if path == EMBEDDINGS:
        engine.script = lambda request: [Chunk((), 1, 0.0, embedding=(1.0, 2.0))]
    else:
        engine.script = with_details
    base = effect.base or BASES[path]
    before, answer_before = await sent(client, engine, path, base)
    after, answer_after = await sent(client, engine, path, base | effect.fields)
    assert {name: value for name, value in after.items() if before.get(name) != value} == (effect.engine or {})
    if effect.engine is None:
        assert (answer_before != answer_after) == effect.answer


async def test_requests_with_different_salts_share_no_cache() -> None:
    async with toy() as (client, _):

        async def cached(**fields: str) -> int:
            answer = await client.post("/generate", json={"prompt": "a" * 40, "max_tokens": 1, **fields})
            found: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert [await cached(), await cached()] == [0, 32]
        assert [await cached(cache_salt="mine"), await cached(cache_salt="mine")] == [0, 32]
        assert await cached(cache_salt="yours") == 0
