"""Decides the content of every step. Plain Python: no torch, no clock, no threads."""

from __future__ import annotations

import logging
from bisect import insort
from collections.abc import Iterator, Sequence as Seq
from dataclasses import dataclass

from serve_app.engines.ending import expired_error
from serve_app.engines.native.failure import Failure, failure
from serve_app.engines.native.kv_cache import BLOCK, CacheOp, Copy, KVCache
from serve_app.engines.native.sequence import Advance, Outcome, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.protocol import Cause
from serve_app.engines.stream import Embedding, Token
from serve_app.errors import QueueFull, ServeAppError

logger = logging.getLogger(__name__)

# What a step, or the end of a sequence, sends to its stream.
Result = Token | Embedding | ServeAppError | Failure
# With more rows a step takes longer, and drafts would cost more than they save.
_MAX_DRAFT_ROWS = 8
# A long prompt advances by at least this many tokens a step, however short the step has to be.
_MIN_CHUNK = 16
# A prompt of at most this many tokens delays running sequences only once. Splitting it would cost all of them 10 to
# 15 % of their tokens per second.
_SHORT_PROMPT = 128


@dataclass(slots=True)
class Counts:
    """Counters since the start.

    `cached_tokens` of `prompt_tokens` came from the prefix cache; `accepted` of `drafted` tokens were right.
    """

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Scheduler:
    """Continuous batching over the slots and the memory of a KV cache, by priority and then by arrival.

    Every step decodes all sequences whose prompt is computed and fills the rest of `max_step_tokens` with prompt
    chunks, oldest first. Chunks of long prompts are limited so that the step takes at most MAX_SLOWDOWN times as long
    as a step in which all sequences decode. A new sequence joins at the next step; a finished, expired or cancelled
    one leaves before it. When memory runs out, the youngest of the sequences with the highest priority value is
    preempted: it gives its slot back and is computed again in its turn. While few sequences decode, each proposes up
    to `draft_tokens` draft tokens, which the same step verifies.

    A prompt is not computed twice at the same time: a sequence with the prompt of a running prefill waits until it can
    copy the result, and later sequences may pass it. Without `prefix_cache` only members of a group share. A sequence
    with a readout computes its prompt itself; others may copy from it.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        max_step_tokens: int,
        max_waiting: int,
        step_times: StepTimeModel | None = None,
        draft_tokens: int = 0,
        prefix_cache: bool = True,
    ) -> None:
        self._kv_cache = kv_cache
        # Every decoding sequence takes a row of every step; prompts must be able to advance beside them.
        self._max_step_tokens = max(max_step_tokens, kv_cache.size + 1)
        self._max_waiting = max_waiting
        self._step_times = step_times
        self._draft_tokens = draft_tokens
        self._prefix_cache = prefix_cache
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = 0
        self._memory_full = False
        self.counts = Counts()

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
        """The number of tokens of running sequences whose keys and values are in the KV cache."""
        return sum(sequence.computed for sequence in self._running)

    def add(self, sequence: Sequence) -> ServeAppError | None:
        """Queue a sequence, or return why it is refused."""
        # The first sequences of the queue take the free slots before the next step, so that they do not count.
        if len(self._waiting) >= self._max_waiting + self._kv_cache.free_slots:
            return QueueFull(f"{self._max_waiting} requests already wait for a slot; try again later", retry_after_s=1)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_priority)
        return None

    def remove_ended(self, now: float) -> list[tuple[Sequence, ServeAppError]]:
        """Remove the sequences whose stream is closed or whose deadline has passed; return the latter, with errors."""
        expired = [s for s in (*self._running, *self._waiting) if not s.stream.closed and now >= s.deadline]
        expired_ids = {id(s) for s in expired}
        for sequence in [s for s in self._running if s.stream.closed or id(s) in expired_ids]:
            self._release(sequence)
        self._waiting = [s for s in self._waiting if not s.stream.closed and id(s) not in expired_ids]
        return [(s, expired_error(s.stream.request, s.generated)) for s in expired]

    def plan(self, now: float) -> Step:
        """The next step; empty if no sequence can advance."""
        self._grow_running()
        self._admit()
        decoding = sorted((s for s in self._running if s.pending == 1), key=_slot)
        advances = [self._decode(sequence, len(decoding)) for sequence in decoding]
        rows = sum(advance.rows for advance in advances)
        max_rows, max_rows_long = self._max_step_tokens, self._max_rows_with_long_prompt(len(decoding))
        for sequence in self._running:
            count = min(sequence.pending, (max_rows_long if sequence.long_prompt else max_rows) - rows)
            if sequence.pending > 1 and count > 0:
                advances.append(Advance(sequence, count))
                rows += count
        for advance in advances:
            if advance.sequence.stream.started is None:
                advance.sequence.stream.started = now
        return Step(tuple(advances), self._kv_cache.take_ops())

    def commit(self, step: Step, outcomes: list[Outcome], now: float) -> list[tuple[Sequence, Result]]:
        """Apply the outcomes of a step, one for each advance that samples, and return the results for each stream.

        Ended sequences free their slot. An exception of one sequence, for example of its grammar, fails only this one.
        """
        remaining = iter(outcomes)
        results: list[tuple[Sequence, Result]] = []
        for advance in step.advances:
            sequence, completes = advance.sequence, advance.completes
            try:
                sequence.computed += advance.count
                if completes and sequence.embeds:
                    results.append((sequence, self._embed(sequence)))
                elif completes:
                    results += [(sequence, result) for result in self._accept(advance, next(remaining), now)]
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # a panic of a Rust extension is a BaseException
                logger.exception("the result of request %s cannot be used", sequence.stream.request.id)
                self.fail([sequence])
                results.append((sequence, failure(Cause.ERROR)))
        assert next(remaining, None) is None, "the runner sampled for more sequences than the step has"
        return results

    def record(self, step: Step, seconds: float) -> None:
        """Learn the time of a step."""
        if self._step_times is not None:
            self._step_times.record(step.rows, seconds)

    def fail(self, sequences: Seq[Sequence]) -> None:
        """Remove sequences that cannot be computed. The content of their slots is unknown and is discarded."""
        for sequence in sequences:
            if sequence.slot is not None:
                self._release(sequence, keep=False)

    def undo(self, ops: Seq[CacheOp]) -> None:
        """Take back cache operations that failed.

        A sequence whose slot lacks copied content is computed again in its turn, without copies. Memory that was not
        freed is freed before the next step.
        """
        targets = {op.target for op in ops if isinstance(op, Copy)}
        for sequence in [s for s in self._running if s.slot in targets]:
            sequence.copies = False
            self._requeue(sequence)
        self._kv_cache.restore_trims(ops)

    def drain(self) -> list[Sequence]:
        """Remove and return all sequences, when the engine stops."""
        sequences = [*self._running, *self._waiting]
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()
        return sequences

    def check_slots(self) -> None:
        """Assert in constant time that the number of used slots is the number of running sequences."""
        assert self._kv_cache.used_slots == len(self._running), "used slots do not match running sequences"

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to the KV cache, so that only tests call it."""
        self.check_slots()
        self._kv_cache.check()
        assert len({s.slot for s in self._running}) == len(self._running), "two sequences in one slot"

    def _grow_running(self) -> None:
        """Reserve memory for the next token of every running sequence; preempt the last ones if it is not enough."""
        for sequence in sorted(self._running, key=_priority):
            while sequence.slot is not None and not self._kv_cache.grow(sequence.slot, len(sequence.tokens) + 1):
                self._preempt(max(self._running, key=_priority))

    def _preempt(self, sequence: Sequence) -> None:
        self._requeue(sequence)
        self._memory_full = True
        self.counts.preemptions += 1

    def _requeue(self, sequence: Sequence) -> None:
        """Take the slot of a sequence, which is computed again in its turn."""
        self._release(sequence, keep=False)
        sequence.computed = 0
        insort(self._waiting, sequence, key=_priority)

    def _admit(self) -> None:
        """Give slots to waiting sequences while there are slots and memory.

        After a preemption no sequence is admitted until another one has left, because the admitted sequence would be
        preempted and computed again and again.
        """
        for sequence in tuple(self._waiting):
            if not self._kv_cache.free_slots or (self._memory_full and self._running):
                return
            if self._waits_for_prefill(sequence):
                continue
            allocated = self._kv_cache.allocate(sequence.tokens, self._salt(sequence), reuse=sequence.may_copy)
            if allocated is None:
                return
            self._waiting.remove(sequence)
            sequence.slot, sequence.computed = allocated
            sequence.long_prompt = sequence.pending > _SHORT_PROMPT
            self._running.append(sequence)
            if sequence.stream.started is None:
                sequence.stream.cached_tokens = sequence.computed
                self.counts.prompt_tokens += sequence.prompt_len
                self.counts.cached_tokens += sequence.computed

    def _waits_for_prefill(self, sequence: Sequence) -> bool:
        """Whether a running sequence computes the same prompt and will have more of it than the cache has now.

        Ends with the first token of the running sequence. If that sequence leaves earlier, the next one computes the
        prompt.
        """
        salt, length = self._salt(sequence), sequence.prompt_len
        if salt is None or not sequence.may_copy:
            return False
        same = any(
            not other.generated
            and other.prompt_len == length
            and self._salt(other) == salt
            and other.tokens[:length] == sequence.tokens[:length]
            for other in self._running
        )
        return same and self._kv_cache.cached_tokens(sequence.tokens, salt) < (length - 1) // BLOCK * BLOCK

    def _salt(self, sequence: Sequence) -> str | None:
        """Sequences with the same salt may share computed tokens; None shares nothing."""
        if self._prefix_cache:
            return sequence.salt
        group = sequence.stream.request.group
        return f"{group}\0{sequence.salt}" if group else None

    def _decode(self, sequence: Sequence, decoding: int) -> Advance:
        count = min(self._draft_tokens, _MAX_DRAFT_ROWS // decoding - 1)
        if count <= 0:
            return Advance(sequence, 1)
        drafts = sequence.propose_drafts(count)
        if drafts and not self._kv_cache.grow(_slot(sequence), len(sequence.tokens) + len(drafts)):
            drafts = ()
        return Advance(sequence, 1, drafts)

    def _max_rows_with_long_prompt(self, decoding: int) -> int:
        """The most rows of the next step if it has a chunk of a long prompt."""
        if self._step_times is None or not decoding:
            return self._max_step_tokens
        rows = self._step_times.max_rows(len(self._running)) or self._max_step_tokens
        return min(self._max_step_tokens, max(rows, decoding + _MIN_CHUNK))

    def _embed(self, sequence: Sequence) -> Embedding | Failure:
        vector = sequence.embedding()
        self._release(sequence, keep=isinstance(vector, Embedding))
        return vector

    def _accept(self, advance: Advance, outcome: Outcome, now: float) -> Iterator[Token | ServeAppError | Failure]:
        """The tokens of one sequence in this step, up to the first draft that is wrong."""
        sequence = advance.sequence
        if isinstance(outcome, ServeAppError | Failure):
            # Keys and values with NaN must not be shared.
            self._release(sequence, keep=not isinstance(outcome, Failure))
            yield outcome
            return
        accepted = 0
        for number, sampled in enumerate(outcome):
            token = sequence.accept(sampled, now)
            yield token
            if token.finish_reason is not None:
                self._release(sequence)
                break
            if advance.drafts[number : number + 1] != (sampled.token_id,):
                break
            sequence.computed += 1
            accepted += 1
        if advance.drafts:
            sequence.drafter.record(len(advance.drafts), accepted, len(sequence.tokens))
            self.counts.drafted += len(advance.drafts)
            self.counts.accepted += accepted
        if sequence.slot is not None and sequence.generated == accepted + 1:
            self._kv_cache.publish(sequence.slot, sequence.tokens, sequence.prompt_len)

    def _release(self, sequence: Sequence, keep: bool = True) -> None:
        """Free the slot; `keep` its content for later prompts with the same beginning."""
        slot = _slot(sequence)
        self._running.remove(sequence)
        if keep:
            self._kv_cache.free(slot, sequence.tokens, sequence.computed)
        else:
            self._kv_cache.discard(slot)
        sequence.slot = None
        self._memory_full = False


def _priority(sequence: Sequence) -> tuple[int, int]:
    """The sort key of sequences: the lowest priority value first, then the earliest arrival."""
    return sequence.stream.request.priority, sequence.arrival


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
