"""The lines of batches give way to all other requests."""

from __future__ import annotations

from serve_app.gateway.background import BACKGROUND_PRIORITY, Background
from tests.gateway.scripted import ScriptedEngine, request


async def test_a_line_has_the_last_priority_and_waits_for_its_model() -> None:
    engine = ScriptedEngine()
    async for _ in Background(engine).generate(request(priority=-5, wake_wait_s=1)):
        pass
    (seen,) = engine.requests
    assert (seen.priority, seen.wake_wait_s, seen.background) == (BACKGROUND_PRIORITY, None, True)
