"""The HTTP application over the native engine, with the toy model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from serve_app.api.app import create_app
from serve_app.core.events import Chunk
from serve_app.core.queries import A, Query
from serve_app.core.requests import GenerationRequest
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.stream import TokenStream
from serve_app.errors import ServeAppError
from tests.engines.native.helpers import running

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config


@dataclass
class ToyEngine(ScriptedEngine):
    """Generates and answers queries with a native engine instead of a script."""

    native: NativeEngine | None = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        assert self.native is not None
        self.requests.append(request)
        stream = TokenStream(request)
        (error,) = await asyncio.to_thread(self.native.admit, [stream])
        if error is not None:
            raise error
        try:
            async for chunk in stream.chunks(0.0):
                yield chunk
        finally:
            stream.close()

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        assert self.native is not None
        result = await asyncio.to_thread(self.native.answer, query)
        if isinstance(result, ServeAppError):
            raise result
        return result


@asynccontextmanager
async def toy() -> AsyncIterator[tuple[httpx.AsyncClient, ToyEngine]]:
    """The toy model repeats its prompt, one byte a token, with probability 1."""
    with running(max_context=64, max_step_tokens=8, max_running=3) as native:
        engine = ToyEngine(native=native)
        transport = httpx.ASGITransport(create_app(engine, ScriptedTelemetry(), app_config(max_batch_items=50)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, engine
