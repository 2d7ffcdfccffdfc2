from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve_app.config import NativeOptions
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.failure import Failure, failure
from serve_app.engines.native.isolation import MAX_PASSES, compute
from serve_app.engines.native.kv_cache import BLOCK, Copy, KVCache, Trim
from serve_app.engines.native.scheduler import Result, Scheduler, _priority
from serve_app.engines.native.sequence import Sampled, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.protocol import Cause
from serve_app.engines.stream import Embedding, Token
from serve_app.engines.toy import ToyRunner
from serve_app.errors import DeadlineExceeded, QueueFull

from .helpers import FakeCacheRunner, Faults, FaultyCacheRunner, Panic, next_token, request, sequence, sequences

RUNNER = ToyRunner(NativeOptions())
MIN_CHUNK = 16
# Two prompts with a common beginning, and a third one.
TEXTS = ["abc" * 50, "abc" * 20 + "dea" * 30, "cab" * 50]
SHAPES = st.tuples(
    st.integers(0, 2),
    st.integers(1, 110),
    st.integers(1, 40),
    st.integers(3, 90),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([0, 0, -1, 2]),
    st.sampled_from(["", "", "logprobs", "embedding"]),
)
Shape = tuple[int, int, int, int, str, int, str]


def make(prompt: str, tokens: int) -> Sequence:
    return sequence(prompt, SamplingParams(max_tokens=tokens), context=1000)


def scheduler_of(
    slots: int,
    rows: int,
    queue: int,
    tokens: int | None = None,
    step_times: StepTimeModel | None = None,
    draft_tokens: int = 0,
    prefix_cache: bool = True,
) -> Scheduler:
    return Scheduler(KVCache(slots, tokens or slots * 1024), rows, queue, step_times, draft_tokens, prefix_cache)


def with_priority(prompt: str, priority: int, tokens: int = 1) -> Sequence:
    base = request(prompt, params=SamplingParams(max_tokens=tokens))
    return sequences([replace(base, priority=priority)], context=1000)[0]


def answers_to(prompt: str, tokens: int, count: int, group: str = "g", salt: str = "") -> list[Sequence]:
    """Sequences of several answers to one prompt."""
    base = replace(request(prompt, params=SamplingParams(max_tokens=tokens)), group=group, cache_salt=salt)
    return sequences([replace(base, index=index) for index in range(count)], context=1000)


def add(scheduler: Scheduler, *added: Sequence) -> None:
    assert [scheduler.add(s) for s in added] == [None] * len(added)


def run_step(scheduler: Scheduler, now: float = 0.0) -> tuple[Step, list[tuple[Sequence, Result]]]:
    step = scheduler.plan(now)
    return step, scheduler.commit(step, RUNNER.run(step), now)


def counts(step: Step) -> list[tuple[int | None, int]]:
    """Slot and number of tokens of every advance."""
    return [(advance.sequence.slot, advance.count) for advance in step.advances]


def test_an_idle_scheduler_plans_an_empty_step() -> None:
    scheduler = scheduler_of(2, 8, 8)
    assert scheduler.plan(0).advances == ()
    assert scheduler.idle


def test_a_short_prompt_is_prefilled_in_one_step_and_then_decoded() -> None:
    scheduler = scheduler_of(2, 8, 8)
    add(scheduler, make("abcd", 3))
    steps = [counts(run_step(scheduler)[0]) for _ in range(1)]
    held = scheduler.tokens_held
    steps += [counts(scheduler.plan(0))]
    assert steps == [[(0, 4)], [(0, 1)]]
    assert held == 4


def test_a_long_prompt_is_split_and_sampled_after_its_last_chunk() -> None:
    scheduler = scheduler_of(1, 4, 8)
    add(scheduler, make("abcdefghij", 1))
    rows, results = [], []
    while not scheduler.idle:
        step, events = run_step(scheduler)
        rows.append(step.rows)
        results.append(len(events))
    assert rows == [4, 4, 2]
    assert results == [0, 0, 1]


def test_a_long_prompt_does_not_starve_decoding_sequences() -> None:
    scheduler = scheduler_of(2, 8, 8)
    decoder, long = make("a", 40), make("x" * 100, 1)
    add(scheduler, decoder, long)
    for step_number in range(1, 15):
        step, events = run_step(scheduler)
        assert (decoder, 1) in [(advance.sequence, advance.count) for advance in step.advances]
        assert decoder.generated == step_number
        assert step.rows <= 8
        assert len(events) == 1
    assert long.computed == 14 * 7


def test_a_prompt_advances_even_if_the_row_limit_is_below_the_slots() -> None:
    """The scheduler raises max_step_tokens from 1 to one row more than there are slots."""
    scheduler = scheduler_of(3, 1, 8)
    add(scheduler, make("a", 90), make("b", 90), make("x" * 20, 1))
    run_step(scheduler)
    assert [count for _, count in counts(scheduler.plan(0))] == [1, 1, 2]


def test_a_prompt_beyond_the_row_limit_waits_in_its_slot() -> None:
    scheduler = scheduler_of(2, 4, 8)
    add(scheduler, make("abcdef", 1), make("xyz", 1))
    assert counts(run_step(scheduler)[0]) == [(0, 4)]
    step, _ = run_step(scheduler)
    assert [advance.count for advance in step.advances] == [2, 2]


def test_decoding_sequences_come_first_in_slot_order() -> None:
    scheduler = scheduler_of(3, 64, 8)
    first, second = make("a", 1), make("b", 9)
    add(scheduler, first, second)
    run_step(scheduler)
    add(scheduler, make("c", 9), make("long one", 9))
    run_step(scheduler)
    assert counts(scheduler.plan(0)) == [(0, 1), (1, 1), (2, 1)]
    assert second.slot == 1


def test_a_new_sequence_takes_the_slot_of_a_finished_one_at_the_next_step() -> None:
    scheduler = scheduler_of(1, 64, 8)
    first, late = make("a", 1), make("b", 1)
    add(scheduler, first, late)
    assert [s for s, _ in run_step(scheduler)[1]] == [first]
    assert [s for s, _ in run_step(scheduler)[1]] == [late]
    scheduler.check()
    assert scheduler.idle


def test_a_sequence_beyond_the_queue_is_refused() -> None:
    scheduler = scheduler_of(1, 64, 2)
    add(scheduler, make("a", 9), make("b", 9), make("c", 9))
    refusal = scheduler.add(make("d", 9))
    assert isinstance(refusal, QueueFull)
    assert refusal.message == "2 requests already wait for a slot; try again later"
    assert refusal.retry_after_s == 1
    run_step(scheduler)
    assert isinstance(scheduler.add(make("e", 9)), QueueFull)
    assert (scheduler.running, scheduler.waiting) == (1, 2)


def test_free_slots_add_to_the_size_of_the_queue() -> None:
    scheduler = scheduler_of(4, 64, 1)
    add(scheduler, *(make("a", 9) for _ in range(5)))
    run_step(scheduler)
    assert (scheduler.running, scheduler.waiting) == (4, 1)


def test_the_start_of_a_sequence_is_recorded_once() -> None:
    scheduler = scheduler_of(1, 64, 8)
    first, second = make("a", 2), make("b", 1)
    add(scheduler, first, second)
    for now in (5.0, 6.0, 7.0):
        run_step(scheduler, now)
    assert (first.stream.started, second.stream.started) == (5.0, 7.0)


def test_cancelled_sequences_are_removed_without_an_error() -> None:
    scheduler = scheduler_of(1, 64, 8)
    add(scheduler, make("a", 9), make("b", 9), make("c", 9))
    run_step(scheduler)
    running, waiting, staying = (*scheduler._running, *scheduler._waiting)
    running.stream.close()
    waiting.stream.close()
    assert scheduler.remove_ended(0) == []
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [staying]


def test_expired_sequences_are_removed_with_an_error() -> None:
    scheduler = scheduler_of(1, 64, 8)
    running, waiting = sequence("a", timeout_s=5), sequence("b", timeout_s=5)
    remaining, cancelled = sequence("c"), sequence("d", timeout_s=5)
    add(scheduler, running, waiting, remaining, cancelled)
    run_step(scheduler)
    cancelled.stream.close()
    assert scheduler.remove_ended(4.9) == []
    expired = scheduler.remove_ended(5.0)
    assert [s for s, _ in expired] == [running, waiting]
    assert all(isinstance(error, DeadlineExceeded) for _, error in expired)
    assert "not finished after 5 s (1 tokens)" in expired[0][1].message
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [remaining]


def test_a_failed_sequence_frees_its_slot_and_the_others_continue() -> None:
    scheduler = scheduler_of(2, 64, 8)
    ended, broken, later = make("a", 1), make("b", 9), make("c", 1)
    add(scheduler, ended, broken, later)
    step = scheduler.plan(0)
    scheduler.commit(Step(step.advances[:1]), [(Sampled(1),)], 0)
    scheduler.fail([ended, broken])
    scheduler.check()
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [later]


def test_the_tokens_of_a_failed_sequence_are_not_shared() -> None:
    """Its keys and values may hold NaN."""
    scheduler, runner = scheduler_of(2, 256, 8), FakeCacheRunner(2)
    poisoned, same = answers_to("a" * 100, 9, 2)
    add(scheduler, poisoned)
    step = scheduler.plan(0)
    runner.run(step)
    ((_, result),) = scheduler.commit(step, [failure(Cause.NOT_FINITE)], 0)
    assert isinstance(result, Failure)
    add(scheduler, same)
    assert scheduler.plan(0).rows == 100
    scheduler.check()


class FailingEnding:
    """Raises at the end of a grammar, as a panic of a Rust extension."""

    max_tokens = 9
    end_ids = frozenset[int]()
    constraint = None

    def reason(self, token_id: int, generated: int) -> tuple[None, bool]:
        raise Panic


def test_an_exception_when_a_token_is_accepted_fails_only_its_sequence() -> None:
    scheduler = scheduler_of(2, 64, 8)
    broken, healthy = make("a", 9), make("b", 9)
    broken.ending = FailingEnding()  # type: ignore[assignment]
    add(scheduler, broken, healthy)
    (_, failed), (_, token) = scheduler.commit(scheduler.plan(0), [(Sampled(1),), (Sampled(2),)], 0)
    assert isinstance(failed, Failure)
    assert isinstance(token, Token)
    scheduler.check()
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [healthy]


def test_more_outcomes_than_sampling_sequences_are_an_error() -> None:
    scheduler = scheduler_of(1, 64, 8)
    add(scheduler, make("a", 9))
    with pytest.raises(AssertionError, match="sampled for more sequences"):
        scheduler.commit(scheduler.plan(0), [(Sampled(1),), (Sampled(2),)], 0)


def test_draining_returns_all_sequences_in_order() -> None:
    scheduler = scheduler_of(1, 64, 8)
    all_sequences = [make("a", 9), make("b", 9), make("c", 9)]
    add(scheduler, *all_sequences)
    run_step(scheduler)
    assert scheduler.drain() == all_sequences
    assert scheduler.idle
    scheduler.check()


def test_chunks_of_a_long_prompt_keep_the_step_time_in_its_bound() -> None:
    """A step takes 10 ms and 1 ms for each row: the bound of 1.9 times 12 ms allows only the smallest chunk."""
    step_times = StepTimeModel()
    scheduler = scheduler_of(2, 512, 8, step_times=step_times)
    running, long = make("a", 90), make("x" * 300, 1)
    add(scheduler, running)
    chunks = []
    for number in range(60):
        if number == 20:
            add(scheduler, long)
        step, _ = run_step(scheduler)
        scheduler.record(step, 0.010 + 0.001 * step.rows)
        chunks.append(step.rows - 1)
    assert sum(chunks) == 300
    assert max(chunks[22:]) <= 16, "the first chunks are larger because the model has to learn the cost of a row"


def test_a_prompt_takes_all_rows_if_no_sequence_decodes() -> None:
    step_times = StepTimeModel()
    scheduler = scheduler_of(2, 512, 8, step_times=step_times)
    step_times.record(1, 0.01)
    step_times.record(100, 1.0)
    add(scheduler, make("x" * 600, 1))
    assert [run_step(scheduler)[0].rows for _ in range(2)] == [512, 88]


def test_without_memory_the_youngest_sequence_is_preempted_and_recomputed() -> None:
    scheduler = scheduler_of(3, 512, 8, tokens=4 * BLOCK)
    first, second, third = (make(letter * 30, 40) for letter in "abc")
    add(scheduler, first, second, third)
    runner = FakeCacheRunner(3)
    order = []
    for _ in range(200):
        step = scheduler.plan(0)
        order += [s for s, event in scheduler.commit(step, runner.run(step), 0) if event.finish_reason]  # type: ignore[union-attr]
        scheduler.check()
    assert order == [first, second, third]
    assert scheduler.counts.preemptions > 0
    for s in order:
        assert s.generated == 40
        assert all(s.tokens[n] == next_token(s.tokens[:n]) for n in range(30, 70))


def test_accepted_drafts_save_steps_and_do_not_change_the_answer() -> None:
    answers = []
    for draft_tokens in (0, 4):
        scheduler, runner = scheduler_of(1, 64, 8, draft_tokens=draft_tokens), FakeCacheRunner(1)
        drafting = make("abab", 60)
        add(scheduler, drafting)
        steps = 0
        while not scheduler.idle:
            step = scheduler.plan(0)
            scheduler.commit(step, runner.run(step), 0)
            steps += 1
        answers.append((drafting.tokens, steps, scheduler.counts))
    (plain, plain_steps, _), (drafted, steps, counts) = answers
    assert drafted == plain
    assert steps == plain_steps - counts.accepted < plain_steps
    assert 0 < counts.accepted <= counts.drafted


def test_no_drafts_are_proposed_while_many_sequences_decode() -> None:
    scheduler = scheduler_of(5, 64, 8, draft_tokens=4)
    add(scheduler, *(make("ababab", 30) for _ in range(5)))
    run_step(scheduler)
    assert [advance.drafts for advance in scheduler.plan(0).advances] == [()] * 5


def test_the_queue_is_ordered_by_priority_and_then_by_arrival() -> None:
    scheduler = scheduler_of(1, 64, 8)
    waiting = [with_priority(letter, priority) for letter, priority in zip("abcdef", (0, 5, -1, 0, 5, -1), strict=True)]
    running = make("x", 3)
    add(scheduler, running)
    run_step(scheduler)
    add(scheduler, *waiting)
    order = []
    while not scheduler.idle:
        order += [s for s, result in run_step(scheduler)[1] if isinstance(result, Token) and result.finish_reason]
    a, b, c, d, e, f = waiting
    assert order == [running, c, f, a, d, b, e], "a running sequence is not interrupted"


def test_without_memory_the_highest_priority_value_is_preempted_first() -> None:
    scheduler, runner = scheduler_of(3, 512, 8, tokens=4 * BLOCK), FakeCacheRunner(3)
    later, first, urgent = with_priority("a" * 30, 3, 40), make("b" * 30, 40), with_priority("c" * 30, -3, 40)
    add(scheduler, later, first, urgent)
    order = []
    while not scheduler.idle:
        step = scheduler.plan(0)
        order += [s for s, result in scheduler.commit(step, runner.run(step), 0) if result.finish_reason]  # type: ignore[union-attr]
        scheduler.check()
    assert order == [urgent, first, later]
    assert scheduler.counts.preemptions > 0
    assert all(s.tokens[n] == next_token(s.tokens[:n]) for s in order for n in range(30, 70))


# Several answers to one prompt


def rows_until_idle(scheduler: Scheduler, runner: FakeCacheRunner) -> list[int]:
    """The rows of every step until all sequences have ended."""
    rows = []
    while not scheduler.idle:
        step = scheduler.plan(0)
        scheduler.commit(step, runner.run(step), 0)
        scheduler.check()
        rows.append(step.rows)
    return rows


@pytest.mark.parametrize(("prefix_cache", "group"), [(True, "g"), (True, ""), (False, "g")])
def test_four_answers_to_one_prompt_cost_one_prefill(prefix_cache: bool, group: str) -> None:
    """The other three sequences compute only the tokens after the last whole block."""
    scheduler = scheduler_of(4, 512, 8, prefix_cache=prefix_cache)
    members = answers_to("abcde" * 40, 5, 4, group)
    add(scheduler, *members)
    assert rows_until_idle(scheduler, FakeCacheRunner(4)) == [200, 1 + 3 * (200 % BLOCK), 4, 4, 4, 3]
    for s in members:
        assert all(s.tokens[n] == next_token(s.tokens[:n]) for n in range(200, 205))


def test_without_prefix_cache_only_members_of_a_group_share() -> None:
    scheduler = scheduler_of(4, 1024, 8, prefix_cache=False)
    add(scheduler, *answers_to("abcde" * 40, 1, 2, "g"), *answers_to("abcde" * 40, 1, 2, ""))
    assert rows_until_idle(scheduler, FakeCacheRunner(4)) == [3 * 200, 200 % BLOCK]


def test_prompts_that_cannot_share_are_computed_in_parallel() -> None:
    """Two prompts have different salts, and two are not longer than one block."""
    scheduler = scheduler_of(4, 1024, 8)
    add(scheduler, *answers_to("a" * 40, 1, 1, salt="one"), *answers_to("a" * 40, 1, 1, salt="two"))
    add(scheduler, *answers_to("a" * BLOCK, 1, 2))
    assert rows_until_idle(scheduler, FakeCacheRunner(4)) == [2 * 40 + 2 * BLOCK]


def test_a_sequence_that_waits_for_a_prefill_is_passed_and_keeps_its_place() -> None:
    scheduler = scheduler_of(3, 64, 8)
    leader, follower = answers_to("a" * 100, 9, 2)
    others = [make(letter, 9) for letter in "bcd"]
    add(scheduler, leader, follower, *others)
    run_step(scheduler)
    assert scheduler._running == [leader, *others[:2]]
    assert scheduler._waiting == [follower, others[2]]


@pytest.mark.parametrize("end", ["cancelled", "failed", "expired"])
def test_when_the_sequence_that_computes_a_prompt_ends_the_next_one_computes_it(end: str) -> None:
    scheduler, runner = scheduler_of(3, 64, 8), FakeCacheRunner(3)
    first, second, third = answers_to("a" * 100, 3, 3)
    add(scheduler, first, second, third)
    step = scheduler.plan(0)
    scheduler.commit(step, runner.run(step), 0)
    assert [advance.sequence for advance in step.advances] == [first]
    if end == "cancelled":
        first.stream.close()
        scheduler.remove_ended(0)
    elif end == "failed":
        scheduler.fail([first])
    else:
        first.deadline = 1.0
        scheduler.remove_ended(2.0)
    # The computed chunk of the first sequence is kept unless its step failed.
    assert rows_until_idle(scheduler, runner)[:2] == ([64, 36] if end == "failed" else [36, 1 + 4])
    assert (second.generated, third.generated) == (3, 3)


def test_no_sequence_waits_for_a_prompt_that_is_recomputed() -> None:
    """A recomputed sequence has its first token already and does not publish its prompt a second time."""
    scheduler = scheduler_of(3, 512, 8)
    short, recomputed = make("x", 3), answers_to("a" * 100, 9, 1)[0]
    (new,) = answers_to("a" * 100, 9, 1)
    add(scheduler, short, recomputed)
    run_step(scheduler)
    scheduler._preempt(recomputed)
    while short.slot is not None:
        run_step(scheduler)
    add(scheduler, new)
    scheduler.plan(0)
    assert scheduler._running == [recomputed, new]


def with_readout(prompt: str, tokens: int = 1, embed: bool = False) -> Sequence:
    base = request(prompt, params=SamplingParams(max_tokens=tokens, prompt_logprobs=None if embed else 0))
    return sequences([replace(base, embed=embed)], context=1000)[0]


@pytest.mark.parametrize("embed", [False, True])
def test_a_sequence_with_a_readout_computes_its_prompt_and_shares_it(embed: bool) -> None:
    scheduler, runner, prompt = scheduler_of(2, 256, 4), FakeCacheRunner(2), "a" * 100
    for new, rows in (
        (with_readout(prompt, embed=embed), 100),
        (with_readout(prompt, embed=embed), 100),
        (make(prompt, 1), 4),
    ):
        add(scheduler, new)
        assert rows_until_idle(scheduler, runner) == [rows]
    assert scheduler.counts.cached_tokens == 96


def test_a_sequence_with_a_readout_does_not_wait_for_a_prefill() -> None:
    scheduler, prompt = scheduler_of(3, 64, 4), "a" * 100
    first, reader, last = make(prompt, 1), with_readout(prompt), make(prompt, 1)
    add(scheduler, first, reader, last)
    step, _ = run_step(scheduler)
    assert [advance.sequence for advance in step.advances] == [first]
    assert scheduler._running == [first, reader]


def test_a_preempted_sequence_with_a_complete_readout_reuses_the_cache() -> None:
    scheduler = scheduler_of(2, 256, 4)
    other, reader = make("a" * 100, 9), with_readout("a" * 100, tokens=9)
    add(scheduler, other, reader)
    _, results = run_step(scheduler)
    assert {sequence for sequence, _ in results} == {other, reader}
    scheduler._preempt(reader)
    while other.slot is not None:
        run_step(scheduler)
    run_step(scheduler)
    assert reader.computed > 96
    assert reader.readout is not None
    assert len(reader.readout.logprobs) == 99


def test_an_embedding_of_one_token_ends_with_its_prompt_and_has_no_drafts() -> None:
    scheduler = scheduler_of(2, 64, 4, draft_tokens=4)
    add(scheduler, added := with_readout("a", embed=True))
    step, ((ended, result),) = run_step(scheduler)
    assert (step.rows, ended, scheduler.idle) == (1, added, True)
    assert isinstance(result, Embedding)
    assert result.vector == (0.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([math.nan, 1.0], Failure),
        ([math.inf, 1.0], Failure),
        ([0.0, 0.0], Embedding((0.0, 0.0))),
        ([0.0, -5.0], Embedding((0.0, -1.0))),
    ],
)
def test_an_embedding_without_numbers_is_an_error_and_one_of_zeros_is_zeros(
    sums: list[float], expected: Embedding | type[Failure]
) -> None:
    scheduler = scheduler_of(1, 64, 4)
    add(scheduler, added := with_readout("abc", embed=True))
    step = scheduler.plan(0)
    assert added.readout is not None
    added.readout.add_states(sums, 3)
    ((_, result),) = scheduler.commit(step, [], 0)
    assert isinstance(result, expected) if isinstance(expected, type) else result == expected
    assert scheduler.idle


SLOTS, ROWS, QUEUE, BLOCKS = 3, 5, 4, 5


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, faults and cancellations, with little memory and many common prefixes."""

    prefix_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_of(
            SLOTS,
            ROWS,
            QUEUE,
            tokens=BLOCKS * BLOCK,
            step_times=StepTimeModel(),
            draft_tokens=3,
            prefix_cache=self.prefix_cache,
        )
        self.runner = FaultyCacheRunner(SLOTS)
        self.now = 0.0
        self.trims_failed = False
        self.accepted: list[Sequence] = []
        self.terminal_events: dict[Sequence, int] = {}

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=3), answers=st.integers(1, 3))
    def arrive(self, shapes: list[Shape], answers: int) -> None:
        group = str(len(self.accepted)) if answers > 1 else ""
        requests = [
            replace(
                request(
                    TEXTS[i][:n],
                    timeout,
                    SamplingParams(max_tokens=m, prompt_logprobs=0 if readout == "logprobs" else None),
                ),
                cache_salt=salt,
                group=f"{group}/{number}" if group else "",
                index=index,
                priority=priority,
                embed=readout == "embedding",
            )
            for number, (i, n, m, timeout, salt, priority, readout) in enumerate(shapes)
            for index in range(answers)
        ]
        for new in sequences(requests, arrived=self.now, context=5 * BLOCK):
            if self.scheduler.add(new) is None:
                self.accepted.append(new)
                self.terminal_events[new] = 0
            else:
                assert self.scheduler.waiting >= QUEUE

    @rule(wait=st.sampled_from([0.0, 0.1, 10.0]), times=st.integers(1, 12))
    def steps(self, wait: float, times: int) -> None:
        for _ in range(times):
            self.step(wait)

    def step(self, wait: float) -> None:
        self.now += wait
        faults = self.runner.faults
        for late, _ in self.scheduler.remove_ended(self.now):
            assert self.now >= late.deadline
            self.terminal_events[late] += 1
        step = self.plan()
        self.runner.passes.clear()
        done_step = compute(self.runner, step, lambda rows: None)
        assert len(self.runner.passes) <= MAX_PASSES
        lacking = {op.target for op in done_step.undone if isinstance(op, Copy)}
        self.trims_failed = any(isinstance(op, Trim) for op in done_step.undone)
        failed = [s for s, _ in done_step.failed]
        computable = {advance.sequence for advance in step.advances if advance.sequence.slot not in lacking}
        assert {*failed} == faults.poisoned & computable, "only the sequences that cause failures fail"
        results = self.scheduler.commit(done_step.step, done_step.outcomes, self.now)
        self.scheduler.undo(done_step.undone)
        self.scheduler.fail(failed)
        for broken in failed:
            self.terminal_events[broken] += 1
        self.runner.faults = Faults(faults.poisoned)
        for done, event in results:
            prompt = done.tokens[: done.prompt_len]
            if isinstance(event, Embedding):
                length = math.hypot(sum(prompt), len(prompt))
                assert event.vector == pytest.approx((sum(prompt) / length, len(prompt) / length)), "each token once"
                self.terminal_events[done] += 1
                continue
            assert isinstance(event, Token)
            if event.prompt_logprobs is not None:
                read_out = [(one.chosen.token_id, one.chosen.logprob) for one in event.prompt_logprobs]
                assert read_out == [(token, position) for position, token in enumerate(prompt) if position], (
                    "each token once"
                )
            self.terminal_events[done] += event.finish_reason is not None
        self.scheduler.record(step, 0.01 + 0.001 * step.rows)
        for s in self.accepted:
            answer = range(s.prompt_len, len(s.tokens))
            assert all(s.tokens[n] == next_token(s.tokens[:n]) for n in answer), "wrong token"

    @rule(choice=st.integers(0, 99))
    def poison(self, choice: int) -> None:
        if self.accepted:
            self.runner.faults.poisoned.add(self.accepted[choice % len(self.accepted)])

    @rule(faults=st.builds(Faults, max_rows=st.integers(0, ROWS), passes=st.integers(0, 1), ops=st.integers(0, 3)))
    def fail_next_step(self, faults: Faults) -> None:
        self.runner.faults = replace(faults, poisoned=self.runner.faults.poisoned)
        self.step(0.0)

    @rule(choice=st.integers(0, 99))
    def cancel(self, choice: int) -> None:
        if self.accepted:
            self.accepted[choice % len(self.accepted)].stream.close()

    def plan(self) -> Step:
        before = {*self.scheduler._running}
        step = self.scheduler.plan(self.now)
        staying = [_priority(s) for s in before if s.slot is not None]
        preempted = [_priority(s) for s in before if s.slot is None]
        assert not staying or all(max(staying) < priority for priority in preempted), "the last in order are preempted"
        for new in {*self.scheduler._running} - before:
            passed = [s for s in self.scheduler._waiting if _priority(s) < _priority(new)]
            assert all(self.waits_for_prefill(s) for s in passed), "admission in order"
        scheduled = [advance.sequence for advance in step.advances]
        decoding = [s for s in self.scheduler._running if s.pending == 1]
        assert bool(scheduled) != self.scheduler.idle, "a step is empty exactly if the scheduler is idle"
        assert step.rows <= max(ROWS, 8 + MIN_CHUNK)
        assert len(set(scheduled)) == len(scheduled)
        assert set(decoding) <= set(scheduled), "a decoding sequence is in every step"
        return step

    def waits_for_prefill(self, waiting: Sequence) -> bool:
        """Whether a running sequence that may share computes the same prompt, so that others may pass this one."""

        def shared(s: Sequence) -> tuple[list[int], str]:
            request = s.stream.request
            return s.tokens[: s.prompt_len], request.cache_salt if self.prefix_cache else request.group

        return any(not s.generated and shared(s) == shared(waiting) for s in self.scheduler._running)

    @invariant()
    def slots_and_queue_are_consistent(self) -> None:
        self.scheduler.check()
        assert self.scheduler.running <= SLOTS
        assert self.scheduler.waiting <= QUEUE + SLOTS
        if not self.trims_failed:  # they run with the next step
            assert self.runner.within([slot.written for slot in self.scheduler._kv_cache._slots])

    def teardown(self) -> None:
        for _ in range(1000):
            if self.scheduler.idle:
                break
            self.step(0.0)
        assert self.scheduler.idle
        self.scheduler.check()
        assert self.scheduler._kv_cache.free_slots == SLOTS
        for s in self.accepted:
            assert self.terminal_events[s] == 1 or (s.stream.closed and self.terminal_events[s] == 0)


class SchedulerMachineWithoutPrefixCache(SchedulerMachine):
    """The same without a prefix cache, so that only members of a group share."""

    prefix_cache = False


class TestSchedulerMachine(SchedulerMachine.TestCase):  # type: ignore[valid-type, misc]
    settings = settings(max_examples=40, stateful_step_count=30)


class TestSchedulerMachineWithoutPrefixCache(SchedulerMachineWithoutPrefixCache.TestCase):  # type: ignore[valid-type, misc]
    settings = settings(max_examples=20, stateful_step_count=30)
