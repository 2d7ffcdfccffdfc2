"""Load generators: open loop (requests at scheduled times) and closed loop (a stream sends after the last response)."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress

from perf.client import Client
from perf.phases import Measurement, PhaseController
from perf.records import Record
from perf.workload import Request

# Pause of a stream after a failure, so that a server that rejects requests is not flooded.
_PAUSE_AFTER_FAILURE_S = 0.05
_LAG_INTERVAL_S = 0.02
# With more open requests the server is overloaded beyond measurement, and ports and file handles run out.
MAX_IN_FLIGHT = 4096


async def closed_loop(
    client: Client, controller: PhaseController, requests: Iterator[Request], streams: int
) -> Measurement:
    """Each of `streams` streams sends its next request as soon as it has its response."""
    async with _measured_environment(controller.measurement), asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(_stream(client, controller, requests))
    return controller.measurement


async def open_loop(
    client: Client, controller: PhaseController, requests: Iterator[Request], schedule: Iterable[float]
) -> Measurement:
    """Sends at the times of the schedule, however many requests are in flight."""
    clock = asyncio.get_running_loop().time
    async with _measured_environment(controller.measurement), asyncio.TaskGroup() as group:
        start = clock()
        for offset in schedule:
            request = next(requests)  # made before it is due
            # Also a late schedule sleeps: other tasks must run.
            await asyncio.sleep(max(0.0, start + offset - clock()))
            record = controller.start(start + offset)
            if record is None:
                break
            group.create_task(_send(client, controller, record, request))
        controller.stop()
    return controller.measurement


async def _stream(client: Client, controller: PhaseController, requests: Iterator[Request]) -> None:
    clock = asyncio.get_running_loop().time
    while (record := controller.start(clock())) is not None:
        await client.send(record, next(requests))
        controller.finish(record)
        if not record.ok:
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)


async def _send(client: Client, controller: PhaseController, record: Record, request: Request) -> None:
    if controller.in_flight > MAX_IN_FLIGHT:
        record.sent = record.done = asyncio.get_running_loop().time()
        record.error = "too many open"
    else:
        await client.send(record, request)
    controller.finish(record)


@asynccontextmanager
async def _measured_environment(measurement: Measurement) -> AsyncIterator[None]:
    """Disables garbage collection and records how late the event loop runs.

    Objects that the caller of this process froze before stay frozen: a search through all of them can take a second.
    """
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()
    gc.disable()
    lag_monitor = asyncio.create_task(_record_lag(measurement.lags))
    try:
        yield
    finally:
        lag_monitor.cancel()
        with suppress(asyncio.CancelledError):
            await lag_monitor
        gc.enable()
        if not frozen:
            gc.unfreeze()


async def _record_lag(lags: list[tuple[float, float]]) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        lags.append((due, max(0.0, clock() - due)))
