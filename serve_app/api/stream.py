"""The response that streams the answers to one call as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.context import RequestContext
from serve_app.api.generation import begin, disconnect, guarded, run_in_parallel
from serve_app.api.sse import comment
from serve_app.core.events import Chunk
from serve_app.core.queries import ModelState
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError, internal_error


class StreamEncoder(Protocol):
    """Encodes the answers to one call as events of one dialect."""

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        """The events for a chunk of answer number `index`."""
        ...

    def end(self) -> bytes:
        """The events after the last token of the last answer."""
        ...

    def failure(self, error: ServeAppError) -> bytes:
        """The events that end the stream with an error."""
        ...


class EventStream(Response):
    """Streams the answers to one call as they come.

    An error before the response began is raised, so that it has a status of its own. After `limits.heartbeat_s` without
    a byte the response begins, or continues, with a heartbeat; from then on an error is an event of the stream. A
    client that does not take a write within `limits.stalled_client_s` counts as one that left. `prepare` is awaited
    once, when the first chunk has arrived. `heartbeat` encodes a heartbeat from the state of the request: `queued` or
    `warming`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        context: RequestContext,
        requests: Sequence[GenerationRequest],
        encoder: StreamEncoder,
        prepare: Callable[[], Awaitable[None]] | None = None,
        heartbeat: Callable[[str], bytes] = comment,
    ) -> None:
        self.status_code = 200
        self.background = None
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
        self.init_headers(headers)
        self._context = context
        self._requests = requests
        self._model = requests[0].model
        self._encoder = encoder
        self._prepare = prepare
        self._encode_heartbeat = heartbeat
        self._unfinished = len(requests)
        self._started = False
        self._written_at = 0.0
        self._writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ServeAppError before the response began, and ClientDisconnect."""
        self._written_at = asyncio.get_running_loop().time()
        try:
            await guarded(self._run(send), disconnect(receive), self._send_heartbeats(send))
        except ClientDisconnect:
            raise
        except Exception as error:  # noqa: BLE001 (raised, or logged and counted)
            await self._fail(send, error)

    async def _run(self, send: Send) -> None:
        await run_in_parallel(partial(self._follow, send, index) for index in range(len(self._requests)))
        assert not self._unfinished, "an engine ends every answer"
        await self._write(send, b"", more_body=False)

    async def _follow(self, send: Send, index: int) -> None:
        """Write one answer to its end."""
        context = self._context
        request = begin(self._requests[index], context.clock())
        async with aclosing(context.engine.generate(request)) as chunks:
            async for chunk in chunks:
                if self._prepare is not None:
                    await self._prepare()
                    self._prepare = None
                events = self._encoder.chunk(chunk, index)
                self._unfinished -= chunk.finished
                events += b"" if self._unfinished else self._encoder.end()
                if events:
                    await self._write(send, events)

    async def _send_heartbeats(self, send: Send) -> None:
        """Write a heartbeat whenever no write ended for `heartbeat_s`; none follows the last event.

        A heartbeat waits for a write that is in progress. Raises ClientDisconnect after `stalled_client_s`, which shows
        that the client does not read. A time limit for every write would cost 5 us per token.
        """
        loop, limits = asyncio.get_running_loop(), self._context.limits
        while True:
            silence_s = loop.time() - self._written_at
            if silence_s < limits.heartbeat_s:
                await asyncio.sleep(limits.heartbeat_s - silence_s)
                continue
            try:
                async with asyncio.timeout(limits.stalled_client_s):
                    await self._write(send, self._heartbeat)
            except TimeoutError:
                raise ClientDisconnect from None

    def _heartbeat(self) -> bytes:
        if not self._unfinished:
            return b""
        ready = self._context.engine.health(self._model).state is ModelState.READY
        return self._encode_heartbeat("queued" if ready else "warming")

    async def _fail(self, send: Send, error: Exception) -> None:
        """End the stream with an error event. Raises the error if the response has not begun."""
        if not self._started:
            raise error
        failure = error if isinstance(error, ServeAppError) else internal_error(error, self._requests[0].id)
        self._context.telemetry.refused(failure, self._model)
        try:
            async with asyncio.timeout(self._context.limits.stalled_client_s):
                await self._write(send, self._encoder.failure(failure))
                await self._write(send, b"", more_body=False)
        except Exception as second:  # the error is counted, and the stream has no end
            raise ClientDisconnect from second

    async def _write(self, send: Send, body: bytes | Callable[[], bytes], more_body: bool = True) -> None:
        """Write one part of the body. A function is called when it is the part's turn."""
        async with self._writing:  # heartbeats and answers are written by different tasks, the start comes first
            part = body if isinstance(body, bytes) else body()
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if part or not more_body:
                await send({"type": "http.response.body", "body": part, "more_body": more_body})
            self._written_at = asyncio.get_running_loop().time()
