"""Ends a request whose answer does not begin in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.errors import deadline_exceeded


def begun_in_time(chunks: AsyncGenerator[Chunk, None], request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
    """The chunks of a request. Raises DeadlineExceeded at its `first_token_deadline` if none has come."""
    return chunks if request.first_token_deadline is None else _begun_by(chunks, request)


async def _begun_by(chunks: AsyncGenerator[Chunk, None], request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
    async with aclosing(chunks):
        try:
            async with asyncio.timeout(request.starts_by - time.monotonic()):
                first = await anext(chunks, None)
        except TimeoutError:
            raise deadline_exceeded(request.starts_by - request.arrived, "had no token") from None
        if first is not None:
            yield first
        async for chunk in chunks:
            yield chunk
