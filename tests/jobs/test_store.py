"""A database that is down while batches run."""

from __future__ import annotations

from typing import Any

from serve_app.database_config import DatabaseOptions
from tests.api.scripted import ScriptedEngine, chunk
from tests.postgres_server import PostgresServer

from .service import chat_line, process, wait_for


async def test_a_batch_goes_on_after_the_database_was_down(postgres: PostgresServer) -> None:
    engine = ScriptedEngine(lambda request: [0.01, chunk(["ok"])])
    async with process(DatabaseOptions(url=postgres.create_database(), timeout_s=1), engine) as one:
        batch = await one.submit(chat_line(number) for number in range(200))

        async def ask() -> Any:
            return await one.client.batches.retrieve(batch.id)

        await wait_for(ask, lambda found: found.request_counts.completed >= 30)
        postgres.stop()
        try:
            answer = await one.http.get(f"/v1/batches/{batch.id}")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert (await one.http.post("/generate", json={"prompt": "hi"})).status_code == 200
        finally:
            postgres.start()
        ended = await one.ended(batch.id)
        found = await one.lines(ended.output_file_id)
        assert [line["custom_id"] for line in found] == [f"line-{number}" for number in range(200)]
