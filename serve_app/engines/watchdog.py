"""Ends the process of an engine that makes no progress, so that another one replaces it."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable

from serve_app.engines.protocol import Work

_TICK_S = 0.5
# A thread that waits for its turn on a busy machine does not run on time. More than this much of a tick is not counted.
_LONGEST_TICK_S = 2 * _TICK_S
# The process ends if no Python code ran for this time: native code that hangs may hold the interpreter's lock.
LOCK_TIMEOUT_S = 20.0


class Watchdog:
    """Calls `on_hang` once, on its own thread, with a description, when one piece of work exceeds its limit.

    `work` returns the work that is in progress, or None; it is called every 0.5 s. The time in which the whole process
    stands still, because it is stopped or the machine is paused, does not count. If the interpreter's lock is held for
    `lock_timeout_s`, the watchdog's thread cannot run: then faulthandler, whose timer needs no lock, writes the
    stacks of all threads to the standard error and ends the process. A process that was stopped for that long ends too.
    """

    def __init__(
        self, work: Callable[[], Work | None], on_hang: Callable[[str], None], lock_timeout_s: float = LOCK_TIMEOUT_S
    ) -> None:
        self._work = work
        self._on_hang = on_hang
        self._lock_timeout_s = lock_timeout_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        progress = Progress()
        try:
            while not self._stopped.wait(_TICK_S):
                faulthandler.dump_traceback_later(self._lock_timeout_s, exit=True, file=2)
                work = self._work()
                if progress.hangs(work, time.monotonic()):
                    assert work is not None
                    self._on_hang(f"the engine made no progress for more than {work.limit_s:.0f} s")
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()


class Progress:
    """Adds the time in which the same work was seen in progress."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._seconds = 0.0
        self._seen = 0.0

    def hangs(self, work: Work | None, now: float) -> bool:
        """Whether the work that is in progress at `now` exceeds its limit."""
        same = work is not None and work.number == self._number
        self._seconds = self._seconds + min(now - self._seen, _LONGEST_TICK_S) if same else 0.0
        self._number, self._seen = None if work is None else work.number, now
        return work is not None and self._seconds > work.limit_s


def stacks() -> str:
    """The current stack of each Python thread of the process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
