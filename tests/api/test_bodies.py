from __future__ import annotations

import gc
import json
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from serve_app.api.body import parse_document
from serve_app.api.native.schema import BatchBody, StreamBody
from serve_app.api.openai.embeddings import EmbeddingsBody
from serve_app.api.openai.messages import Message, TextPart
from serve_app.api.openai.response_format import JsonSchema, ResponseFormat
from serve_app.api.openai.schema import ChatBody, CompletionBody, StreamOptions
from serve_app.api.openai_responses.items import FunctionCallItem, FunctionCallOutputItem, ReasoningItem
from serve_app.api.openai_responses.schema import ResponsesBody
from serve_app.api.schema import TAGS, Body
from serve_app.core.requests import TextPrompt
from serve_app.errors import InvalidRequest

from .scripted import POSTS, ScriptedEngine, ScriptedTelemetry, assert_invalid, error_of

every_post = pytest.mark.parametrize("path", POSTS)
HI = {"role": "user", "content": "hi"}


async def refused(client: httpx.AsyncClient, path: str, document: object) -> dict[str, Any]:
    answer = await client.post(path, json=document)
    assert_invalid(answer)
    error = error_of(answer)
    assert error["code"] == "invalid_request"
    assert error.get("type", "invalid_request_error") == "invalid_request_error"
    return error


@every_post
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not valid JSON (Expecting value: line 1 column 1"),
        (b"{", "not valid JSON (Expecting property name"),
        (b"prompt=hi", "not valid JSON"),
        (b'{"prompt": "hi"} {}', "not valid JSON (Extra data"),
        (b'{"prompt": "a\nb"}', "not valid JSON (Invalid control character"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "an integer of thousands of digits"),
        (b'{"prompt": "hi", "temperature": 1e400}', "the number 1e400, which is out of range"),
        (b'{"prompt": "hi", "seed": -1e999}', "the number -1e999, which is out of range"),
        (b'{"prompt": "hi", "prompt": "ho"}', "an object with the key 'prompt' twice"),
        (b'{"prompt": "hi", "logit_bias": {"1": 1, "2": 1, "\\u0031": 2}}', "an object with the key '1' twice"),
        (b'{"prompt": ' + b"[" * 200 + b"1" + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12). Encode it as UTF-8."),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8 (byte 12)"),
        ('{"prompt": "hi"}'.encode("utf-16"), "not UTF-8 (byte 0)"),
        (b'{"prompt": "\\ud83d"}', "half of a \\u surrogate pair"),
        (b'{"\\ude00": 1}', "half of a \\u surrogate pair"),
        (b"[" * 20_000, "nested too deeply. Send a flat JSON object"),
        (b'{"a":' * 4_000, "nested too deeply"),
    ],
    ids=lambda value: "body" if isinstance(value, bytes) else None,
)
async def test_an_unreadable_body_is_refused_with_the_reason(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    body: bytes,
    expected: str,
) -> None:
    answer = await client.post(path, content=body)
    assert_invalid(answer)
    assert error_of(answer)["param"] is None
    assert expected in error_of(answer)["message"]
    assert "sys." not in error_of(answer)["message"]
    assert len(telemetry.errors) == 1
    assert engine.requests == []


# A body of 1 MB each, made to be slow to parse or to refuse.
HOSTILE = {
    "deep": b"[" * 1_000_000,
    "lists": b"[" + b"[]," * 330_000 + b"[]]",
    "lists of numbers": b"[" + b"[1]," * 250_000 + b"[]]",
    "objects": b"[" + b'{"a":1},' * 110_000 + b"{}]",
    "keys": b"{" + b",".join(b'"k%d":1' % key for key in range(80_000)) + b"}",
    "a key twice": b"{" + b",".join(b'"k%d":1' % key for key in range(80_000)) + b',"k79999":2}',
    "each key twice": b"{" + b",".join(b'"k%d":1' % (key // 2) for key in range(80_000)) + b"}",
    "numbers": b"[" + b"1.5e3," * 170_000 + b"1]",
    "digits": b"[" + b"1" * 1_000_000 + b"]",
    "numbers of many digits": b"[" + (b"1" * 4_200 + b",") * 240 + b"1]",
    "escapes": b'["' + b"\\u0041" * 170_000 + b'"]',
    "surrogates": b'["' + b"\\ud800" * 170_000 + b'"]',
    "invalid UTF-8": b'"' + b"\xff" * 1_000_000 + b'"',
    "an open text": b'"' + b"a" * 1_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_read_or_refused_in_time(body: bytes) -> None:
    """Without quadratic work: at most 20 times the time that Python's parser takes for flat JSON of this size."""
    flat = json.dumps({"a": list(range(140_000))}).encode()
    gc.freeze()  # the collections do not visit what the tests before this one have left; conftest.py does it too
    began = time.thread_time()
    parse_document(flat)
    middle = time.thread_time()
    with suppress(InvalidRequest):
        parse_document(body)
    end = time.thread_time()
    assert end - middle < max(0.1, 20 * (middle - began))


@every_post
@pytest.mark.parametrize("document", [None, [], ["prompt"], "hi", 3, 0.5, True])
async def test_a_body_that_is_no_object_is_refused_with_the_known_fields(
    client: httpx.AsyncClient, path: str, document: object
) -> None:
    answer = await client.post(path, content=json.dumps(document))
    assert_invalid(answer)
    message = error_of(answer)["message"]
    assert message.startswith("The body should be a JSON object. Known fields: temperature, top_p, ")
    assert all(name in message for name in POSTS[path])


@every_post
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=x", ""])
async def test_the_content_type_is_ignored(client: httpx.AsyncClient, path: str, kind: str) -> None:
    answer = await client.post(path, content=json.dumps(POSTS[path]), headers={"content-type": kind})
    assert answer.status_code == 200


async def test_every_character_reaches_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post("/generate", content=b'\xef\xbb\xbf{"prompt": "\\ud83d\\ude00\\u0000 \xf0\x9f\x98\x80"}')
    assert engine.requests[0].prompt == TextPrompt("😀\0 😀")


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"seed": -2}, "seed", "greater than or equal to -1"),
        ({"stop": {}}, "stop", "a string or a list of strings"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["x" * 257]}, "stop[0]", "at most 256"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", "valid integer"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "above max_tokens 3"),
        ({"do_sample": True, "temperature": 0}, "do_sample", "a temperature above 0"),
        ({"do_sample": True, "model": "org/large"}, "do_sample", "a temperature above 0"),
        ({"do_sample": 1}, "do_sample", "valid boolean"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"xyzzy": 1}, "xyzzy", "Known fields: temperature, top_p"),
        ({"include_text": True}, "include_text", "Unknown field"),
        ({"top_p": 2, "top_k": -2}, "top_p", "The body has 1 more error."),
        ({"top_p": 2, "top_k": -2, "a": 1}, "top_p", "The body has 2 more errors."),
    ],
)
async def test_an_error_names_the_wrong_field(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    fields: dict[str, object],
    param: str,
    expected: str,
) -> None:
    error = await refused(client, "/generate", {"prompt": "hi", **fields})
    assert error["param"] == param
    assert expected in error["message"]
    assert f"'{param}'" in error["message"]
    assert len(telemetry.errors) == 1
    assert engine.requests == []


@every_post
async def test_a_number_too_large_for_a_float_is_refused(client: httpx.AsyncClient, path: str) -> None:
    body = json.dumps(POSTS[path])[:-1].encode()
    answer = await client.post(path, content=body + b', "temperature": 1e999}')
    assert_invalid(answer)
    assert "the number 1e999, which is out of range" in error_of(answer)["message"]


@every_post
async def test_an_error_names_a_missing_field(client: httpx.AsyncClient, path: str) -> None:
    (name,) = POSTS[path]
    expected = "Send either 'prompts' or 'requests'." if name == "prompts" else f"Field '{name}' is required."
    error = await refused(client, path, {})
    assert (error["param"], error["message"]) == (name, expected)


@every_post
@pytest.mark.parametrize("name", ["<text>", "<list>", "<", "x" * 5000, "a.b[0]", "\n", "é", "__class__", "0"])
async def test_an_error_names_an_unknown_field_of_any_name(client: httpx.AsyncClient, path: str, name: str) -> None:
    error = await refused(client, path, POSTS[path] | {name: {"<text>": 1}})
    assert error["param"] == name[:64]
    assert error["message"].startswith(f"Unknown field '{name[:64]}'. ")


async def test_an_unknown_field_can_have_an_empty_name(client: httpx.AsyncClient) -> None:
    error = await refused(client, "/generate", {"prompt": "hi", "": 1})
    assert error["param"] == ""
    assert error["message"].startswith("Unknown field ''. Known fields: ")


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": None}, "prompt", "a string or a list of token ids"),
        ({"prompt": {}}, "prompt", "a string or a list of token ids"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": [1, -1]}, "prompt[1]", "greater than or equal to 0"),
        ({"prompt": [2**31]}, "prompt[0]", "less than or equal to 2147483647"),
        ({"max_tokens": 0}, "max_tokens", "which requires echo: true"),
        ({"min_tokens": 17}, "min_tokens", "above max_tokens 16"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"suffix": "x"}, "suffix", 'can only be null or "": the service does not insert text'),
        ({"use_beam_search": True}, "use_beam_search", "can only be null or false"),
        ({"max_token": 2}, "max_token", "Did you mean 'max_tokens'?"),
        ({"do_sample": True}, "do_sample", "Unknown field"),
    ],
)
async def test_an_error_names_the_wrong_field_of_a_completion(
    client: httpx.AsyncClient, fields: dict[str, object], param: str, expected: str
) -> None:
    error = await refused(client, "/v1/completions", {"prompt": "hi", **fields})
    assert error["param"] == param
    assert expected in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": HI}, "messages", "valid list"),
        ({"messages": ["hi"]}, "messages[0]", "should be an object"),
        ({"messages": [HI, {}]}, "messages[1].role", "is required."),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{**HI, "role": "god"}]}, "messages[0].role", "'assistant', 'tool' or 'function'"),
        ({"messages": [{**HI, "content": None}]}, "messages[0].content", "is required"),
        ({"messages": [{**HI, "content": 5}]}, "messages[0].content", "a string or a list of text parts"),
        ({"messages": [{**HI, "contents": "x"}]}, "messages[0].contents", "Did you mean 'content'?"),
        ({"messages": [{**HI, "<text>": "x"}]}, "messages[0].<text>", "Known fields: "),
        ({"messages": [HI, {**HI, "content": ["x"]}]}, "messages[1].content[0]", "should be an object"),
        (
            {"messages": [{**HI, "content": [{"type": "text", "text": "x", "txt": 1}]}]},
            "messages[0].content[0].txt",
            "Did you mean 'text'?",
        ),
        (
            {"messages": [{**HI, "content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
            "should be 'text'",
        ),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "requires logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens", "above max_tokens 2"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set the variable 'messages'"),
        ({"store": True}, "store", "can only be null or false: chats are not stored; use /v1/responses"),
        ({"store": 0}, "store", "can only be null or false"),
        ({"service_tier": "flex"}, "service_tier", 'can only be null or "auto" or "default"'),
        ({"modalities": ["audio"]}, "modalities", 'can only be null or ["text"]: the models write text'),
        ({"messages": [{**HI, "type": "image"}]}, "messages[0].type", 'can only be null or "text" or "message"'),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
    ],
)
async def test_an_error_names_the_wrong_field_of_a_chat(
    client: httpx.AsyncClient, fields: dict[str, object], param: str, expected: str
) -> None:
    error = await refused(client, "/v1/chat/completions", {"messages": [HI], **fields})
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert expected in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param", "expected"),
    [
        ({"n": 1.5}, "n", "valid integer"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"model": 1}, "model", "valid string"),
        ({"stream_options": {}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": []}, "stream_options", "should be an object"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge", "Did you mean 'include_usage'?"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"stop": 3}, "stop", "a string or a list of strings"),
    ],
)
async def test_an_error_names_the_wrong_field_of_both_openai_paths(
    client: httpx.AsyncClient, path: str, fields: dict[str, object], param: str, expected: str
) -> None:
    error = await refused(client, path, POSTS[path] | fields)
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert expected in error["message"]


async def test_include_text_is_a_boolean(client: httpx.AsyncClient) -> None:
    error = await refused(client, "/generate_stream", {"prompt": "hi", "include_text": 0})
    assert error["message"] == "Field 'include_text' should be a valid boolean."


# Any JSON, and variations of valid bodies: known names with values that are nearly valid.

CHARACTERS = st.text(st.characters(exclude_categories=()), max_size=8)
BODIES: tuple[type[Body], ...] = (
    EmbeddingsBody,
    StreamBody,
    BatchBody,
    CompletionBody,
    ChatBody,
    Message,
    TextPart,
    StreamOptions,
    ResponseFormat,
    JsonSchema,
    ResponsesBody,
    FunctionCallItem,
    FunctionCallOutputItem,
    ReasoningItem,
)
NAMES = st.sampled_from(sorted({name for body in BODIES for name in body.names()} | set(TAGS)))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | CHARACTERS
    | st.sampled_from(["hi", "user", "text", "small", "huge", 0, 1, 1.0, 2**31, 10**400])
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | CHARACTERS, inner, max_size=4),
    max_leaves=12,
)
anything = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


def is_valid(answer: httpx.Response, telemetry: ScriptedTelemetry) -> bool:
    """Whether the answer is a success without errors, or one complete error that was counted once."""
    counted = len(telemetry.errors)
    if answer.status_code != 200:
        return 400 <= answer.status_code < 500 and bool(error_of(answer)) and counted == 1
    if answer.request.url.path == "/generate_batch":
        return sum("error" in result for result in answer.json()["results"]) == counted
    return counted == 0


@anything
@given(path=st.sampled_from([*POSTS]), document=DOCUMENTS)
async def test_any_document_gets_an_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, document: object
) -> None:
    telemetry.errors.clear()
    assert is_valid(await client.post(path, content=json.dumps(document)), telemetry)


@anything
@given(path=st.sampled_from([*POSTS]), fields=st.dictionaries(NAMES | CHARACTERS, DOCUMENTS, max_size=2))
async def test_any_variation_of_a_valid_body_gets_an_answer(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    telemetry: ScriptedTelemetry,
    path: str,
    fields: dict[str, object],
) -> None:
    telemetry.errors.clear()
    assert is_valid(await client.post(path, content=json.dumps(POSTS[path] | fields)), telemetry)


@anything
@given(path=st.sampled_from([*POSTS]), body=st.binary(max_size=40))
async def test_any_bytes_get_an_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, body: bytes
) -> None:
    telemetry.errors.clear()
    assert is_valid(await client.post(path, content=body), telemetry)
