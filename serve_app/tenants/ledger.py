"""Adds up the usage of requests in memory, and writes the sums to the database from a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from serve_app.core.usage import Usage
from serve_app.database import first_line
from serve_app.tenants.usage_store import HOUR_S, LONGEST_NAME, Place, Sums, UsageStore

log = logging.getLogger(__name__)

# Rows that wait for the database: each takes about 340 bytes.
_MOST_ROWS = 100_000
# The time for the last write when a process stops.
_STOP_S = 10.0


class LedgerMeter(Protocol):
    """Measures the ledger of one process. Called from any thread."""

    def unwritten(self, requests: int) -> None:
        """So many requests could not be written to the database yet."""
        ...

    def lost(self, requests: int) -> None:
        """Count requests whose usage is not kept, because too many rows wait for the database."""
        ...


class Ledger:
    """Implements `core.usage.UsageLog`. Each row holds the sums of an hour, a tenant, a key and a model.

    The rows are written every `flush_s` seconds, and at `stop`. While the database cannot be written, they wait.
    """

    def __init__(
        self,
        open_store: Callable[[], UsageStore],
        flush_s: float,
        meter: LedgerMeter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`open_store` is called in the thread, again after each failure. `clock` returns seconds since 1970."""
        self._open_store = open_store
        self._flush_s = flush_s
        self._meter = meter
        self._clock = clock
        self._store: UsageStore | None = None
        self._rows: dict[Place, Sums] = {}
        self._lock = threading.Lock()
        self._failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left. Takes at most 10 s."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def record(self, usage: Usage) -> None:
        now = int(self._clock())
        place = Place(now - now % HOUR_S, *map(_name, (usage.tenant, usage.key, usage.model)))
        with self._lock:
            kept = self._keep(self._rows, place, Sums.of(usage))
        if not kept:
            self._meter.lost(1)

    def _run(self) -> None:
        while not self._stopped.wait(self._flush_s):
            self._flush()
        self._flush()
        if self._store is not None:
            self._store.close()

    def _flush(self) -> None:
        with self._lock:
            rows, self._rows = self._rows, {}
        try:
            if self._store is None:
                self._store = self._open_store()
            if rows:
                self._store.add(rows)
        except SQLAlchemyError as error:
            self._put_back(rows)
            if not self._failing:
                log.error("The usage cannot be written to the database; it waits. %s", first_line(error))
            self._failing = True
        else:
            if self._failing:
                log.info("The usage can be written to the database again.")
            self._failing = False
        with self._lock:
            waiting = sum(sums.requests for sums in self._rows.values()) if self._failing else 0
        self._meter.unwritten(waiting)

    def _put_back(self, rows: dict[Place, Sums]) -> None:
        lost = 0
        with self._lock:
            newer, self._rows = self._rows, rows
            for place, sums in newer.items():
                if not self._keep(rows, place, sums):
                    lost += sums.requests
        if lost:
            self._meter.lost(lost)

    def _keep(self, rows: dict[Place, Sums], place: Place, sums: Sums) -> bool:
        """Add to a row, unless it is a new one and there are too many."""
        row = rows.get(place)
        if row is None and len(rows) >= _MOST_ROWS:
            return False
        if row is None:
            rows[place] = sums
        else:
            row.add(sums)
        return True


def _name(text: str) -> str:
    """A name as every database can store it. PostgreSQL refuses longer texts than the column, and NUL."""
    return text[:LONGEST_NAME].replace("\0", "")
