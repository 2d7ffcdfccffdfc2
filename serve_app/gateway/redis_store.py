"""Keeps answers in a Redis or Valkey server, which can fail or hang without an effect on requests."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serve_app.cache_config import PASSWORD_VARIABLE, CacheOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECTIONS = 16
_NAME = b"serve_app:answer:"
# The pause before each PING to a server that has failed.
PING_PAUSE_S = 1.0
_SEAL_BYTES = 16
# The time limit of a call that stores an answer, and of connecting. No request waits for it.
_PUT_TIMEOUT_S = 1.0


class RedisStore:
    """An AnswerStore in the server at `options.url`, whose password comes from the environment.

    `get` waits for the server up to `options.timeout_s`. After the first failure no call waits until the server has
    answered a PING, which is tried once a second (a circuit breaker). `failed` is called for each failure, and for each
    PING without an answer. Answers expire after `options.ttl_s`; when the server has no memory left, it removes answers
    by its `maxmemory-policy`.

    An answer is stored with a digest of its key and its bytes. So an answer that the client library takes from the
    wrong reply, which happened in releases of redis-py when a call was cancelled (CVE-2023-28859), is a miss.
    """

    def __init__(self, options: CacheOptions, failed: Callable[[], None]) -> None:
        assert options.url is not None, "this store is for a server"
        self._timeout_s = options.timeout_s
        self._ttl_ms = max(1, round(options.ttl_s * 1000))
        self._failed = failed
        self._pinging: asyncio.Task[None] | None = None
        pool = BlockingConnectionPool.from_url(
            options.url,
            password=os.environ.get(PASSWORD_VARIABLE),
            max_connections=_CONNECTIONS,
            timeout=None,  # `_in_time` limits the wait for a connection too
            socket_timeout=_PUT_TIMEOUT_S,
            socket_connect_timeout=_PUT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self._redis: Redis = Redis.from_pool(pool)

    async def get(self, key: bytes) -> bytes | None:
        found = await self._within(self._timeout_s, lambda: self._redis.get(_NAME + key.hex().encode()))
        return self._opened(key, found) if isinstance(found, bytes) else None

    async def put(self, key: bytes, answer: bytes) -> None:
        sealed = _seal(key, answer) + answer
        name = _NAME + key.hex().encode()
        await self._within(_PUT_TIMEOUT_S, lambda: self._redis.set(name, sealed, px=self._ttl_ms))

    async def close(self) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        await self._redis.aclose()

    async def _within(self, timeout_s: float, command: Callable[[], Awaitable[T]]) -> T | None:
        """The result of a command; None if the server is known to fail, or fails now."""
        if self._pinging is not None:
            return None
        try:
            return await _in_time(timeout_s, command)
        except Exception as error:  # noqa: BLE001 (whatever happens to the server, the request goes on)
            self._failed()
            if self._pinging is None:
                log.warning("the server of the response cache failed, requests go on without it: %s", _reason(error))
                self._pinging = asyncio.create_task(self._ping_until_it_answers())
            return None

    async def _ping_until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(PING_PAUSE_S)
            try:
                await _in_time(self._timeout_s, self._redis.ping)
            except Exception:  # noqa: BLE001 (the next one may succeed)
                self._failed()
            else:
                self._pinging = None
                log.info("the server of the response cache answers again")
                return

    def _opened(self, key: bytes, sealed: bytes) -> bytes | None:
        answer = sealed[_SEAL_BYTES:]
        if sealed[:_SEAL_BYTES] == _seal(key, answer):
            return answer
        self._failed()
        log.error("the server of the response cache has returned what was not stored for this key")
        return None


async def _in_time(timeout_s: float, command: Callable[[], Awaitable[T]]) -> T:
    """Raises RedisError, OSError, TimeoutError.

    The command runs in a task of its own, because a cancelled command of redis-py can wait until its connection has
    been closed, which a server that hangs delays.
    """
    task = asyncio.ensure_future(command())
    task.add_done_callback(_retrieve)
    try:
        await asyncio.wait([task], timeout=timeout_s)
        if not task.done() or task.cancelled():
            raise TimeoutError("no answer in time")
        return task.result()
    finally:
        task.cancel()


def _seal(key: bytes, answer: bytes) -> bytes:
    return blake2b(answer, key=key, digest_size=_SEAL_BYTES).digest()


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the exception of a task that nothing waits for any more, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
