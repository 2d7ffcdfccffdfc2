"""Digests of prompts: equal exactly as far as two prompts begin alike and may share what was computed."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from serve_app.core.requests import (
    Adapter,
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolCall,
)
from serve_app.core.routing import BLOCK_BYTES, MAX_BLOCKS, PrefixRecord, routing_key

texts = st.text(max_size=3 * BLOCK_BYTES)


def request(prompt: Prompt, **fields: Any) -> GenerationRequest:
    return replace(GenerationRequest("id", "m", prompt, SamplingParams(), 0.0, 1.0), **fields)


def digests(prompt: Prompt, **fields: Any) -> list[int]:
    return list(routing_key(request(prompt, **fields)).digests)


@given(texts, texts, texts)
def test_texts_share_the_digests_of_their_common_blocks(common: str, one: str, two: str) -> None:
    first, second = digests(TextPrompt(common + one)), digests(TextPrompt(common + two))
    a, b = (common + one).encode(), (common + two).encode()
    same = sum(
        a[: end * BLOCK_BYTES] == b[: end * BLOCK_BYTES] for end in range(1, min(len(a), len(b)) // BLOCK_BYTES + 1)
    )
    assert [x == y for x, y in zip(first, second, strict=False)] == [True] * same + [False] * (
        min(len(first), len(second)) - same
    )
    assert len(first) == len(a) // BLOCK_BYTES


def test_a_longer_conversation_begins_as_the_shorter_one() -> None:
    turns = tuple(ChatMessage("user" if n % 2 == 0 else "assistant", f"{n} " * 200) for n in range(6))
    tools = ('{"name": "search"}',)
    shorter, longer = digests(ChatPrompt(turns[:3], tools)), digests(ChatPrompt(turns, tools))
    assert len(shorter) >= 4
    assert longer[: len(shorter)] == shorter
    assert digests(ChatPrompt(turns, ()))[0] != longer[0]
    assert digests(ChatPrompt(turns, tools, variables='{"a": 1}'))[0] != longer[0]


def test_every_part_of_a_message_counts() -> None:
    def of(**fields: Any) -> list[int]:
        return digests(ChatPrompt((ChatMessage(**{"role": "assistant", "content": "x" * 600} | fields),)))

    variants = [
        of(),
        of(role="user"),
        of(content="y" * 600),
        of(content="", tool_calls=(ToolCall("1", "f", "x" * 600),)),
        of(content="", tool_calls=(ToolCall("1", "g", "x" * 600),)),
    ]
    assert len({tuple(one) for one in variants}) == len(variants)


def test_requests_that_may_not_share_have_different_digests() -> None:
    prompt = TextPrompt("a" * BLOCK_BYTES)
    adapter = Adapter("l", "/l")
    found = [
        digests(prompt),
        digests(prompt, cache_salt="s"),
        digests(prompt, adapter=adapter),
        digests(prompt, adapter=replace(adapter, digest="d")),
        digests(TokenPrompt((97,) * 64)),
    ]
    assert len({tuple(one) for one in found}) == len(found)


def test_a_request_that_reads_its_prompt_has_no_digests() -> None:
    prompt = TextPrompt("a" * BLOCK_BYTES)
    assert not digests(prompt, embed=True)
    assert not digests(prompt, params=SamplingParams(prompt_logprobs=1))


def test_the_length_and_the_session_are_part_of_the_key() -> None:
    key = routing_key(request(TextPrompt("a" * 4000), session="s", resumed=(1, 2)))
    assert (key.tokens, key.session) == (1002, "s")
    assert routing_key(request(TokenPrompt((1, 2, 3)))).tokens == 3


def test_a_very_long_prompt_is_known_by_its_beginning_and_costs_little() -> None:
    long = request(TextPrompt("word " * 200_000))
    began = time.perf_counter()
    key = routing_key(long)
    assert time.perf_counter() - began < 0.1
    assert len(key.digests) == MAX_BLOCKS
    assert key.tokens == 250_000


@pytest.mark.parametrize("text", ["\ud800", "é" * 300])
def test_any_text_has_a_key(text: str) -> None:
    assert routing_key(request(TextPrompt(text))).tokens > 0


def test_the_record_holds_what_fits_and_drops_what_was_not_used_for_the_longest_time() -> None:
    record = PrefixRecord(capacity=300)
    record.add([1, 2], 100)
    record.add([3, 4], 100)
    record.add([1, 2], 100)
    record.add([5, 6], 100)
    assert set(array("Q", record.digests())) == {1, 2, 3, 4, 5, 6}
    record.add([7], 50)
    assert set(array("Q", record.digests())) == {1, 2, 3, 5, 6, 7}, "the end of the oldest prompt goes first"
    version = record.version
    record.add([7], 50)
    record.add([], 10)
    assert record.version == version


def test_the_record_is_bounded() -> None:
    record = PrefixRecord(capacity=10**9, most=8)
    for number in range(100):
        record.add([number], 10)
    assert list(array("Q", record.digests())) == list(range(92, 100))
    small = PrefixRecord(capacity=10)
    small.add([1, 2, 3], 1000)
    assert list(array("Q", small.digests())) == [1]
