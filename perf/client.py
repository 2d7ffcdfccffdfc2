"""Sends one request at a time to a server and stamps what comes back. It never raises for what the server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import aiohttp

from perf.dialects import Dialect, NotUnderstood, Told
from perf.records import Record
from perf.workload import Ask

# As much of an answer that is no answer as goes into a message.
_EXCERPT = 200
# A line longer than this is no event; its bytes are not kept.
_LONGEST_LINE = 1 << 20


class Client:
    """One connection a request at a time, kept for the next; as many as there are requests under way."""

    def __init__(self, url: str, dialect: Dialect, timeout_s: float, api_key: str | None = None) -> None:
        self.dialect = dialect
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # Below the 5 s after which uvicorn hangs up: a request must not meet a connection that closes.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=self._timeout,
            headers=self._headers,
            # Without any cookie jar, redirects or environment: what is measured is the address that was given.
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body. Raises OSError, aiohttp.ClientError and TimeoutError."""
        async with self._session.get(self._url + path, timeout=aiohttp.ClientTimeout(total=10)) as response:
            return response.status, await response.text(errors="replace")

    async def send(self, record: Record, ask: Ask) -> None:
        """Fill in what happens to it, whatever that is."""
        clock = asyncio.get_running_loop().time
        body = json.dumps(self.dialect.body(ask)).encode()
        record.prompts = len(ask.prompts)
        record.sent = clock()
        try:
            async with self._session.post(
                self._url + self.dialect.path(ask), data=body, allow_redirects=False
            ) as response:
                if response.status != 200:
                    record.error, record.detail = f"http {response.status}", (await response.text())[:_EXCERPT]
                elif ask.streaming:
                    await self._read_stream(record, response)
                else:
                    _fill(record, self.dialect.answer(json.loads(await response.read())))
        except TimeoutError:
            record.error = "timeout"
        except (OSError, aiohttp.ClientError) as error:
            record.error, record.detail = _broken(record, error), str(error)[:_EXCERPT]
        except (NotUnderstood, ValueError, LookupError, TypeError, AttributeError) as error:
            record.error, record.detail = "not understood", f"{type(error).__name__}: {error}"[:_EXCERPT]
        finally:
            record.done = clock()

    async def _read_stream(self, record: Record, response: aiohttp.ClientResponse) -> None:
        """Arrivals are those of reads: events that came together came at the same instant."""
        ended = False
        async for at, events in _events(response):
            count = 0
            for event in events:
                if event == self.dialect.end:
                    ended = True
                    continue
                told = self.dialect.event(json.loads(event))
                count += told.token
                _fill(record, told)
                ended = ended or (self.dialect.end is None and told.tokens is not None)
            if count:
                record.arrived(at, count)
        if record.error is None and not ended:
            record.error = "cut short"
        elif record.error is None and not record.chunks and not record.tokens:
            record.error = "no token"
        elif record.error is None and not record.tokens:
            # A server that does not count: one token an event is the best guess there is.
            record.tokens = sum(record.events)


def _fill(record: Record, told: Told) -> None:
    if told.error is not None:
        record.error, record.detail = told.error, told.detail[:_EXCERPT]
    record.tokens = told.tokens if told.tokens is not None else record.tokens
    record.prompt_tokens = told.prompt_tokens if told.prompt_tokens is not None else record.prompt_tokens


def _broken(record: Record, error: Exception) -> str:
    if record.chunks:
        return "cut short"
    return "no connection" if isinstance(error, aiohttp.ClientConnectorError) else "connection lost"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, list[bytes]]]:
    """Of every read its instant, and the `data:` of events that it completed."""
    clock = asyncio.get_running_loop().time
    rest = b""
    async for read in response.content.iter_any():
        at = clock()
        *lines, rest = (rest + read).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise NotUnderstood("a line of more than a megabyte")
        yield at, [line[5:].strip() for line in lines if line.startswith(b"data:")]


def is_refusal(record: Record) -> bool:
    """Whether the server understood the request and did not want its fields."""
    return record.error in ("http 400", "http 422")
