"""Keeps answers in a Redis or Valkey server, which can fail or hang without an effect on requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from hashlib import blake2b

from serve_app.cache_config import PASSWORD_VARIABLE, CacheOptions
from serve_app.gateway.redis_link import RedisLink

log = logging.getLogger(__name__)

_NAME = b"serve_app:answer:"
_SEAL_BYTES = 16
# The time limit of a call that stores an answer. No request waits for it.
_PUT_TIMEOUT_S = 1.0


class RedisStore:
    """An AnswerStore in the server at `options.url`, whose password comes from the environment.

    `get` waits for the server up to `options.timeout_s`. After the first failure no call waits until the server has
    answered a PING. `failed` is called for each failure. Answers expire after `options.ttl_s`; when the server has no
    memory left, it removes answers by its `maxmemory-policy`.

    An answer is stored with a digest of its key and its bytes. So an answer that the client library takes from the
    wrong reply, which happened in releases of redis-py when a call was cancelled (CVE-2023-28859), is a miss.
    """

    def __init__(self, options: CacheOptions, failed: Callable[[], None]) -> None:
        assert options.url is not None, "this store is for a server"
        self._timeout_s = options.timeout_s
        self._ttl_ms = max(1, round(options.ttl_s * 1000))
        self._failed = failed
        password = os.environ.get(PASSWORD_VARIABLE)
        self._link = RedisLink(options.url, password, options.timeout_s, failed, "the server of the response cache")

    async def get(self, key: bytes) -> bytes | None:
        name = _NAME + key.hex().encode()
        found = await self._link.call(self._timeout_s, lambda: self._link.redis.get(name))
        return self._opened(key, found) if isinstance(found, bytes) else None

    async def put(self, key: bytes, answer: bytes) -> None:
        sealed = _seal(key, answer) + answer
        name = _NAME + key.hex().encode()
        await self._link.call(_PUT_TIMEOUT_S, lambda: self._link.redis.set(name, sealed, px=self._ttl_ms))

    async def close(self) -> None:
        await self._link.close()

    def _opened(self, key: bytes, sealed: bytes) -> bytes | None:
        answer = sealed[_SEAL_BYTES:]
        if sealed[:_SEAL_BYTES] == _seal(key, answer):
            return answer
        self._failed()
        log.error("the server of the response cache has returned what was not stored for this key")
        return None


def _seal(key: bytes, answer: bytes) -> bytes:
    return blake2b(answer, key=key, digest_size=_SEAL_BYTES).digest()
