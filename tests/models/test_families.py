"""Greedy tokens alone = in a crowd = model.generate(), in float32, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from serve_app.engines.native.kv_cache import BLOCK
from tests.models import tiny
from tests.models.crowd import Ask, agree, crowd, generated, greedy, idle, model_config, random_asks, running

pytestmark = pytest.mark.model

LONGEST_ANSWER = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
async def test_alone_is_a_crowd_is_generate(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path), "packed")


@pytest.mark.parametrize("family", tiny.LEAN)
async def test_lean_too(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path, tiny.LEAN), "lean")


@pytest.mark.parametrize("family", tiny.MASKED)
async def test_so_is_a_window_that_only_a_mask_would_tell_up_to_its_length(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path, tiny.MASKED), "packed", longest_prompt=tiny.MASKED_WINDOW - LONGEST_ANSWER)


async def check(folder: Path, kind: str, longest_prompt: int = 40) -> None:
    """Fewer slots than requests, small steps, little memory, prompts and answers that repeat themselves.

    So prompts are cut into chunks, late ones join running batches, beginnings are copied, sequences are put off and
    computed again, and guesses are checked.
    """
    asks = random_asks(16, tiny.VOCABULARY, longest_prompt, LONGEST_ANSWER, seed=1)
    # More than fit into memory to their end, though all fit at their beginning.
    asks += [Ask(tuple(range(n, n + min(20, longest_prompt))), LONGEST_ANSWER) for n in range(3)]
    references = generated(folder, asks)
    assert len({tuple(answer) for answer in references}) > len(asks) // 2, "the answers must differ to prove anything"
    config = model_config(folder, max_running=6, max_context=96, max_step_tokens=16, threads=1)
    with running(config, kv_tokens=3 * BLOCK) as engine:
        assert engine._runner.kind == kind
        agree([await greedy(engine, asked) for asked in asks[:4]], references[:4], asks[:4])
        for seed in (1, 2):
            agree(await crowd(engine, asks, seed), references, asks)
            await idle(engine)
        agree(await crowd(engine, asks[-3:], seed=3, within_s=0), references[-3:], asks[-3:])
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.cached_tokens > 0 or longest_prompt < 40
