"""The HTTP application with batches over a scripted engine, and the official client of OpenAI in front of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from openai.types import Batch

from serve_app.api.app import create_app
from serve_app.api.batch_lines import BatchLines
from serve_app.api.context import RequestContext, configured_adapters
from serve_app.api.openai_batches.service import BatchService
from serve_app.config import AppConfig
from serve_app.database_config import DatabaseOptions
from serve_app.gateway.background import Background
from serve_app.jobs.store import JobStore
from serve_app.jobs.worker import BatchWorker
from serve_app.jobs_config import BatchOptions
from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, app_config

ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass
class Lines:
    """A BatchMeter that keeps what it counts."""

    outcomes: Counter[str] = field(default_factory=Counter)
    open: int = 0

    def line(self, outcome: str, number: int = 1) -> None:
        self.outcomes[outcome] += number

    def unfinished(self, number: int, silent_s: float) -> None:
        self.open = number


@dataclass
class WallClock:
    """Seconds since the epoch, with an offset that a test changes."""

    offset: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset


@dataclass
class Process:
    """One ingress: its application, its worker, and an OpenAI client that reaches it in memory."""

    client: openai.AsyncOpenAI
    http: httpx2.AsyncClient
    worker: BatchWorker
    meter: Lines
    engine: ScriptedEngine
    clock: WallClock

    async def upload(self, lines: Iterable[object], **fields: Any) -> str:
        content = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        file = await self.client.files.create(file=("in.jsonl", content.encode()), purpose="batch", **fields)
        return file.id

    async def submit(self, lines: Iterable[object], endpoint: Any = "/v1/chat/completions") -> Batch:
        file_id = await self.upload(lines)
        return await self.client.batches.create(
            input_file_id=file_id, endpoint=endpoint, completion_window="24h", metadata={"name": "test"}
        )

    async def ended(self, batch_id: str, tenant: str = "") -> Batch:
        client = self.client.with_options(default_headers={"x-tenant": tenant})
        found: Batch = await wait_for(lambda: client.batches.retrieve(batch_id), lambda found: found.status in ENDED)
        return found

    async def lines(self, file_id: str | None) -> list[Any]:
        if file_id is None:
            return []
        text = (await self.client.files.content(file_id)).text
        return [json.loads(line) for line in text.splitlines()]


async def wait_for(ask: Callable[[], Awaitable[Any]], done: Callable[[Any], bool], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while True:
        found = await ask()
        if done(found):
            return found
        assert time.monotonic() < end, found
        await asyncio.sleep(0.02)


def chat_line(number: int, text: str | None = None, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text or f"line {number}"}]
    return {
        "custom_id": f"line-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "small", "messages": messages, **body},
    }


@asynccontextmanager
async def process(
    database: DatabaseOptions,
    engine: ScriptedEngine | None = None,
    owner: str = "ingress-1",
    clock: WallClock | None = None,
    middleware: Sequence[Any] = (),
    **options: Any,
) -> AsyncIterator[Process]:
    """A running ingress. `options` are those of batches."""
    engine, clock = engine or ScriptedEngine(), clock or WallClock()
    config: AppConfig = app_config().model_copy(update={"batches": BatchOptions(**options)})
    assert config.batches is not None
    store, meter, telemetry = JobStore(database), Lines(), ScriptedTelemetry()
    background = RequestContext(Background(engine), telemetry, config, time.monotonic, configured_adapters(config))
    worker = BatchWorker(store, config.batches, 20_000, owner, BatchLines(background), meter, clock=clock, poll_s=0.05)
    service = BatchService(store, config.batches, worker.wake, clock)
    app = create_app(engine, telemetry, config, around=middleware, batches=service)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        client = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)
        worker.start()
        try:
            yield Process(client, http, worker, meter, engine, clock)
        finally:
            await worker.stop()
            await store.close()
