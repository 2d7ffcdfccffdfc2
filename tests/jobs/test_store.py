"""A database that cannot be written while batches run."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from serve_app.database_config import DatabaseOptions
from tests.api.scripted import ScriptedEngine, chunk

from .service import chat_line, process, wait_for


async def test_a_batch_goes_on_after_the_database_was_locked(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda request: [0.01, chunk(["ok"])])
    file = tmp_path / "jobs.db"
    async with process(DatabaseOptions(url=f"sqlite:///{file}", timeout_s=0.1), engine) as one:
        batch = await one.submit(chat_line(number) for number in range(200))

        async def ask() -> Any:
            return await one.client.batches.retrieve(batch.id)

        await wait_for(ask, lambda found: found.request_counts.completed >= 30)
        lock = sqlite3.connect(file, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        try:
            answer = await one.http.post(f"/v1/batches/{batch.id}/cancel")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert (await one.http.post("/generate", json={"prompt": "hi"})).status_code == 200
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        ended = await one.ended(batch.id)
        assert ended.status == "completed"
        found = await one.lines(ended.output_file_id)
        assert [line["custom_id"] for line in found] == [f"line-{number}" for number in range(200)]
