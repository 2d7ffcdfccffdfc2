"""Decides what every step does. Plain Python: no torch, no clock, no threads."""

from __future__ import annotations

from collections import deque

from serve_app.engine.sequence import Advance, Sampled, Sequence, Step
from serve_app.engine.slots import SlotPool
from serve_app.errors import DeadlineExceeded, QueueFull, ServeAppError
from serve_app.types import TokenEvent


class Scheduler:
    """First come, first served, over a fixed number of slots.

    Every step decodes all sequences whose prompt is in the arena, and fills what is left of
    `max_step_tokens` with chunks of prompts, oldest first. A late arrival joins at the next step;
    a finished, expired or abandoned sequence leaves before it.
    """

    def __init__(self, slots: int, max_step_tokens: int, max_waiting: int) -> None:
        self._pool = SlotPool(slots)
        # Decode takes a row a sequence and always runs; prompts must be able to advance beside it.
        self._max_step_tokens = max(max_step_tokens, slots + 1)
        self._max_waiting = max_waiting
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def tokens_held(self) -> int:
        """Tokens whose keys and values are in the arena."""
        return sum(sequence.computed for sequence in self._running)

    def add(self, sequence: Sequence) -> ServeAppError | None:
        """Queue a sequence, or say why not."""
        # A free slot is nobody's to wait for: those in front of the queue take it before the next step.
        if len(self._waiting) >= self._max_waiting + self._pool.free:
            return QueueFull(f"{self._max_waiting} requests wait for a slot already; try again later", retry_after_s=1)
        self._waiting.append(sequence)
        return None

    def sweep(self, now: float) -> list[tuple[Sequence, ServeAppError]]:
        """Let go of sequences whose reader left (silently) or whose time is up (returned, with the reason)."""
        expired = [s for s in (*self._running, *self._waiting) if not s.stream.closed and now >= s.deadline]
        gone = {id(s) for s in expired}
        for sequence in [s for s in self._running if s.stream.closed or id(s) in gone]:
            self._release(sequence)
        self._waiting = deque(s for s in self._waiting if not s.stream.closed and id(s) not in gone)
        return [(s, DeadlineExceeded(_timeout_message(s))) for s in expired]

    def plan(self, now: float) -> Step:
        """The next step; empty when there is nothing to do."""
        self._admit()
        decoding = sorted((s for s in self._running if s.pending == 1), key=_slot)
        budget = self._max_step_tokens - len(decoding)
        advances = [Advance(s, 1) for s in decoding]
        for sequence in self._running:
            if sequence.pending > 1 and budget > 0:
                count = min(sequence.pending, budget)
                advances.append(Advance(sequence, count))
                budget -= count
        for advance in advances:
            if advance.sequence.stream.started is None:
                advance.sequence.stream.started = now
        return Step(tuple(advances))

    def commit(
        self, step: Step, sampled: list[Sampled | ServeAppError], now: float
    ) -> list[tuple[Sequence, TokenEvent | ServeAppError]]:
        """Take a step's tokens in; sequences that ended give their slot back."""
        outcomes = iter(sampled)
        news = []
        for advance in step.advances:
            sequence, samples = advance.sequence, advance.samples
            sequence.computed += advance.count
            if samples:
                outcome = next(outcomes)
                told = outcome if isinstance(outcome, ServeAppError) else sequence.accept(outcome, now)
                news.append((sequence, told))
                if isinstance(told, ServeAppError) or told.finish_reason is not None:
                    self._release(sequence)
        assert next(outcomes, None) is None, "the runner sampled more tokens than the step asked for"
        return news

    def fail(self, sequences: list[Sequence]) -> None:
        """Let go of the sequences of a step that could not be run or taken in; some may have ended in it."""
        for sequence in sequences:
            if sequence.slot is not None:
                self._release(sequence)

    def drain(self) -> list[Sequence]:
        """Let go of everything, for the end of the engine."""
        everyone = [*self._running, *self._waiting]
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()
        return everyone

    def check(self) -> None:
        """The slots in use are exactly those of the running sequences."""
        self._pool.check()
        assert self._pool.taken == len(self._running), "slot without a sequence"
        assert len({s.slot for s in self._running}) == len(self._running), "two sequences in one slot"

    def _admit(self) -> None:
        while self._waiting and self._pool.free:
            sequence = self._waiting.popleft()
            sequence.slot = self._pool.take()
            self._running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._running.remove(sequence)
        self._pool.give_back(sequence.slot)
        sequence.slot = None


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _timeout_message(sequence: Sequence) -> str:
    return (
        f"the request was not finished after {sequence.stream.request.timeout_s:.0f} s "
        f"({sequence.generated} tokens); ask for fewer tokens or try when the service is less busy"
    )
