"""The instants of one span: on the wall clock, with durations of the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class SpanClock:
    """Begins at the wall clock's time and then follows the monotonic clock, whatever the wall clock does."""

    __slots__ = ("_monotonic", "_offset", "began")

    def __init__(
        self, wall: Callable[[], int] = time.time_ns, monotonic: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.began = wall()
        self._monotonic = monotonic
        self._offset = self.began - monotonic()

    def now(self) -> int:
        """Nanoseconds since 1970."""
        return self._offset + self._monotonic()
