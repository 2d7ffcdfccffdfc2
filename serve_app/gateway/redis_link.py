"""The connection to a Redis or Valkey server that can fail or hang: bounded calls, and a circuit breaker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECTIONS = 16
# The pause before each PING to a server that has failed.
PING_PAUSE_S = 1.0
# The time limit of connecting, and of every read.
_SOCKET_TIMEOUT_S = 1.0


class RedisLink:
    """A server at `url`. After the first failure no call is made until the server has answered a PING.

    A PING is tried once a second (a circuit breaker) and waits up to `timeout_s`. `failed` is called for each failure,
    and for each PING without an answer. `purpose` names the server in the log: "the server of the response cache".
    """

    def __init__(
        self, url: str, password: str | None, timeout_s: float, failed: Callable[[], None], purpose: str
    ) -> None:
        self._timeout_s = timeout_s
        self._failed = failed
        self._purpose = purpose
        self._pinging: asyncio.Task[None] | None = None
        pool = BlockingConnectionPool.from_url(
            url,
            password=password,
            max_connections=_CONNECTIONS,
            timeout=None,  # `_in_time` limits the wait for a connection too
            socket_timeout=max(timeout_s, _SOCKET_TIMEOUT_S),
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        self.redis: Redis = Redis.from_pool(pool)

    @property
    def fails(self) -> bool:
        """Whether the server is known to fail."""
        return self._pinging is not None

    async def call(self, timeout_s: float, command: Callable[[], Awaitable[T]]) -> T | None:
        """The result of a command; None if the server is known to fail, or fails now."""
        if self.fails:
            return None
        try:
            return await _in_time(timeout_s, command)
        except Exception as error:  # noqa: BLE001 (whatever happens to the server, the request goes on)
            self._failed()
            if self._pinging is None:
                log.warning("%s failed, requests go on without it: %s", self._purpose, _reason(error))
                self._pinging = asyncio.create_task(self._ping_until_it_answers())
            return None

    async def close(self) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        await self.redis.aclose()

    async def _ping_until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(PING_PAUSE_S)
            try:
                await _in_time(self._timeout_s, self.redis.ping)
            except Exception:  # noqa: BLE001 (the next one may succeed)
                self._failed()
            else:
                self._pinging = None
                log.info("%s answers again", self._purpose)
                return


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


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the exception of a task that nothing waits for any more, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
