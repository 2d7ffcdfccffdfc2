"""Decides what every step does. Plain Python: no torch, no clock, no threads."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.engines.native.kv_cache import BLOCK, Copy, KVCache
from serve_app.engines.native.sequence import Advance, Outcome, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.native.stream import Embedded, Token
from serve_app.errors import DeadlineExceeded, QueueFull, ServeAppError

# What a step says to a sequence's reader.
News = Token | Embedded | ServeAppError
# Beyond these rows a step takes longer, so that guesses would cost those who guess nothing.
_FREE_ROWS = 8
# A prompt advances by this much at least, however short the steps beside it are.
_LEAST_CHUNK = 16
# A prompt of no more tokens is one moment's delay, and cutting it up costs everybody 10 to 15 % of the tokens a second.
_SHORT = 128


@dataclass(slots=True)
class Counts:
    """Since the start. `cached_tokens` of `prompt_tokens` were there already; of `drafted` guesses `accepted` were."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Scheduler:
    """By priority, then first come, first served, over the slots and the memory of an arena.

    Every step decodes all sequences whose prompt is in the arena, and fills what is left of
    `max_step_tokens` with chunks of prompts, oldest first: of long ones as much as keeps the step
    within STRETCH of what it usually takes with everybody decoding. A late arrival joins at the next step; a
    finished, expired or abandoned sequence leaves before it. When memory runs out, of the sequences with the highest
    priority value the youngest gives its slot back, and is computed again in its turn. While few rows decode, each
    sequence's next tokens are guessed, at most `draft_tokens`, and checked in the same step.

    A prompt that is being computed is not computed a second time beside it: whoever has the same one waits until it
    is there to be copied, and is passed by meanwhile. Without `prefix_cache` only members of a group share. Whoever
    has rows of its prompt to read computes it afresh; others may have what it computed.
    """

    def __init__(
        self,
        arena: KVCache,
        max_step_tokens: int,
        max_waiting: int,
        pace: StepTimeModel | None = None,
        draft_tokens: int = 0,
        prefix_cache: bool = True,
    ) -> None:
        self._arena = arena
        # Decode takes a row a sequence and always runs; prompts must be able to advance beside it.
        self._max_step_tokens = max(max_step_tokens, arena.size + 1)
        self._max_waiting = max_waiting
        self._pace = pace
        self._draft_tokens = draft_tokens
        self._prefix_cache = prefix_cache
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = 0
        self._crowded = False
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
        """Tokens whose keys and values are in the arena."""
        return sum(sequence.computed for sequence in self._running)

    def add(self, sequence: Sequence) -> ServeAppError | None:
        """Queue a sequence, or say why not."""
        # A free slot is nobody's to wait for: those in front of the queue take it before the next step.
        if len(self._waiting) >= self._max_waiting + self._arena.free:
            return QueueFull(f"{self._max_waiting} requests wait for a slot already; try again later", retry_after_s=1)
        sequence.order = self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_turn)
        return None

    def sweep(self, now: float) -> list[tuple[Sequence, ServeAppError]]:
        """Let go of sequences whose reader left (silently) or whose time is up (returned, with the reason)."""
        expired = [s for s in (*self._running, *self._waiting) if not s.stream.closed and now >= s.deadline]
        gone = {id(s) for s in expired}
        for sequence in [s for s in self._running if s.stream.closed or id(s) in gone]:
            self._release(sequence)
        self._waiting = [s for s in self._waiting if not s.stream.closed and id(s) not in gone]
        return [(s, DeadlineExceeded(_timeout_message(s))) for s in expired]

    def plan(self, now: float) -> Step:
        """The next step; empty when there is nothing to do."""
        self._make_room()
        self._admit()
        decoding = sorted((s for s in self._running if s.pending == 1), key=_slot)
        advances = [self._decode(sequence, len(decoding)) for sequence in decoding]
        rows = sum(advance.rows for advance in advances)
        most, most_for_long = self._max_step_tokens, self._rows_beside(len(decoding))
        for sequence in self._running:
            count = min(sequence.pending, (most_for_long if sequence.long else most) - rows)
            if sequence.pending > 1 and count > 0:
                advances.append(Advance(sequence, count))
                rows += count
        for advance in advances:
            if advance.sequence.stream.started is None:
                advance.sequence.stream.started = now
        return Step(tuple(advances), self._arena.orders())

    def commit(self, step: Step, outcomes: list[Outcome], now: float) -> list[tuple[Sequence, News]]:
        """Take a step's tokens in; sequences that ended give their slot back."""
        left = iter(outcomes)
        news: list[tuple[Sequence, News]] = []
        for advance in step.advances:
            sequence, completes = advance.sequence, advance.completes
            sequence.computed += advance.count
            if completes and sequence.embeds:
                self._release(sequence)
                news.append((sequence, sequence.embedded()))
            elif completes:
                news += [(sequence, told) for told in self._accept(advance, next(left), now)]
        assert next(left, None) is None, "the runner sampled for more sequences than the step asked for"
        return news

    def record(self, step: Step, seconds: float) -> None:
        """Learn how long steps take."""
        if self._pace is not None:
            self._pace.record(step.rows, seconds)

    def fail(self, step: Step) -> list[Sequence]:
        """Let go of the sequences of a step that could not be run or taken in, and say which.

        Some may have ended in it; those whose beginning it was to copy are among them. What their slots hold now,
        nobody knows.
        """
        members = [advance.sequence for advance in step.advances]
        targets = {order.target for order in step.orders if isinstance(order, Copy)}
        members += [s for s in self._running if s.slot in targets and s not in members]
        for sequence in members:
            if sequence.slot is not None:
                self._release(sequence, keep=False)
        self._arena.undone(step.orders)
        return members

    def drain(self) -> list[Sequence]:
        """Let go of everything, for the end of the engine."""
        everyone = [*self._running, *self._waiting]
        for sequence in list(self._running):
            self._release(sequence)
        self._waiting.clear()
        return everyone

    def check(self) -> None:
        """The slots in use are exactly those of the running sequences."""
        self._arena.check()
        assert self._arena.taken == len(self._running), "slot without a sequence"
        assert len({s.slot for s in self._running}) == len(self._running), "two sequences in one slot"

    def _make_room(self) -> None:
        """Memory for every decoding sequence's next token, whose turn is first first, at the cost of the last."""
        for sequence in sorted(self._running, key=_turn):
            while sequence.slot is not None and not self._arena.grow(sequence.slot, len(sequence.tokens) + 1):
                self._preempt(max(self._running, key=_turn))

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence, keep=False)
        sequence.computed = 0
        insort(self._waiting, sequence, key=_turn)
        self._crowded = True
        self.counts.preemptions += 1

    def _admit(self) -> None:
        """As long as there are slots and memory.

        After a preemption not before somebody has left, or the same would be computed again and again.
        """
        for sequence in tuple(self._waiting):
            if not self._arena.free or (self._crowded and self._running):
                return
            if self._awaits_another(sequence):
                continue
            taken = self._arena.take(sequence.tokens, self._salt(sequence), afresh=sequence.unread)
            if taken is None:
                return
            self._waiting.remove(sequence)
            sequence.slot, sequence.computed = taken
            sequence.long = sequence.pending > _SHORT
            self._running.append(sequence)
            if sequence.stream.started is None:
                sequence.stream.cached_tokens = sequence.computed
                self.counts.prompt_tokens += sequence.prompt_len
                self.counts.cached_tokens += sequence.computed

    def _awaits_another(self, sequence: Sequence) -> bool:
        """Whether its prompt is being computed by another right now, and will be there further than it is.

        Ends with the other's first token, or when that one leaves in whatever way: then the next computes it.
        """
        salt, length = self._salt(sequence), sequence.prompt_len
        if salt is None or sequence.unread:
            return False
        same = any(
            not other.generated
            and other.prompt_len == length
            and self._salt(other) == salt
            and other.tokens[:length] == sequence.tokens[:length]
            for other in self._running
        )
        return same and self._arena.shared(sequence.tokens, salt) < (length - 1) // BLOCK * BLOCK

    def _salt(self, sequence: Sequence) -> str | None:
        """Those who have the same may share what is computed; None shares nothing."""
        request = sequence.stream.request
        return request.cache_salt if self._prefix_cache else request.group or None

    def _decode(self, sequence: Sequence, decoding: int) -> Advance:
        guesses = min(self._draft_tokens, _FREE_ROWS // decoding - 1)
        if guesses <= 0:
            return Advance(sequence, 1)
        drafts = sequence.drafts(guesses)
        if drafts and not self._arena.grow(_slot(sequence), len(sequence.tokens) + len(drafts)):
            drafts = ()
        return Advance(sequence, 1, drafts)

    def _rows_beside(self, decoding: int) -> int:
        """The most rows of the next step, if a long prompt is among them."""
        if self._pace is None or not decoding:
            return self._max_step_tokens
        rows = self._pace.most_rows(len(self._running)) or self._max_step_tokens
        return min(self._max_step_tokens, max(rows, decoding + _LEAST_CHUNK))

    def _accept(self, advance: Advance, outcome: Outcome, now: float) -> Iterator[Token | ServeAppError]:
        """The step's tokens of one sequence, as far as its drafts were right."""
        sequence = advance.sequence
        if isinstance(outcome, ServeAppError):
            self._release(sequence)
            yield outcome
            return
        right = 0
        for number, sampled in enumerate(outcome):
            token = sequence.accept(sampled, now)
            yield token
            if token.finish_reason is not None:
                self._release(sequence)
                break
            if advance.drafts[number : number + 1] != (sampled.token_id,):
                break
            sequence.computed += 1
            right += 1
        if advance.drafts:
            sequence.drafter.learn(len(advance.drafts), right, len(sequence.tokens))
            self.counts.drafted += len(advance.drafts)
            self.counts.accepted += right
        if sequence.slot is not None and sequence.generated == right + 1:
            self._arena.publish(sequence.slot, sequence.tokens, sequence.prompt_len)

    def _release(self, sequence: Sequence, keep: bool = True) -> None:
        """Take the slot back; `keep` what it holds for prompts that begin alike."""
        slot = _slot(sequence)
        self._running.remove(sequence)
        if keep:
            self._arena.give_back(slot, sequence.tokens, sequence.computed)
        else:
            self._arena.drop(slot)
        sequence.slot = None
        self._crowded = False


def _turn(sequence: Sequence) -> tuple[int, int]:
    """Who comes first: the lowest priority value, then whoever arrived first."""
    return sequence.stream.request.priority, sequence.order


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _timeout_message(sequence: Sequence) -> str:
    return (
        f"the request was not finished after {sequence.stream.request.timeout_s:.0f} s "
        f"({sequence.generated} tokens); ask for fewer tokens or try when the service is less busy"
    )
