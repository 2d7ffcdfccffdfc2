"""Measures how long each phase of loading a model took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable


class LoadPhases:
    """The seconds of each phase of a start, from the stages that are reported to `begin`.

    A phase is named by the first word of its stages ("loading weights" belongs to `loading`), so that numbers and
    paths in a stage make no new phase. `begin` may be called from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._phase = "starting"
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def begin(self, stage: str) -> None:
        """A stage begins, and the one before it ends. The stage "" is the end of the start."""
        now = self._clock()
        if self._phase:
            self._seconds[self._phase] += now - self._began
        self._began, self._phase = now, stage.partition(" ")[0]

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of the phases that have ended, in their order."""
        return dict(self._seconds)
