"""Runs the batches of the database in this process: validates them, runs their lines, and writes their files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from serve_app.errors import NotReady
from serve_app.jobs import batches, files, journal, output
from serve_app.jobs.input import InvalidInput, Rules, chunks_of_input
from serve_app.jobs.line_queue import LineQueue
from serve_app.jobs.lines import LineRunner
from serve_app.jobs.records import Batch, Status
from serve_app.jobs.store import JobStore
from serve_app.jobs_config import BatchOptions

log = logging.getLogger(__name__)

# The interval of the look for work that other processes have left or clients have sent to other ingresses.
POLL_S = 1.0
_RENEW_S = journal.LEASE_S / 3
_SWEEP_S = 600.0


class BatchMeter(Protocol):
    """Counts what batches do."""

    def line(self, outcome: str, number: int = 1) -> None:
        """Count lines: 'completed' or 'failed', 'retried', or 'expired' or 'cancelled' without an answer."""
        ...

    def unfinished(self, number: int, silent_s: float) -> None:
        """The number of batches that have not ended, and the longest time since one of them made progress."""
        ...


class BatchWorker:
    """The worker of one process. `owner` is unique among all processes. `clock` returns seconds since the epoch."""

    def __init__(
        self,
        store: JobStore,
        options: BatchOptions,
        max_line_bytes: int,
        owner: str,
        runner: LineRunner,
        meter: BatchMeter,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._options = options
        self._max_line_bytes = max_line_bytes
        self._owner = owner
        self._runner = runner
        self._meter = meter
        self._clock = clock
        self._poll_s = poll_s
        self._changed = asyncio.Event()
        self._lines = LineQueue(store, owner, options.lines_in_flight, runner, meter, clock, self._changed.set)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look for work."""
        works = (self._lines.write_forever(), self._run_lines(), self._run_batches(), self._renew(), self._observe())
        self._tasks = [asyncio.create_task(work) for work in works]

    def wake(self) -> None:
        """Look for work now: a client has changed a batch."""
        self._changed.set()

    async def stop(self) -> None:
        """Stop running lines, and leave them to other processes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._lines.stop()
        with suppress(NotReady):
            await self._store.call(journal.release, self._owner)

    async def _run_lines(self) -> None:
        """Claim chunks and start their lines."""
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._changed.wait()
            except TimeoutError:
                self._lines.claim_again()
            self._changed.clear()
            await _logged(self._lines.advance())

    async def _run_batches(self) -> None:
        """Validate new batches, and end those whose lines are done, or which have expired or are cancelled."""
        while True:
            await _logged(self._next_batch())
            await asyncio.sleep(self._poll_s)

    async def _next_batch(self) -> None:
        while True:
            batch = await self._store.call(journal.claim_batch, self._owner, self._clock())
            if batch is None:
                return
            if batch.status is Status.VALIDATING:
                await self._validate(batch)
            else:
                await self._end(batch)
            self._lines.claim_again()
            self._changed.set()

    async def _validate(self, batch: Batch) -> None:
        options, now = self._options, self._clock()
        rules = Rules(batch.endpoint, options.max_lines, self._max_line_bytes, self._runner.parse)
        try:
            found = await self._store.call(
                lambda database: chunks_of_input(batch.id, files.read(database, batch.input_file), rules)
            )
        except InvalidInput as error:
            log.info("Batch %s has an invalid input file.", batch.id)
            await self._store.call(journal.fail, self._owner, batch.id, error.faults, now)
            return
        await self._store.call(journal.start, self._owner, batch.id, found, now)

    async def _end(self, batch: Batch) -> None:
        now = self._clock()
        expires_at = now + self._options.retention_s
        missing = await self._store.call(output.finish, self._owner, batch, self._runner.parse, now, expires_at)
        for code, number in missing.items():
            self._meter.line(code.removeprefix("batch_"), number)
        log.info("Batch %s has ended: %s.", batch.id, batch.outcome or Status.CANCELLED)

    async def _renew(self) -> None:
        """Renew the leases, and stop the lines of chunks that another worker has, or whose batch is cancelled."""
        while True:
            await asyncio.sleep(_RENEW_S)
            await _logged(self._lines.renew())

    async def _observe(self) -> None:
        """Measure the open batches, and delete what has expired."""
        swept = 0.0
        while True:
            await _logged(self._measure())
            if time.monotonic() - swept > _SWEEP_S:
                swept = time.monotonic()
                await _logged(self._sweep())
            await asyncio.sleep(_RENEW_S)

    async def _measure(self) -> None:
        number, progress_at = await self._store.call(batches.unfinished)
        self._meter.unfinished(number, 0.0 if progress_at is None else max(0.0, self._clock() - progress_at))

    async def _sweep(self) -> None:
        now = self._clock()
        await self._store.call(files.sweep, now)
        await self._store.call(batches.sweep, now - self._options.retention_s)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """Await a step of a loop. What fails is tried again in the next step; the log has the reason."""
    try:
        await work
    except NotReady:
        return  # the store has logged it
    except Exception:
        log.exception("A step of the batch worker failed.")
