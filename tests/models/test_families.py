"""Greedy tokens alone = in a crowd = model.generate(), in float32, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny
from tests.models.crowd import agree, crowd, generated, greedy, idle, model_config, random_asks, running

pytestmark = pytest.mark.model


@pytest.mark.parametrize("family", tiny.FAMILIES)
async def test_alone_is_a_crowd_is_generate(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path), "packed")


@pytest.mark.parametrize("family", tiny.LEAN)
async def test_lean_too(family: str, tmp_path: Path) -> None:
    await check(tiny.save(family, tmp_path, tiny.LEAN), "lean")


async def check(folder: Path, kind: str) -> None:
    """Fewer slots than requests and small steps: prompts are cut into chunks, and late ones join running batches."""
    asks = random_asks(24, tiny.VOCABULARY, longest_prompt=40, longest_answer=24, seed=1)
    references = generated(folder, asks)
    assert len({tuple(answer) for answer in references}) > len(asks) // 2, "the answers must differ to prove anything"
    with running(model_config(folder, max_running=6, max_context=96, max_step_tokens=16)) as engine:
        assert engine._runner.kind == kind
        agree([await greedy(engine, asked) for asked in asks[:6]], references[:6], asks[:6])
        for seed in (1, 2):
            agree(await crowd(engine, asks, seed), references, asks)
            await idle(engine)
