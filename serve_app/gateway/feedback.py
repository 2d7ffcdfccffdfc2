"""Remembers which model and variant answered the latest calls, so that feedback can be counted for them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.core.experiments import Assignment

MAX_CALLS = 20_000
KEEP_S = 86_400.0


@dataclass(slots=True)
class AnsweredCall:
    """A call at `at`, and the last score that it got. `identity` is that of its experiment, "" without one."""

    at: float
    model: str
    assignment: Assignment | None
    identity: str
    score: float | None = None


class AnsweredCalls:
    """The latest MAX_CALLS calls by their tenant and request id, for KEEP_S seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: OrderedDict[tuple[str, str], AnsweredCall] = OrderedDict()

    def add(self, call: tuple[str, str], model: str, assignment: Assignment | None, identity: str) -> None:
        """Remember a call by its tenant and request id. Of two with one id the later counts."""
        self._calls[call] = AnsweredCall(self._clock(), model, assignment, identity)
        self._calls.move_to_end(call)
        while len(self._calls) > MAX_CALLS or self._is_old(next(iter(self._calls.values()))):
            self._calls.popitem(last=False)

    def find(self, call: tuple[str, str]) -> AnsweredCall | None:
        found = self._calls.get(call)
        return None if found is None or self._is_old(found) else found

    def _is_old(self, call: AnsweredCall) -> bool:
        return call.at < self._clock() - KEEP_S
