"""Greedy answers of every model family in float32: alone, under concurrent load, and by model.generate(), all equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serve_app.engines.native.kv_cache import BLOCK
from tests.models import tiny
from tests.models.concurrent_load import (
    GreedyRequest,
    assert_answers,
    generate_at_once,
    generate_concurrently,
    generate_greedy,
    model_config,
    random_requests,
    reference_answers,
    running,
    wait_until_idle,
)

pytestmark = pytest.mark.model

LONGEST_ANSWER = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small a second thread only adds waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", tiny.every(tiny.FAMILIES))
async def test_the_hugging_face_path_equals_generate(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path), "transformers")


@pytest.mark.parametrize("family", tiny.FUSED)
async def test_the_fused_path_equals_generate(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path, tiny.FUSED), "fused")


@pytest.mark.parametrize("family", tiny.every(tiny.MASKED, ["llama4_text", "qwen2_moe"]))
async def test_a_model_with_a_masked_window_equals_generate_up_to_the_window(family: str, tmp_path: Path) -> None:
    longest_prompt = tiny.MASKED_WINDOW - LONGEST_ANSWER
    await check(tiny.save(family, tmp_path, tiny.MASKED), "transformers", longest_prompt)


async def check(folder: Path, kind: str, longest_prompt: int = 40) -> None:
    """Run more requests than slots in small steps with little memory; prompts share prefixes and answers repeat.

    Therefore prompts are split into chunks, requests join running batches, prefixes are copied, sequences are preempted
    and computed again, and drafts are verified.
    """
    requests = random_requests(16, tiny.VOCABULARY, longest_prompt, LONGEST_ANSWER, seed=1)
    # The prompts of these requests fit into memory together, their complete sequences do not.
    long_answers = [GreedyRequest(tuple(range(n, n + min(20, longest_prompt))), LONGEST_ANSWER) for n in range(3)]
    requests += long_answers
    references = reference_answers(folder, requests)
    assert len({tuple(answer) for answer in references}) > len(requests) // 2, "most answers must differ"
    config = model_config(folder, max_running=6, max_context=96, max_step_tokens=16, threads=1)
    with running(config, kv_tokens=3 * BLOCK) as engine:
        assert engine.kind == kind
        alone = [await generate_greedy(engine, request) for request in requests[:4]]
        assert_answers(alone, references[:4], requests[:4])
        for seed in (1, 2):
            assert_answers(await generate_concurrently(engine, requests, seed), references, requests)
            await wait_until_idle(engine)
        together = await generate_at_once(engine, long_answers)
        assert_answers(together, references[-3:], long_answers)
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0 or longest_prompt < 40
