"""A batch of 100,000 lines: its time, its memory, and that its answers are complete."""

from __future__ import annotations

import json
import time
from collections import Counter

import psutil
import pytest

from serve_app.database_config import DatabaseOptions
from tests.api.scripted import ScriptedEngine, chunk

from .service import chat_line, process, wait_for

LINES = 100_000


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_100000_lines(database_options: DatabaseOptions) -> None:
    engine = ScriptedEngine(lambda request: [chunk(["ok"])])
    async with process(database_options, engine, lines_in_flight=64) as one:
        own = psutil.Process()
        began, memory = time.monotonic(), own.memory_info().rss
        batch = await one.submit(chat_line(number) for number in range(LINES))
        uploaded = time.monotonic()

        async def ask() -> object:
            return await one.client.batches.retrieve(batch.id)

        await wait_for(ask, lambda found: found.status != "validating", 300)
        validated = time.monotonic()
        await wait_for(ask, lambda found: found.status in ("finalizing", "completed"), 1500)
        run = time.monotonic()
        ended = await wait_for(ask, lambda found: found.status == "completed", 300)
        ends = time.monotonic()
        engine.requests.clear()
        content = (await one.client.files.content(ended.output_file_id)).text
        assert Counter(json.loads(line)["custom_id"] for line in content.splitlines()) == Counter(
            f"line-{number}" for number in range(LINES)
        )
        grown = (own.memory_info().rss - memory) / 2**20
        print(
            f"{LINES} lines: upload {uploaded - began:.1f} s, check {validated - uploaded:.1f} s, run "
            f"{run - validated:.1f} s ({LINES / (run - validated):.0f} lines/s), files {ends - run:.1f} s, "
            f"memory +{grown:.0f} MiB with the test's own copies"
        )
