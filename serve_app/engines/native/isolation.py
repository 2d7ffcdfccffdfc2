"""Computes a step so that a failure ends only the sequences that cause it. Plain Python: no torch, no threads."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.engines.native.failure import cause_of
from serve_app.engines.native.kv_cache import CacheOp, Copy
from serve_app.engines.native.sequence import Advance, Outcome, Sequence, Step
from serve_app.engines.protocol import Cause

logger = logging.getLogger(__name__)

# The most forward passes of one step. It suffices to find every failing sequence among 32: 63 passes, of which 32 are
# of one sequence and repeated.
MAX_PASSES = 96


class Passes(Protocol):
    """The part of a Runner that computes."""

    def apply(self, op: CacheOp) -> None: ...

    def run(self, step: Step) -> list[Outcome]: ...

    def free_memory(self) -> None: ...


@dataclass(slots=True)
class StepResult:
    """What a step computed: `step` has the advances that succeeded, with one of `outcomes` for each that samples.

    `failed` are the sequences that cannot be computed. The cache operations `undone` failed: a sequence whose slot was
    to be filled by one of them is in none of the other fields. `failures` counts the failed forward passes and cache
    operations by cause.
    """

    step: Step = field(default_factory=lambda: Step(()))
    outcomes: list[Outcome] = field(default_factory=list)
    failed: list[tuple[Sequence, Cause]] = field(default_factory=list)
    undone: list[CacheOp] = field(default_factory=list)
    failures: Counter[Cause] = field(default_factory=Counter)


def compute(runner: Passes, step: Step, begin_pass: Callable[[int], None]) -> StepResult:
    """Execute the cache operations of a step, then compute its advances.

    When the forward pass fails, each half of the advances is computed alone, and so on, until the advances are known
    that fail alone. A pass of one sequence is repeated once, or, if memory was full, with fewer tokens: without drafts,
    then with half of the prompt chunk. The order is fixed, and a step takes at most MAX_PASSES passes: what is not
    computed then has failed. A pass can be repeated because it only writes to the positions of its own rows.

    `begin_pass` is called with the number of rows before each pass. Raises KeyboardInterrupt and SystemExit.
    """
    result = StepResult()
    missing = _execute_ops(runner, step.cache_ops, result)
    advances = step.advances
    if missing:
        advances = tuple(advance for advance in advances if advance.sequence.slot not in missing)
    if advances:
        _Isolation(runner, begin_pass, result).compute(advances)
    return result


def _execute_ops(runner: Passes, ops: tuple[CacheOp, ...], result: StepResult) -> set[int]:
    """Execute the operations one by one. Returns the slots that lack the content of a failed copy."""
    for op in ops:
        try:
            runner.apply(op)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            logger.exception("%s failed", op)
            result.failures[cause_of(error)] += 1
            result.undone.append(op)
    return {op.target for op in result.undone if isinstance(op, Copy)}


class _Isolation:
    def __init__(self, runner: Passes, begin_pass: Callable[[int], None], result: StepResult) -> None:
        self._runner = runner
        self._begin_pass = begin_pass
        self._result = result
        self._passes = 0

    def compute(self, advances: tuple[Advance, ...], repeated: bool = False) -> None:
        """Compute the advances, or as many of them as possible. `repeated`: the same pass has failed before."""
        cause = self._failed_pass(advances)
        if cause is None:
            return
        parts = _parts(advances, cause, repeated)
        if not parts or self._passes >= MAX_PASSES:
            self._result.failed += [(advance.sequence, cause) for advance in advances]
            return
        if cause is Cause.MEMORY:
            self._runner.free_memory()
        for part in parts:
            self.compute(part, repeated=part == advances)

    def _failed_pass(self, advances: tuple[Advance, ...]) -> Cause | None:
        """Run one forward pass; the cause if it failed. Frees the exception, which holds the tensors of the pass."""
        result, step = self._result, Step(advances)
        if self._passes >= MAX_PASSES:
            return max(result.failures, key=result.failures.__getitem__)
        self._passes += 1
        self._begin_pass(step.rows)
        try:
            outcomes = self._runner.run(step)
            if len(outcomes) != sum(advance.samples for advance in advances):
                raise RuntimeError(f"the runner returned {len(outcomes)} outcomes for {len(advances)} advances")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            ids = ", ".join(advance.sequence.stream.request.id for advance in advances)
            first = not result.failures  # one traceback a step
            logger.error("a pass of %d rows failed: %r; requests: %s", step.rows, error, ids, exc_info=first)
            cause = cause_of(error)
            result.failures[cause] += 1
            return cause
        if result.step.advances:
            result.step, result.outcomes = Step(result.step.advances + advances), result.outcomes + outcomes
        else:
            result.step, result.outcomes = step, outcomes
        return None


def _parts(advances: tuple[Advance, ...], cause: Cause, repeated: bool) -> list[tuple[Advance, ...]]:
    """The advances to compute instead of these, which failed together; none if nothing smaller is left to try."""
    if len(advances) > 1:
        middle = len(advances) // 2
        return [advances[:middle], advances[middle:]]
    (advance,) = advances
    if cause is Cause.MEMORY and advance.drafts:
        return [(Advance(advance.sequence, advance.count),)]
    if cause is Cause.MEMORY and advance.count > 1:
        return [(Advance(advance.sequence, advance.count // 2),)]
    return [] if repeated else [advances]
