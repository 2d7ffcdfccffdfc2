"""Counts together with other ingresses in a Redis or Valkey server, and in this process while the server is away."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

from serve_app.gateway.counters import (
    BUCKETS,
    BUDGETS,
    Counter,
    CountersUnavailable,
    MemoryCounters,
    Reservation,
    period_end,
)
from serve_app.gateway.redis_link import RedisLink
from serve_app.gateway.redis_scripts import RENEW, RESERVE, SETTLE
from serve_app.quota_config import PASSWORD_VARIABLE, QuotaOptions

log = logging.getLogger(__name__)

# Ended reservations that wait for the server: each takes up to 2.8 KB.
_MOST_WAITING = 10_000
_SETTLED_TOGETHER = 64
# The pause before another try to send them.
_RETRY_S = 0.2
# A budget is kept for a day after its period, and the number of concurrent requests for a day after its last change.
_KEPT = timedelta(days=1)


class RedisCounters:
    """Counters in the server at `options.url`, whose password comes from the environment.

    One script reserves all amounts or none. Reservations are held under the name of this `ingress`, with a lease that
    it renews: when the lease has expired, the next reservation of any ingress gives them back, without what they had
    used when it was renewed for the last time. An ended reservation whose lease has expired is counted again.

    A reservation waits for the server up to `options.timeout_s`, and no more when the server is known to fail. Then
    CountersUnavailable is raised, or with `when_unavailable: allow` it is counted in this process. Ended reservations
    are sent by a task, in order. `failed` is called for each failure.
    """

    def __init__(
        self, options: QuotaOptions, ingress: str, seeds: Mapping[str, int], failed: Callable[[], None]
    ) -> None:
        assert options.url is not None, "these counters are for a server"
        self._options = options
        self._ingress = ingress
        self._seeds = seeds
        self._memory = MemoryCounters(seeds)
        self._failed = failed
        password = os.environ.get(PASSWORD_VARIABLE)
        self._link = RedisLink(options.url, password, options.timeout_s, failed, "the server of the limits")
        self._prefix = f"serve_app:quota:{options.namespace}:"
        self._reserve, self._settle, self._renew = map(self._link.redis.register_script, (RESERVE, SETTLE, RENEW))
        self._open: dict[str, Reservation] = {}
        self._ended: deque[tuple[Reservation, Sequence[int]]] = deque()
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(work()) for work in (self._settle_forever, self._renew_forever)]

    async def reserve(self, reservation: Reservation) -> tuple[bool, Sequence[int]]:
        arguments = [reservation.id, *self._lease(), *_amounts(reservation), *self._details(reservation.counters)]
        keys = self._keys(reservation.counters)
        known_to_fail = self._link.fails
        try:
            found = await self._link.call(self._options.timeout_s, lambda: self._reserve(keys, arguments))
        except asyncio.CancelledError:
            self.settle(reservation, (0,) * len(reservation.amounts))  # the server may have reserved it
            raise
        if found is not None:
            granted, *values = found
            if granted:
                self._open[reservation.id] = reservation
            return bool(granted), values
        if not known_to_fail:
            self.settle(reservation, (0,) * len(reservation.amounts))
        if self._options.when_unavailable == "refuse":
            raise CountersUnavailable
        reservation.local = True
        return await self._memory.reserve(reservation)

    def settle(self, reservation: Reservation, used: Sequence[int]) -> None:
        if reservation.local:
            self._memory.settle(reservation, used)
            return
        self._open.pop(reservation.id, None)
        if len(self._ended) == _MOST_WAITING:
            self._ended.popleft()  # its lease gives it back
            self._failed()
        self._ended.append((reservation, tuple(used)))
        self._wake.set()

    async def close(self) -> None:
        """Send the ended reservations that the server takes within `timeout_s`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._send_ended()
        await self._link.close()

    async def _settle_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not await self._send_ended():
                await asyncio.sleep(_RETRY_S)
                self._wake.set()

    async def _send_ended(self) -> bool:
        """Whether all ended reservations were sent. They stay in the queue until the server has taken them."""
        while self._ended:
            part = list(islice(self._ended, _SETTLED_TOGETHER))
            if await self._link.call(self._options.timeout_s + 1, partial(self._settle_all, part)) is None:
                return False
            for one in part:
                if self._ended and self._ended[0] is one:  # otherwise it was dropped meanwhile
                    self._ended.popleft()
        return True

    async def _settle_all(self, ended: Sequence[tuple[Reservation, Sequence[int]]]) -> bool:
        """One round trip for several reservations. A script is idempotent: a second try counts nothing twice."""
        async with self._link.redis.pipeline(transaction=False) as pipeline:
            for reservation, used in ended:
                counters = reservation.counters
                arguments = [reservation.id, *self._lease(), *_amounts(reservation), *used, *self._details(counters)]
                await self._settle(self._keys(counters), arguments, client=pipeline)
            await pipeline.execute()
        return True

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._options.lease_s / 3)
            if self._open:
                used = [[one.id, [*map(int, one.used())]] for one in self._open.values()]
                arguments = [*self._lease(), json.dumps(used)]
                await self._link.call(self._options.timeout_s + 1, partial(self._renew, self._keys(()), arguments))

    def _lease(self) -> list[Any]:
        return [self._ingress, round(self._options.lease_s * 1000), f"{self._prefix}held:"]

    def _keys(self, counters: Sequence[Counter]) -> list[str]:
        return [f"{self._prefix}leases", *(self._prefix + counter.name for counter in counters)]

    def _details(self, counters: Sequence[Counter]) -> list[Any]:
        """For each counter: whether it is a bucket, its limit, its first value, and the instant of its removal."""
        now = datetime.now(UTC)
        details: list[Any] = []
        for counter in counters:
            end = period_end(counter.period) if counter.kind in BUDGETS else now
            details += [
                int(counter.kind in BUCKETS),
                counter.limit,
                self._seeds.get(counter.name, 0),
                round((end + _KEPT).timestamp()),
            ]
        return details


def _amounts(reservation: Reservation) -> list[int]:
    return [len(reservation.amounts), *reservation.amounts]
