"""The embedded model: its answers alone, under concurrent load and, in float32, by model.generate() are the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.core.events import FinishReason, TokenEvent
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, SamplingParams, TextPrompt, TokenPrompt
from serve_app.engines.files.conversion import convert_gguf
from serve_app.engines.files.sources import builtin_gguf
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.stream import TokenStream
from tests.models.concurrent_load import (
    GreedyRequest,
    assert_answers,
    generate,
    generate_concurrently,
    generate_greedy,
    model_config,
    random_requests,
    reference_answers,
    running,
    wait_until_idle,
)

pytestmark = [pytest.mark.model, pytest.mark.timeout(240)]

FRANCE = ChatPrompt((ChatMessage("user", "What is the capital of France?"),))


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert_gguf(builtin_gguf(), print)


@pytest.fixture(scope="module")
def engine() -> Iterator[NativeEngine]:
    """Fewer slots than requests, and steps small enough that prompts are split into chunks."""
    config = model_config("builtin:smollm2-135m", max_running=8, max_context=512, max_step_tokens=48)
    with running(config) as engine:
        yield engine


def text(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


async def test_answers_equal_generate_alone_and_under_concurrent_load(engine: NativeEngine, folder: Path) -> None:
    requests = random_requests(16, vocabulary=49152, longest_prompt=90, longest_answer=20, seed=4)
    references = reference_answers(folder, requests)
    assert_answers([await generate_greedy(engine, one) for one in requests[:4]], references[:4], requests[:4])
    assert_answers(await generate_concurrently(engine, requests, seed=1), references, requests)
    await wait_until_idle(engine)


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("bfloat16", "none"), ("float32", "int8"), pytest.param("float32", "int4", marks=pytest.mark.long)],
)
async def test_rounded_answers_are_equal_alone_and_under_concurrent_load(dtype: str, quantization: str) -> None:
    config = model_config("builtin:smollm2-135m", max_running=6, max_context=512, max_step_tokens=48)
    requests = random_requests(12, vocabulary=49152, longest_prompt=90, longest_answer=20, seed=5)
    with running(config.model_copy(update={"dtype": dtype, "quantization": quantization})) as engine:
        alone = [await generate_greedy(engine, replace(request, cancel_after=None)) for request in requests]
        assert_answers(await generate_concurrently(engine, requests, seed=1), alone, requests)
        await wait_until_idle(engine)


async def test_drafts_and_the_prefix_cache_do_not_change_an_answer(engine: NativeEngine, folder: Path) -> None:
    """The text repeats itself, and the prompt is sent twice."""
    encoded = engine._runner.text.encode([TextPrompt("one two three four five six seven eight nine ten. " * 6)])[0]
    assert isinstance(encoded, list)
    requests = [GreedyRequest(tuple(encoded), 40)]
    before = engine.stats()
    references = reference_answers(folder, requests)
    for _ in range(2):
        assert_answers([await generate_greedy(engine, requests[0])], references, requests)
    after = engine.stats()
    assert after.accepted - before.accepted > 20
    assert after.cached_tokens - before.cached_tokens >= len(encoded) - BLOCK
    assert after.steps - before.steps < 2 * 40


async def test_a_chat_request_is_answered(engine: NativeEngine) -> None:
    events = await generate(engine, FRANCE, SamplingParams(max_tokens=40, temperature=0))
    assert text(events) == "The capital of France is Paris."
    assert events[-1].finish_reason is FinishReason.STOP


async def test_a_seeded_answer_is_the_same_alone_and_under_concurrent_load(engine: NativeEngine) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=16, temperature=1.0, top_p=0.95, min_p=0.01, presence_penalty=0.5, seed=seed)

    async def answer(seed: int) -> str:
        await asyncio.sleep(seed % 5 / 20)
        return text(await generate(engine, TextPrompt(f"A story of {seed} lines:"), params(seed)))

    alone = [await answer(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    assert (await asyncio.gather(*(answer(seed) for seed in range(12))))[:4] == alone


async def test_four_answers_of_a_group_equal_four_requests_and_share_one_prefill(engine: NativeEngine) -> None:
    """Of the 200 prompt tokens, each of the other three answers computes the 8 that do not fill a block."""
    (ids,) = engine._runner.text.encode([TextPrompt("What was said about the sea, by those who sailed it? " * 20)])
    assert isinstance(ids, list)
    prompt, params = TokenPrompt(tuple(ids[:200])), SamplingParams(max_tokens=12, ignore_eos=True, seed=7)
    request = GenerationRequest(
        "id", "m", prompt, params, time.monotonic(), time.monotonic() + 60, cache_salt="four", group="g"
    )
    before = engine.stats()
    streams = [TokenStream(replace(request, index=index)) for index in range(4)]
    assert await asyncio.to_thread(engine.admit, streams) == [None] * 4
    together = [[event.token_id async for chunk in s.chunks(0.0) for event in chunk.events] for s in streams]
    after = engine.stats()
    prefilled = after.rows - before.rows - (after.decode_rows - before.decode_rows) - (after.drafted - before.drafted)
    assert prefilled <= 200 + 3 * 8
    apart = [[e.token_id for e in await generate(engine, prompt, replace(params, seed=7 + i))] for i in range(4)]
    assert together == apart
    assert len({*map(tuple, together)}) == 4


async def test_logprobs_equal_the_reference(engine: NativeEngine, folder: Path) -> None:
    events = await generate(engine, FRANCE, SamplingParams(max_tokens=8, temperature=0, logprobs=3))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    runner = engine._runner
    (prompt,) = runner.text.encode([FRANCE])
    assert isinstance(prompt, list)
    answer = [event.token_id for event in events]
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, event in zip(rows, events, strict=True):
        assert event.logprobs is not None
        values, ids = row.topk(3)
        assert [top.token_id for top in event.logprobs.top] == ids.tolist()
        assert [top.logprob for top in event.logprobs.top] == pytest.approx(values.tolist(), abs=1e-3)
        assert event.logprobs.chosen.logprob == pytest.approx(row[event.token_id].item(), abs=1e-3)


async def test_a_stop_string_ends_the_answer_and_is_not_sent(engine: NativeEngine) -> None:
    events = await generate(engine, FRANCE, SamplingParams(max_tokens=40, temperature=0, stop=("ance is",)))
    assert text(events) == "The capital of Fr"
    assert events[-1].finish_reason is FinishReason.STOP


async def test_text_events_contain_complete_characters_only(engine: NativeEngine) -> None:
    """The model repeats the prompt, in which one character has several tokens."""
    prompt = "🌍🎉 世界 grüßt 🌍🎉 世界 grüßt 🌍🎉 世界 grüßt 🌍🎉 世界"
    events = await generate(engine, TextPrompt(prompt), SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    assert any(event.text == "" for event in events), "at least one token must be a part of a character"
    assert "🌍🎉 世界" in text(events)
    assert not any("\ufffd" in event.text for event in events)


async def test_prompt_logprobs_and_embedding_equal_the_reference(engine: NativeEngine, folder: Path) -> None:
    """Log probabilities of each token and the mean of the last hidden states, with chunks of 48 tokens."""
    prompt = TextPrompt("The capital of France is Paris, and that of Italy is Rome. " * 8)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    requests = [
        GenerationRequest("id", "m", prompt, params, time.monotonic(), time.monotonic() + 120, prompt_details=True),
        GenerationRequest("id", "m", prompt, SamplingParams(), time.monotonic(), time.monotonic() + 120, embed=True),
    ]
    streams = [TokenStream(request) for request in requests]
    assert await asyncio.to_thread(engine.admit, streams) == [None, None]
    ((logprobs,), (embedded,)) = [[chunk async for chunk in stream.chunks(0.0)] for stream in streams]
    assert logprobs.prompt is not None
    assert embedded.embedding is not None
    ids = torch.tensor([[piece.token_id for piece in logprobs.prompt.tokens]])
    assert ids.shape[1] > 2 * 48
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(ids, output_hidden_states=True)
    wanted = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert [one.chosen.logprob for one in logprobs.prompt.logprobs] == pytest.approx(wanted, abs=2e-3)
    cosine = torch.cosine_similarity(torch.tensor(embedded.embedding), output.hidden_states[-1][0].mean(0), dim=0)
    assert cosine > 0.9999
