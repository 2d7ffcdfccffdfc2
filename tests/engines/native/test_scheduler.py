from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve_app.config import Engine as EngineConfig
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.kv_cache import BLOCK, KVCache
from serve_app.engines.native.scheduler import News, Scheduler, _turn
from serve_app.engines.native.sequence import Sampled, Sequence, Step
from serve_app.engines.native.step_time import StepTimeModel
from serve_app.engines.native.stream import Embedded, Token
from serve_app.engines.toy import ToyRunner
from serve_app.errors import DeadlineExceeded, InternalError, QueueFull

from .helpers import Keeper, request, sequence, sequences, successor

RUNNER = ToyRunner(EngineConfig())
LEAST = 16
# Prompts that begin alike, and one that does not.
TEXTS = ["abc" * 50, "abc" * 20 + "dea" * 30, "cab" * 50]
SHAPES = st.tuples(
    st.integers(0, 2),
    st.integers(1, 110),
    st.integers(1, 40),
    st.integers(3, 90),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([0, 0, -1, 2]),
    st.sampled_from(["", "", "told", "embedded"]),
)
Shape = tuple[int, int, int, int, str, int, str]


def asking(prompt: str, tokens: int) -> Sequence:
    return sequence(prompt, SamplingParams(max_tokens=tokens), context=1000)


def made(
    slots: int,
    rows: int,
    queue: int,
    tokens: int | None = None,
    pace: StepTimeModel | None = None,
    draft_tokens: int = 0,
    prefix_cache: bool = True,
) -> Scheduler:
    return Scheduler(KVCache(slots, tokens or slots * 1024), rows, queue, pace, draft_tokens, prefix_cache)


def prioritised(prompt: str, priority: int, tokens: int = 1) -> Sequence:
    asked = request(prompt, params=SamplingParams(max_tokens=tokens))
    return sequences([replace(asked, priority=priority)], context=1000)[0]


def siblings(prompt: str, tokens: int, count: int, group: str = "g", salt: str = "") -> list[Sequence]:
    """Several answers to one prompt."""
    asked = replace(request(prompt, params=SamplingParams(max_tokens=tokens)), group=group, cache_salt=salt)
    return sequences([replace(asked, index=index) for index in range(count)], context=1000)


def queued(scheduler: Scheduler, *added: Sequence) -> None:
    assert [scheduler.add(s) for s in added] == [None] * len(added)


def turn(scheduler: Scheduler, now: float = 0.0) -> tuple[Step, list[tuple[Sequence, News]]]:
    step = scheduler.plan(now)
    return step, scheduler.commit(step, RUNNER.run(step), now)


def counts(step: Step) -> list[tuple[int | None, int]]:
    """Slot and number of tokens of every advance."""
    return [(advance.sequence.slot, advance.count) for advance in step.advances]


def test_nothing_to_do_is_an_empty_step() -> None:
    scheduler = made(2, 8, 8)
    assert scheduler.plan(0).advances == ()
    assert scheduler.idle


def test_a_prompt_is_prefilled_whole_and_then_decoded() -> None:
    scheduler = made(2, 8, 8)
    queued(scheduler, asking("abcd", 3))
    steps = [counts(turn(scheduler)[0]) for _ in range(1)]
    held = scheduler.tokens_held
    steps += [counts(scheduler.plan(0))]
    assert steps == [[(0, 4)], [(0, 1)]]
    assert held == 4


def test_a_long_prompt_is_chunked_and_its_token_comes_with_the_last_chunk() -> None:
    scheduler = made(1, 4, 8)
    queued(scheduler, asking("abcdefghij", 1))
    rows, told = [], []
    while not scheduler.idle:
        step, events = turn(scheduler)
        rows.append(step.rows)
        told.append(len(events))
    assert rows == [4, 4, 2]
    assert told == [0, 0, 1]


def test_a_long_prompt_does_not_starve_who_decodes() -> None:
    scheduler = made(2, 8, 8)
    decoder, long = asking("a", 40), asking("x" * 100, 1)
    queued(scheduler, decoder, long)
    for step_number in range(1, 15):
        step, events = turn(scheduler)
        assert (decoder, 1) in [(advance.sequence, advance.count) for advance in step.advances]
        assert decoder.generated == step_number
        assert step.rows <= 8
        assert len(events) == 1
    assert long.computed == 14 * 7


def test_decoders_do_not_starve_a_prompt_even_when_rows_are_fewer_than_slots() -> None:
    """max_step_tokens 1 is read as one row more than there are slots."""
    scheduler = made(3, 1, 8)
    queued(scheduler, asking("a", 90), asking("b", 90), asking("x" * 20, 1))
    turn(scheduler)
    assert [count for _, count in counts(scheduler.plan(0))] == [1, 1, 2]


def test_a_prompt_left_over_by_the_budget_waits_in_its_slot() -> None:
    scheduler = made(2, 4, 8)
    queued(scheduler, asking("abcdef", 1), asking("xyz", 1))
    assert counts(turn(scheduler)[0]) == [(0, 4)]
    step, _ = turn(scheduler)
    assert [advance.count for advance in step.advances] == [2, 2]


def test_decoders_come_first_and_by_slot() -> None:
    scheduler = made(3, 64, 8)
    first, second = asking("a", 1), asking("b", 9)
    queued(scheduler, first, second)
    turn(scheduler)
    queued(scheduler, asking("c", 9), asking("long one", 9))
    turn(scheduler)
    assert counts(scheduler.plan(0)) == [(0, 1), (1, 1), (2, 1)]
    assert second.slot == 1


def test_a_late_arrival_joins_at_the_next_step_and_a_finished_one_has_left_by_then() -> None:
    scheduler = made(1, 64, 8)
    first, late = asking("a", 1), asking("b", 1)
    queued(scheduler, first, late)
    assert [s for s, _ in turn(scheduler)[1]] == [first]
    assert [s for s, _ in turn(scheduler)[1]] == [late]
    scheduler.check()
    assert scheduler.idle


def test_the_queue_is_bounded_and_says_so() -> None:
    scheduler = made(1, 64, 2)
    queued(scheduler, asking("a", 9), asking("b", 9), asking("c", 9))
    refusal = scheduler.add(asking("d", 9))
    assert isinstance(refusal, QueueFull)
    assert refusal.message == "2 requests wait for a slot already; try again later"
    assert refusal.retry_after_s == 1
    turn(scheduler)
    assert isinstance(scheduler.add(asking("e", 9)), QueueFull)
    assert (scheduler.running, scheduler.waiting) == (1, 2)


def test_a_cohort_larger_than_the_queue_gets_in_while_slots_are_free() -> None:
    scheduler = made(4, 64, 1)
    queued(scheduler, *(asking("a", 9) for _ in range(5)))
    turn(scheduler)
    assert (scheduler.running, scheduler.waiting) == (4, 1)


def test_the_start_is_noted_once() -> None:
    scheduler = made(1, 64, 8)
    first, second = asking("a", 2), asking("b", 1)
    queued(scheduler, first, second)
    for now in (5.0, 6.0, 7.0):
        turn(scheduler, now)
    assert (first.stream.started, second.stream.started) == (5.0, 7.0)


def test_who_left_is_let_go_silently_wherever_it_was() -> None:
    scheduler = made(1, 64, 8)
    queued(scheduler, asking("a", 9), asking("b", 9), asking("c", 9))
    turn(scheduler)
    running, waiting, staying = (*scheduler._running, *scheduler._waiting)
    running.stream.close()
    waiting.stream.close()
    assert scheduler.sweep(0) == []
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [staying]


def test_whose_time_is_up_is_told_wherever_it_was() -> None:
    scheduler = made(1, 64, 8)
    running, waiting = sequence("a", timeout_s=5), sequence("b", timeout_s=5)
    patient, gone = sequence("c"), sequence("d", timeout_s=5)
    queued(scheduler, running, waiting, patient, gone)
    turn(scheduler)
    gone.stream.close()
    assert scheduler.sweep(4.9) == []
    expired = scheduler.sweep(5.0)
    assert [s for s, _ in expired] == [running, waiting]
    assert all(isinstance(error, DeadlineExceeded) for _, error in expired)
    assert "not finished after 5 s (1 tokens)" in expired[0][1].message
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [patient]


def test_a_failed_step_lets_go_of_its_own_only_also_of_those_that_ended_in_it() -> None:
    scheduler = made(2, 64, 8)
    ended, broken, later = asking("a", 1), asking("b", 9), asking("c", 1)
    queued(scheduler, ended, broken, later)
    step = scheduler.plan(0)
    with pytest.raises(StopIteration):
        scheduler.commit(step, [(Sampled(1),)], 0)
    assert scheduler.fail(step) == [ended, broken]
    scheduler.check()
    assert [advance.sequence for advance in scheduler.plan(0).advances] == [later]


def test_more_tokens_than_asked_for_are_a_mistake_of_ours() -> None:
    scheduler = made(1, 64, 8)
    queued(scheduler, asking("a", 9))
    with pytest.raises(AssertionError, match="sampled for more sequences"):
        scheduler.commit(scheduler.plan(0), [(Sampled(1),), (Sampled(2),)], 0)


def test_draining_lets_go_of_everyone_in_order() -> None:
    scheduler = made(1, 64, 8)
    everyone = [asking("a", 9), asking("b", 9), asking("c", 9)]
    queued(scheduler, *everyone)
    turn(scheduler)
    assert scheduler.drain() == everyone
    assert scheduler.idle
    scheduler.check()


def test_a_newcomers_prompt_takes_no_more_rows_than_keep_the_step_short() -> None:
    """Steps take 10 ms and 1 ms a row here: with two at work 12 ms, so at most 20.4."""
    pace = StepTimeModel()
    scheduler = made(2, 512, 8, pace=pace)
    running, long = asking("a", 90), asking("x" * 300, 1)
    queued(scheduler, running)
    chunks = []
    for number in range(60):
        if number == 20:
            queued(scheduler, long)
        step, _ = turn(scheduler)
        scheduler.record(step, 0.010 + 0.001 * step.rows)
        chunks.append(step.rows - 1)
    assert sum(chunks) == 300
    assert max(chunks[22:]) <= 16, "the first tries teach what a row costs"


def test_without_anybody_to_disturb_a_prompt_takes_all_rows() -> None:
    pace = StepTimeModel()
    scheduler = made(2, 512, 8, pace=pace)
    pace.record(1, 0.01)
    pace.record(100, 1.0)
    queued(scheduler, asking("x" * 600, 1))
    assert [turn(scheduler)[0].rows for _ in range(2)] == [512, 88]


def test_when_memory_runs_out_the_youngest_gives_way_and_is_computed_again() -> None:
    scheduler = made(3, 512, 8, tokens=4 * BLOCK)
    first, second, third = (asking(letter * 30, 40) for letter in "abc")
    queued(scheduler, first, second, third)
    runner = Keeper(3)
    order = []
    for _ in range(200):
        step = scheduler.plan(0)
        order += [asked for asked, event in scheduler.commit(step, runner.run(step), 0) if event.finish_reason]  # type: ignore[union-attr]
        scheduler.check()
    assert order == [first, second, third]
    assert scheduler.counts.preemptions > 0
    for asked in order:
        assert asked.generated == 40
        assert all(asked.tokens[n] == successor(asked.tokens[:n]) for n in range(30, 70))


def test_guesses_that_are_right_save_steps_and_change_nothing() -> None:
    answers = []
    for draft_tokens in (0, 4):
        scheduler, runner = made(1, 64, 8, draft_tokens=draft_tokens), Keeper(1)
        asked = asking("abab", 60)
        queued(scheduler, asked)
        steps = 0
        while not scheduler.idle:
            step = scheduler.plan(0)
            scheduler.commit(step, runner.run(step), 0)
            steps += 1
        answers.append((asked.tokens, steps, scheduler.counts))
    (plain, plain_steps, _), (guessed, steps, counts) = answers
    assert guessed == plain
    assert steps == plain_steps - counts.accepted < plain_steps
    assert 0 < counts.accepted <= counts.drafted


def test_nobody_guesses_while_many_run() -> None:
    scheduler = made(5, 64, 8, draft_tokens=4)
    queued(scheduler, *(asking("ababab", 30) for _ in range(5)))
    turn(scheduler)
    assert [advance.drafts for advance in scheduler.plan(0).advances] == [()] * 5


def test_the_lowest_priority_is_served_first_and_of_equals_who_came_first() -> None:
    scheduler = made(1, 64, 8)
    waiting = [prioritised(letter, priority) for letter, priority in zip("abcdef", (0, 5, -1, 0, 5, -1), strict=True)]
    running = asking("x", 3)
    queued(scheduler, running)
    turn(scheduler)
    queued(scheduler, *waiting)
    order = []
    while not scheduler.idle:
        order += [s for s, told in turn(scheduler)[1] if isinstance(told, Token) and told.finish_reason]
    a, b, c, d, e, f = waiting
    assert order == [running, c, f, a, d, b, e], "whoever runs goes on"


def test_when_memory_runs_out_the_highest_priority_is_put_off_before_the_youngest() -> None:
    scheduler, runner = made(3, 512, 8, tokens=4 * BLOCK), Keeper(3)
    later, first, urgent = prioritised("a" * 30, 3, 40), asking("b" * 30, 40), prioritised("c" * 30, -3, 40)
    queued(scheduler, later, first, urgent)
    order = []
    while not scheduler.idle:
        step = scheduler.plan(0)
        order += [s for s, told in scheduler.commit(step, runner.run(step), 0) if told.finish_reason]  # type: ignore[union-attr]
        scheduler.check()
    assert order == [urgent, first, later]
    assert scheduler.counts.preemptions > 0
    assert all(s.tokens[n] == successor(s.tokens[:n]) for s in order for n in range(30, 70))


# Several answers to one prompt


def rows_until_idle(scheduler: Scheduler, runner: Keeper) -> list[int]:
    """The rows of every step, on a runner that holds what it is given."""
    rows = []
    while not scheduler.idle:
        step = scheduler.plan(0)
        scheduler.commit(step, runner.run(step), 0)
        scheduler.check()
        rows.append(step.rows)
    return rows


@pytest.mark.parametrize(("prefix_cache", "group"), [(True, "g"), (True, ""), (False, "g")])
def test_four_answers_to_one_prompt_cost_one_prefill(prefix_cache: bool, group: str) -> None:
    """And what is left of 200 tokens after whole blocks, for each of the other three."""
    scheduler = made(4, 512, 8, prefix_cache=prefix_cache)
    members = siblings("abcde" * 40, 5, 4, group)
    queued(scheduler, *members)
    assert rows_until_idle(scheduler, Keeper(4)) == [200, 1 + 3 * (200 % BLOCK), 4, 4, 4, 3]
    for asked in members:
        assert all(asked.tokens[n] == successor(asked.tokens[:n]) for n in range(200, 205))


def test_without_a_prefix_cache_strangers_share_nothing_and_wait_for_nobody() -> None:
    scheduler = made(4, 1024, 8, prefix_cache=False)
    queued(scheduler, *siblings("abcde" * 40, 1, 2, "g"), *siblings("abcde" * 40, 1, 2, ""))
    assert rows_until_idle(scheduler, Keeper(4)) == [3 * 200, 200 % BLOCK]


def test_different_salts_and_short_prompts_are_computed_side_by_side() -> None:
    """Of a prompt within one block nothing could be copied."""
    scheduler = made(4, 1024, 8)
    queued(scheduler, *siblings("a" * 40, 1, 1, salt="one"), *siblings("a" * 40, 1, 1, salt="two"))
    queued(scheduler, *siblings("a" * BLOCK, 1, 2))
    assert rows_until_idle(scheduler, Keeper(4)) == [2 * 40 + 2 * BLOCK]


def test_whoever_waits_for_a_prompt_is_passed_by_and_keeps_its_place() -> None:
    scheduler = made(3, 64, 8)
    leader, follower = siblings("a" * 100, 9, 2)
    others = [asking(letter, 9) for letter in "bcd"]
    queued(scheduler, leader, follower, *others)
    turn(scheduler)
    assert scheduler._running == [leader, *others[:2]]
    assert scheduler._waiting == [follower, others[2]]


@pytest.mark.parametrize("end", ["leaves", "fails", "is late"])
def test_when_whoever_computes_the_prompt_ends_the_next_one_does(end: str) -> None:
    scheduler, runner = made(3, 64, 8), Keeper(3)
    first, second, third = siblings("a" * 100, 3, 3)
    queued(scheduler, first, second, third)
    step = scheduler.plan(0)
    scheduler.commit(step, runner.run(step), 0)
    assert [advance.sequence for advance in step.advances] == [first]
    if end == "leaves":
        first.stream.close()
        scheduler.sweep(0)
    elif end == "fails":
        scheduler.fail(scheduler.plan(0))
    else:
        first.deadline = 1.0
        scheduler.sweep(2.0)
    # What the first has computed is kept, unless nobody knows what is left of it.
    assert rows_until_idle(scheduler, runner)[:2] == ([64, 36] if end == "fails" else [36, 1 + 4])
    assert (second.generated, third.generated) == (3, 3)


def test_nobody_waits_for_one_that_is_computed_again() -> None:
    """It has its first token, and will not say a second time that its prompt is there."""
    scheduler = made(3, 512, 8)
    short, again = asking("x", 3), siblings("a" * 100, 9, 1)[0]
    (newcomer,) = siblings("a" * 100, 9, 1)
    queued(scheduler, short, again)
    turn(scheduler)
    scheduler._preempt(again)
    while short.slot is not None:
        turn(scheduler)
    queued(scheduler, newcomer)
    scheduler.plan(0)
    assert scheduler._running == [again, newcomer]


def reading(prompt: str, tokens: int = 1, embed: bool = False) -> Sequence:
    asked = request(prompt, params=SamplingParams(max_tokens=tokens, prompt_logprobs=None if embed else 0))
    return sequences([replace(asked, embed=embed)], context=1000)[0]


@pytest.mark.parametrize("embed", [False, True])
def test_whoever_reads_its_prompt_computes_it_and_leaves_it_to_others(embed: bool) -> None:
    scheduler, runner, prompt = made(2, 256, 4), Keeper(2), "a" * 100
    for asked, rows in (
        (reading(prompt, embed=embed), 100),
        (reading(prompt, embed=embed), 100),
        (asking(prompt, 1), 4),
    ):
        queued(scheduler, asked)
        assert rows_until_idle(scheduler, runner) == [rows]
    assert scheduler.counts.cached_tokens == 96


def test_whoever_reads_its_prompt_waits_for_nobody_but_is_waited_for() -> None:
    scheduler, prompt = made(3, 64, 4), "a" * 100
    first, reader, last = asking(prompt, 1), reading(prompt), asking(prompt, 1)
    queued(scheduler, first, reader, last)
    step, _ = turn(scheduler)
    assert [advance.sequence for advance in step.advances] == [first]
    assert scheduler._running == [first, reader]


def test_a_prompt_that_was_read_may_be_copied_when_it_is_computed_again() -> None:
    scheduler = made(2, 256, 4)
    other, reader = asking("a" * 100, 9), reading("a" * 100, tokens=9)
    queued(scheduler, other, reader)
    _, news = turn(scheduler)
    assert {sequence for sequence, _ in news} == {other, reader}
    scheduler._preempt(reader)
    while other.slot is not None:
        turn(scheduler)
    turn(scheduler)
    assert reader.computed > 96
    assert reader.reading is not None
    assert len(reader.reading.logprobs) == 99


def test_an_embedding_of_one_token_ends_with_it_and_guesses_nothing() -> None:
    scheduler = made(2, 64, 4, draft_tokens=4)
    queued(scheduler, asked := reading("a", embed=True))
    step, ((done, told),) = turn(scheduler)
    assert (step.rows, done, scheduler.idle) == (1, asked, True)
    assert isinstance(told, Embedded)
    assert told.vector == (0.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("sums", "told"),
    [
        ([math.nan, 1.0], InternalError),
        ([math.inf, 1.0], InternalError),
        ([0.0, 0.0], Embedded((0.0, 0.0))),
        ([0.0, -5.0], Embedded((0.0, -1.0))),
    ],
)
def test_an_embedding_without_numbers_is_an_error_and_one_of_zeros_is_zeros(
    sums: list[float], told: Embedded | type[InternalError]
) -> None:
    scheduler = made(1, 64, 4)
    queued(scheduler, asked := reading("abc", embed=True))
    step = scheduler.plan(0)
    assert asked.reading is not None
    asked.reading.add_states(sums, 3)
    ((_, found),) = scheduler.commit(step, [], 0)
    assert isinstance(found, told) if isinstance(told, type) else found == told
    assert scheduler.idle


SLOTS, ROWS, QUEUE, BLOCKS = 3, 5, 4, 5


class AnyHistory(RuleBasedStateMachine):
    """Arrivals, steps, failures, departures and the clock, in any order, with little memory and much in common."""

    prefix_cache = True

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = made(
            SLOTS,
            ROWS,
            QUEUE,
            tokens=BLOCKS * BLOCK,
            pace=StepTimeModel(),
            draft_tokens=3,
            prefix_cache=self.prefix_cache,
        )
        self.runner = Keeper(SLOTS)
        self.now = 0.0
        self.failed = False
        self.accepted: list[Sequence] = []
        self.ends: dict[Sequence, int] = {}

    @rule(shapes=st.lists(SHAPES, min_size=1, max_size=3), answers=st.integers(1, 3))
    def arrive(self, shapes: list[Shape], answers: int) -> None:
        group = str(len(self.accepted)) if answers > 1 else ""
        asked = [
            replace(
                request(
                    TEXTS[i][:n], timeout, SamplingParams(max_tokens=m, prompt_logprobs=0 if read == "told" else None)
                ),
                cache_salt=salt,
                group=f"{group}/{number}" if group else "",
                index=index,
                priority=priority,
                embed=read == "embedded",
            )
            for number, (i, n, m, timeout, salt, priority, read) in enumerate(shapes)
            for index in range(answers)
        ]
        for new in sequences(asked, arrived=self.now, context=5 * BLOCK):
            if self.scheduler.add(new) is None:
                self.accepted.append(new)
                self.ends[new] = 0
            else:
                assert self.scheduler.waiting >= QUEUE

    @rule(wait=st.sampled_from([0.0, 0.1, 10.0]), times=st.integers(1, 12))
    def steps(self, wait: float, times: int) -> None:
        for _ in range(times):
            self.step(wait)

    def step(self, wait: float) -> None:
        self.now += wait
        self.failed = False
        for late, _ in self.scheduler.sweep(self.now):
            assert self.now >= late.deadline
            self.ends[late] += 1
        step = self.planned()
        for done, event in self.scheduler.commit(step, self.runner.run(step), self.now):
            prompt = done.tokens[: done.prompt_len]
            if isinstance(event, Embedded):
                length = math.hypot(sum(prompt), len(prompt))
                assert event.vector == pytest.approx((sum(prompt) / length, len(prompt) / length)), "each token once"
                self.ends[done] += 1
                continue
            assert isinstance(event, Token)
            if event.told is not None:
                told = [(one.chosen.token_id, one.chosen.logprob) for one in event.told]
                assert told == [(token, place) for place, token in enumerate(prompt) if place], "each token once"
            self.ends[done] += event.finish_reason is not None
        self.scheduler.record(step, 0.01 + 0.001 * step.rows)
        for asked in self.accepted:
            answer = range(asked.prompt_len, len(asked.tokens))
            assert all(asked.tokens[n] == successor(asked.tokens[:n]) for n in answer), "exactly its own tokens"

    @rule()
    def fail(self) -> None:
        self.failed = True
        for ended in self.scheduler.fail(self.planned()):
            self.ends[ended] += 1

    @rule(choice=st.integers(0, 99))
    def leave(self, choice: int) -> None:
        if self.accepted:
            self.accepted[choice % len(self.accepted)].stream.close()

    def planned(self) -> Step:
        before = {*self.scheduler._running}
        step = self.scheduler.plan(self.now)
        staying = [_turn(s) for s in before if s.slot is not None]
        put_off = [_turn(s) for s in before if s.slot is None]
        assert not staying or all(max(staying) < turn for turn in put_off), "the last give way"
        for new in {*self.scheduler._running} - before:
            passed_by = [s for s in self.scheduler._waiting if _turn(s) < _turn(new)]
            assert all(self.computed_by_another(s) for s in passed_by), "first come, first served"
        inside = [advance.sequence for advance in step.advances]
        decoding = [s for s in self.scheduler._running if s.pending == 1]
        assert bool(inside) != self.scheduler.idle, "there is a step exactly when there is work"
        assert step.rows <= max(ROWS, 8 + LEAST)
        assert len(set(inside)) == len(inside)
        assert set(decoding) <= set(inside), "whoever decodes is in every step"
        return step

    def computed_by_another(self, waiting: Sequence) -> bool:
        """Whether somebody who may share computes its prompt: then others may pass it by."""

        def known(asked: Sequence) -> tuple[list[int], str]:
            one = asked.stream.request
            return asked.tokens[: asked.prompt_len], one.cache_salt if self.prefix_cache else one.group

        return any(not s.generated and known(s) == known(waiting) for s in self.scheduler._running)

    @invariant()
    def slots_and_queue_are_sound(self) -> None:
        self.scheduler.check()
        assert self.scheduler.running <= SLOTS
        assert self.scheduler.waiting <= QUEUE + SLOTS
        if not self.failed:  # what was to be given back is given back with the next step
            assert self.runner.memory([content.blocks for content in self.scheduler._arena._contents])

    def teardown(self) -> None:
        for _ in range(1000):
            if self.scheduler.idle:
                break
            self.step(0.0)
        assert self.scheduler.idle
        self.scheduler.check()
        assert self.scheduler._arena.free == SLOTS
        for asked in self.accepted:
            assert self.ends[asked] == 1 or (asked.stream.closed and self.ends[asked] == 0)


class AnyHistoryOfGroups(AnyHistory):
    """Nothing is kept but for the members of a group."""

    prefix_cache = False


class TestAnyHistory(AnyHistory.TestCase):  # type: ignore[valid-type, misc]
    settings = settings(max_examples=40, stateful_step_count=30)


class TestAnyHistoryOfGroups(AnyHistoryOfGroups.TestCase):  # type: ignore[valid-type, misc]
    settings = settings(max_examples=20, stateful_step_count=30)
