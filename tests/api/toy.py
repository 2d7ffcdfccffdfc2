"""The front door with an engine right behind it, on the model without weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from serve_app.api.app import create_app
from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.stream import TokenStream
from tests.engines.native.helpers import running

from .scripted import ScriptedGateway, app_config


@dataclass
class EngineGateway(ScriptedGateway):
    """Asks an engine instead of playing a script."""

    engine: NativeEngine | None = None

    async def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        assert self.engine is not None
        self.requests.append(request)
        stream = TokenStream(request)
        (refusal,) = await asyncio.to_thread(self.engine.admit, [stream])
        if refusal is not None:
            raise refusal
        try:
            async for chunk in stream.chunks(0.0):
                yield chunk
        finally:
            stream.close()


@asynccontextmanager
async def toy() -> AsyncIterator[tuple[httpx.AsyncClient, EngineGateway]]:
    """Answers with its prompt, over and over; one token a byte, of which it is certain."""
    with running(max_context=64, max_step_tokens=8, max_running=3) as inner:
        gateway = EngineGateway(engine=inner)
        transport = httpx.ASGITransport(create_app(gateway, app_config(max_batch_items=50)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, gateway
