"""Greedy tokens alone = in a crowd = model.generate(), in float32, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.models.crowd import agree, crowd, generated, greedy, idle, model_config, random_asks, running

pytestmark = pytest.mark.model

LONGEST_ANSWER = 16


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
    """Fewer slots than requests and small steps: prompts are cut into chunks, and late ones join running batches."""
    asks = random_asks(16, tiny.VOCABULARY, longest_prompt, LONGEST_ANSWER, seed=1)
    references = generated(folder, asks)
    assert len({tuple(answer) for answer in references}) > len(asks) // 2, "the answers must differ to prove anything"
    with running(model_config(folder, max_running=6, max_context=96, max_step_tokens=16, threads=1)) as engine:
        assert engine._runner.kind == kind
        agree([await greedy(engine, asked) for asked in asks[:4]], references[:4], asks[:4])
        for seed in (1, 2):
            agree(await crowd(engine, asks, seed), references, asks)
            await idle(engine)
