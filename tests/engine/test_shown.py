from __future__ import annotations

import time
from dataclasses import replace

import pytest

from serve_app.core.requests import SamplingParams
from serve_app.engines.native.engine import MAX_PROMPT_LOGPROBS
from serve_app.engines.toy import ToyRunner
from serve_app.errors import InvalidRequest
from tests.engines.native.helpers import admit, generate, read, request, running, streams


async def test_a_prompt_is_told_once_and_first() -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=0)
    with running(max_step_tokens=4, max_running=3) as engine:
        answer = await generate(engine, replace(request("hello you", params=params), prompt_details=True))
        other = await generate(engine, request("hello you", params=SamplingParams(max_tokens=3)))
    first, *others = answer.chunks
    assert first.prompt is not None
    assert first.prompt.text == "hello you"
    assert bytes(piece.token_id for piece in first.prompt.tokens) == b"hello you"
    assert bytes(one.chosen.token_id for one in first.prompt.logprobs) == b"ello you"
    assert all(chunk.prompt is None for chunk in (*others, *other.chunks))
    assert answer.text == "hel"


async def test_an_embedding_is_one_chunk_and_counts_as_no_token() -> None:
    with running(max_step_tokens=4, max_running=3) as engine:
        asked = [replace(request("ab" * n), embed=True) for n in range(1, 9)]
        answers = [await read(stream) for stream in admit(engine, *asked)]
        stats = engine.stats()
    for n, answer in enumerate(answers, start=1):
        (chunk,) = answer.chunks
        assert (answer.error, chunk.events, chunk.finished, chunk.prompt_tokens) == (None, (), True, 2 * n)
        assert chunk.embedding == pytest.approx((0, 0.5**0.5, 0.5**0.5, 0))
    assert stats.generated_tokens == 0
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "alternatives", "says"),
    [
        (9, -1, "at least 0"),
        (9, MAX_PROMPT_LOGPROBS // 9, f"ask for at most {MAX_PROMPT_LOGPROBS // 9 - 1}"),
        (MAX_PROMPT_LOGPROBS // 2, 2, "ask for at most 1"),
        (MAX_PROMPT_LOGPROBS + 1, 0, f"the prompt to at most {MAX_PROMPT_LOGPROBS} tokens"),
    ],
)
def test_more_than_one_answer_tells_is_refused(tokens: int, alternatives: int, says: str) -> None:
    params = SamplingParams(prompt_logprobs=alternatives)
    with running(ToyRunner, max_context=2 * MAX_PROMPT_LOGPROBS) as engine:
        (refusal,) = engine.admit(streams([request("a" * tokens, params=params)], arrived=time.monotonic()))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "prompt_logprobs"
    assert says in refusal.message
