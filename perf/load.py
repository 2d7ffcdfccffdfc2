"""Puts a load on a server: at the instants of a schedule (open loop), or whenever a stream is free (closed loop)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress

from perf.client import Client
from perf.gate import Gate, Measured
from perf.records import Record
from perf.workload import Ask

# A server that refuses at once is not asked again at once by a stream that is free.
_AFTER_FAILURE_S = 0.05
# How often the event loop's lateness is looked at.
_LAG_INTERVAL_S = 0.02
# More open requests than this are no load but a lost server; ports and file handles end somewhere, too.
MAX_IN_FLIGHT = 4096


async def closed(client: Client, gate: Gate, asks: Iterator[Ask], streams: int) -> Measured:
    """`streams` of them, each asks again as soon as it has its answer."""
    async with _undisturbed(gate.measured), asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(_stream(client, gate, asks))
    return gate.measured


async def opened(client: Client, gate: Gate, asks: Iterator[Ask], schedule: Iterable[float]) -> Measured:
    """At the schedule's instants, however many are still under way; a request is late if this client is."""
    clock = asyncio.get_running_loop().time
    async with _undisturbed(gate.measured), asyncio.TaskGroup() as group:
        start = clock()
        for offset in schedule:
            ask = next(asks)  # made before it is due
            await asyncio.sleep(max(0.0, start + offset - clock()))  # and lets the others go on, however late it is
            record = gate.due(start + offset)
            if record is None:
                break
            group.create_task(_send(client, gate, record, ask))
        gate.stop()
    return gate.measured


async def _stream(client: Client, gate: Gate, asks: Iterator[Ask]) -> None:
    clock = asyncio.get_running_loop().time
    while (record := gate.due(clock())) is not None:
        await client.send(record, next(asks))
        gate.ended(record)
        if not record.ok:
            await asyncio.sleep(_AFTER_FAILURE_S)


async def _send(client: Client, gate: Gate, record: Record, ask: Ask) -> None:
    if gate.in_flight > MAX_IN_FLIGHT:
        record.sent = record.done = asyncio.get_running_loop().time()
        record.error = "too many open"
    else:
        await client.send(record, ask)
    gate.ended(record)


@asynccontextmanager
async def _undisturbed(measured: Measured) -> AsyncIterator[None]:
    """Without pauses of the garbage collector, and with an eye on the event loop."""
    gc.collect()
    gc.freeze()
    gc.disable()
    eye = asyncio.create_task(_watch_lag(measured.lags))
    try:
        yield
    finally:
        eye.cancel()
        with suppress(asyncio.CancelledError):
            await eye
        gc.enable()
        gc.unfreeze()


async def _watch_lag(lags: list[tuple[float, float]]) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        lags.append((due, max(0.0, clock() - due)))
