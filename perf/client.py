"""Sends single requests to a server and records the time of each read. A server fault becomes the record's error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import aiohttp

from perf.dialects import Dialect, ProtocolError, ResponseData
from perf.records import Record
from perf.workload import Request

# Characters of an invalid response that go into an error's detail.
_EXCERPT = 200
# A longer line is not an event; its bytes are not kept.
_MAX_LINE_BYTES = 1 << 20


class Client:
    """Keeps one connection for each request in flight and reuses idle connections."""

    def __init__(self, url: str, dialect: Dialect, timeout_s: float, api_key: str | None = None) -> None:
        self.dialect = dialect
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Below the 5 s after which uvicorn closes an idle connection: no request meets a closing connection.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=self._timeout,
            headers=self._headers,
            # No cookies and no proxy from the environment: the client measures the address that was given.
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str) -> tuple[int, str]:
        """Returns status and body. Raises OSError, aiohttp.ClientError and TimeoutError."""
        async with self._session.get(self._url + path, timeout=aiohttp.ClientTimeout(total=10)) as response:
            return response.status, await response.text(errors="replace")

    async def send(self, record: Record, request: Request) -> None:
        """Sends the request and fills in the record, also if the request fails."""
        clock = asyncio.get_running_loop().time
        body = json.dumps(self.dialect.body(request)).encode()
        record.prompts = len(request.prompts)
        record.sent = clock()
        try:
            async with self._session.post(
                self._url + self.dialect.path(request), data=body, allow_redirects=False
            ) as response:
                if response.status != 200:
                    record.error, record.detail = f"http {response.status}", (await response.text())[:_EXCERPT]
                elif request.streaming:
                    await self._read_stream(record, response)
                else:
                    _update(record, self.dialect.parse_response(json.loads(await response.read())))
        except TimeoutError:
            record.error = "timeout"
        except (OSError, aiohttp.ClientError) as error:
            record.error, record.detail = _connection_error(record, error), str(error)[:_EXCERPT]
        except (ProtocolError, ValueError, LookupError, TypeError, AttributeError) as error:
            record.error, record.detail = "invalid response", f"{type(error).__name__}: {error}"[:_EXCERPT]
        finally:
            record.done = clock()

    async def _read_stream(self, record: Record, response: aiohttp.ClientResponse) -> None:
        """Events of the same read have the same arrival time."""
        ended = False
        async for at, events in _events(response):
            count = 0
            for event in events:
                if event == self.dialect.end:
                    ended = True
                    continue
                data = self.dialect.parse_event(json.loads(event))
                count += data.token
                _update(record, data)
                ended = ended or (self.dialect.end is None and data.tokens is not None)
            if count:
                record.arrived(at, count)
        if record.error is None and not ended:
            record.error = "cut short"
        elif record.error is None and not record.chunks and not record.tokens:
            record.error = "no token"
        elif record.error is None and not record.tokens:
            # The server sends no usage: one token per event is the best estimate.
            record.tokens = sum(record.events)


def _update(record: Record, data: ResponseData) -> None:
    if data.error is not None:
        record.error, record.detail = data.error, data.detail[:_EXCERPT]
    record.tokens = data.tokens if data.tokens is not None else record.tokens
    record.prompt_tokens = data.prompt_tokens if data.prompt_tokens is not None else record.prompt_tokens


def _connection_error(record: Record, error: Exception) -> str:
    if record.chunks:
        return "cut short"
    return "no connection" if isinstance(error, aiohttp.ClientConnectorError) else "connection lost"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, list[bytes]]]:
    """Yields for each read its arrival time and the `data:` values of the events that it completed."""
    clock = asyncio.get_running_loop().time
    rest = b""
    async for read in response.content.iter_any():
        at = clock()
        *lines, rest = (rest + read).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise ProtocolError("a line is longer than 1 MiB")
        yield at, [line[5:].strip() for line in lines if line.startswith(b"data:")]
