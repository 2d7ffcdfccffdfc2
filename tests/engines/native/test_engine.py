from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.config import Engine as EngineConfig
from serve_app.core.events import FinishReason, TextToken
from serve_app.core.queries import Detokenize, GetModelInfo, ModelInfo, Query, Tokenize
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, Prompt, SamplingParams, TextPrompt
from serve_app.engines.native.engine import Engine, EngineStalled
from serve_app.engines.native.sequence import Outcome, Sampled, Step
from serve_app.engines.toy import END, ToyRunner, ToyText
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    QueueFull,
)

from .helpers import (
    PATIENCE_S,
    Answer,
    Clock,
    FaultyRunner,
    SteppedRunner,
    Witness,
    admitted,
    ask,
    read,
    request,
    running,
    stepped,
    streams,
    until,
)

OOPS = RuntimeError("scripted")


def asking(prompt: str | Seq[int], tokens: int) -> GenerationRequest:
    return request(prompt, params=SamplingParams(max_tokens=tokens))


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0


# What takes no step


def test_questions_are_answered_beside_the_loop() -> None:
    with running(ToyRunner, max_context=64) as engine:
        pieces = engine.answer(Tokenize(TextPrompt("hi"), special_tokens=True))
        assert pieces == (TextToken(ord("h"), "h", 0, 1), TextToken(ord("i"), "i", 1, 2))
        assert engine.answer(Detokenize((*b"hi", END))) == "hi<end>"
        assert engine.answer(Detokenize((*b"hi", END), skip_special_tokens=True)) == "hi"
        assert engine.answer(GetModelInfo()) == ModelInfo(context=64, vocabulary=END + 1, special_ids=frozenset({END}))
        assert isinstance(engine.answer(Detokenize((END + 1,))), InvalidRequest)
        assert engine.stats().steps == 0


def test_a_question_that_fails_is_an_error_of_ours() -> None:
    with running(ToyRunner) as engine:
        assert isinstance(engine.answer(Query()), InternalError)


# What a request gets


async def test_an_answer_is_complete_and_knows_its_prompt() -> None:
    with running() as engine:
        answer = await ask(engine, asking("abc", 5))
    assert (answer.text, answer.reason, answer.error) == ("abcab", FinishReason.LENGTH, None)
    assert answer.chunks[0].prompt_tokens == 3
    assert answer.chunks[0].queue_s >= 0


async def test_an_end_token_ends_the_answer() -> None:
    with running() as engine:
        answer = await ask(engine, asking([104, 105, END], 50))
    assert (answer.text, answer.reason) == ("hi", FinishReason.STOP)


async def test_special_tokens_and_what_ended_the_answer_are_shown_when_asked_for() -> None:
    params = SamplingParams(max_tokens=50, skip_special_tokens=False, include_stop_str_in_output=True)
    with running() as engine:
        ended = await ask(engine, request([104, 105, END], params=params))
        ignored = await ask(engine, request([104, END], params=replace(params, max_tokens=4, ignore_eos=True)))
    assert (ended.text, ended.reason) == ("hi<end>", FinishReason.STOP)
    assert (ignored.text, ignored.reason) == ("h<end>h<end>", FinishReason.LENGTH)


async def test_characters_of_many_bytes_arrive_whole() -> None:
    with running() as engine:
        answer = await ask(engine, asking("a€é😀", 20))
    assert answer.text == "a€é😀a€é😀"
    assert answer.tokens == list(answer.text.encode())


async def test_a_stop_string_ends_the_answer_and_what_was_held_back_is_sent_when_it_does_not_come() -> None:
    with running() as engine:
        stopped = await ask(engine, request("one two ", params=SamplingParams(max_tokens=30, stop=("two one",))))
        missed = await ask(engine, request("one two ", params=SamplingParams(max_tokens=7, stop=("two one",))))
    assert (stopped.text, stopped.reason) == ("one ", FinishReason.STOP)
    assert (missed.text, missed.reason) == ("one two", FinishReason.LENGTH)
    assert missed.events[-1].text == "two"


MIXTURE = st.lists(
    st.tuples(
        st.text("ab€", min_size=1, max_size=10),
        st.integers(1, 20),
        st.sampled_from([(), ("ba",), ("€a", "bb")]),
        st.sampled_from([None, None, None, 1, 3]),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40)
@given(mixture=MIXTURE)
async def test_in_any_company_an_answer_is_what_it_is_alone(
    mixture: list[tuple[str, int, tuple[str, ...], int | None, int]],
) -> None:
    """Whoever arrives when, however long they are, and whoever leaves early."""

    async def later(engine: Engine, asked: GenerationRequest, leaves_after: int | None, pause: int) -> Answer:
        for _ in range(pause):
            await asyncio.sleep(0)
        return await ask(engine, asked, leaves_after)

    requests = [request(text, params=SamplingParams(max_tokens=n, stop=stop)) for text, n, stop, *_ in mixture]
    with running(max_running=3, max_step_tokens=5, max_context=64) as engine:
        crowd = await asyncio.gather(
            *(later(engine, r, leaves, pause) for r, (*_, leaves, pause) in zip(requests, mixture, strict=True))
        )
        until(partial(idle, engine))
    with running(max_running=1, max_context=64) as engine:
        alone = [await ask(engine, r) for r in requests]
    for together, apart, (*_, leaves, _pause) in zip(crowd, alone, mixture, strict=True):
        assert apart.reason is not None
        if leaves is None:
            assert (together.text, together.tokens, together.reason) == (apart.text, apart.tokens, apart.reason)
        else:
            assert together.tokens == apart.tokens[: len(together.tokens)]


# At the door


async def test_refusals_come_one_for_each_request_in_order() -> None:
    asked = [request("abc"), request("x" * 16), request([999]), request(""), request("x" * 15)]
    with running(max_context=16) as engine:
        arrivals = [Witness(r, 0.0) for r in asked]
        outcomes = engine.admit(arrivals)
        answers = [await read(stream) for stream, refusal in zip(arrivals, outcomes, strict=True) if refusal is None]
    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        PromptTooLong,
        InvalidRequest,
        InvalidRequest,
        type(None),
    ]
    assert "has 16 tokens" in str(outcomes[1])
    assert "takes 16 with the answer, so at most 15" in str(outcomes[1])
    assert [len(answer.tokens) for answer in answers] == [0, 0], "both had arrived a long time ago"
    assert [type(answer.error) for answer in answers] == [DeadlineExceeded, DeadlineExceeded]


async def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    with running(max_context=16) as engine:
        answer = await ask(engine, request("x" * 15, params=SamplingParams()))
    assert (answer.text, answer.reason) == ("x", FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("keep", "prompt"), [(None, "abcdefg"), (1, "g"), (3, "efg"), (7, "abcdefg"), (100, "abcdefg"), (-1, "abcdefg")]
)
async def test_of_a_prompt_the_last_tokens_can_be_kept(keep: int | None, prompt: str) -> None:
    with running(max_context=16) as engine:
        answer = await ask(engine, replace(asking("abcdefg", len(prompt)), truncate_prompt_tokens=keep))
    assert (answer.text, answer.chunks[0].prompt_tokens) == (prompt, len(prompt))


async def test_of_a_chat_too_its_last_tokens_are_kept() -> None:
    chat = ChatPrompt((ChatMessage("user", "a long story"),))
    with running() as engine:
        answer = await ask(engine, replace(asking("", 9), prompt=chat, truncate_prompt_tokens=5))
    assert answer.text == "storystor"


async def test_a_prompt_that_is_too_long_fits_when_it_is_cut() -> None:
    long = request("x" * 15 + "y" * 15, params=SamplingParams())
    made = [Witness(replace(long, truncate_prompt_tokens=keep), time.monotonic()) for keep in (None, 16, 15, -1, 0, -2)]
    with running(max_context=16) as engine:
        outcomes = engine.admit(made)
        answers = [await read(stream) for stream, refusal in zip(made, outcomes, strict=True) if refusal is None]
    kinds = [PromptTooLong, PromptTooLong, type(None), type(None), InvalidRequest, InvalidRequest]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [(answer.text, answer.reason) for answer in answers] == [("y", FinishReason.LENGTH)] * 2
    assert isinstance(outcomes[4], InvalidRequest)
    assert outcomes[4].param == "truncate_prompt_tokens"


async def test_a_bias_for_what_is_no_token_is_refused() -> None:
    biases = [((END, 1.0),), ((END + 1, 1.0),), ((3, 1.0), (-1, 1.0)), ((3, math.nan),), ()]
    made = [Witness(request(params=SamplingParams(max_tokens=1, logit_bias=bias)), time.monotonic()) for bias in biases]
    with running() as engine:
        outcomes = engine.admit(made)
    assert [None if o is None else (o.message, o.param) for o in outcomes] == [
        None,
        ("token id 257 is outside 0 to 256", "logit_bias"),
        ("token id -1 is outside 0 to 256", "logit_bias"),
        ("the bias of token 3 is not a finite number", "logit_bias"),
        None,
    ]


class Unreadable(ToyText):
    def encode(self, prompts: Seq[Prompt]) -> list[list[int]]:  # type: ignore[override]
        raise OOPS


class UnreadableRunner(ToyRunner):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.text = Unreadable()


async def test_admission_never_raises() -> None:
    with running(UnreadableRunner) as engine:
        outcomes = engine.admit([Witness(request(), 0.0), Witness(request(), 0.0)])
    assert [type(outcome) for outcome in outcomes] == [InternalError, InternalError]
    assert "scripted" not in str(outcomes[0])


async def test_the_queue_is_first_come_first_served_and_bounded() -> None:
    with stepped(max_running=1, max_waiting=2) as (engine, runner):
        first = admitted(engine, asking("a", 2))
        until(lambda: bool(runner.begun))
        others = admitted(engine, *(asking(letter, 1) for letter in "bcde"))
        runner.go()
        until(lambda: len(others[2].errors) == len(others[3].errors) == 1)
        runner.let_go()
        answers = [await read(stream) for stream in (*first, *others)]
    assert [answer.text for answer in answers] == ["aa", "b", "c", "", ""]
    assert [type(answer.error) for answer in answers[3:]] == [QueueFull, QueueFull]
    assert [bytes(s.tokens[:1]) for begun in runner.begun for s in begun] == [b"a", b"a", b"b", b"c"]


# Steps


async def test_no_step_has_more_rows_than_allowed_and_a_long_prompt_runs_beside_decoders() -> None:
    with stepped(max_running=3, max_step_tokens=8) as (engine, runner):
        runner.let_go()
        short = admitted(engine, asking("ab", 30))
        long = admitted(engine, asking("x" * 50, 4), asking("y" * 30, 4))
        answers = [await read(stream) for stream in (*short, *long)]
    assert [len(answer.tokens) for answer in answers] == [30, 4, 4]
    assert max(runner.rows) == 8
    spoke = [s for begun in runner.begun for s in begun].count(runner.begun[0][0])
    assert spoke == 30, "one step for each token, none of them skipped"
    assert all(short[0] is begun[0].stream for begun in runner.begun[:30])


async def test_all_slots_are_free_after_the_crowd() -> None:
    with running(max_running=2) as engine:
        await asyncio.gather(*(ask(engine, asking("abc", 5)) for _ in range(6)))
        until(partial(idle, engine))
        stats = engine.stats()
    assert (stats.slots, stats.tokens_held, stats.arena_tokens) == (2, 0, 2 * 2048)


async def test_the_counters_count() -> None:
    clock = Clock()
    with stepped(clock, max_running=2, max_waiting=8, max_context=32) as (engine, runner):
        admitted(engine, asking("abcd", 3), arrived=clock.now)
        until(lambda: len(runner.begun) == 1)
        admitted(engine, asking("x", 1), arrived=clock.now)
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        clock.now += 2
        runner.go()
        assert engine.stats().tokens_held == 4
        runner.let_go()
        until(partial(idle, engine))
        until(lambda: engine.stats().generated_tokens == 4)
        stats = engine.stats()
    assert (stats.steps, stats.rows, stats.decode_rows, stats.failed_steps) == (3, 7, 3, 0)
    assert stats.busy_s == 2


async def test_the_age_of_a_step_tells_a_hung_one() -> None:
    clock = Clock()
    with stepped(clock) as (engine, runner):
        assert engine.step_age() == 0
        admitted(engine, asking("a", 1), arrived=clock.now)
        until(lambda: bool(runner.begun))
        clock.now += 7
        assert engine.step_age() == 7
        runner.let_go()
        until(lambda: engine.step_age() == 0)


# Those who leave


async def test_a_closed_stream_frees_its_slot_before_the_next_step() -> None:
    with stepped(max_running=1) as (engine, runner):
        leaver, heir = admitted(engine, asking("a", 50), asking("b", 1))
        until(lambda: bool(runner.begun))
        runner.go(3)
        before = len(leaver.seen)
        leaver.close()
        runner.go()
        assert len(leaver.seen) == before + 1, "only the token in flight"
        assert runner.begun[-1][0].stream is heir
        runner.let_go()
        assert (await read(heir)).text == "b"
    assert leaver.ends == 0


async def test_who_leaves_the_queue_never_runs() -> None:
    with stepped(max_running=1) as (engine, runner):
        first, leaver, last = admitted(engine, asking("a", 2), asking("b", 2), asking("c", 1))
        until(lambda: bool(runner.begun))
        leaver.close()
        runner.let_go()
        assert (await read(last)).text == "c"
        assert (await read(first)).text == "aa"
    assert leaver.seen == []


async def test_time_runs_out_while_running_and_while_waiting() -> None:
    clock = Clock()
    with stepped(clock, max_running=1) as (engine, runner):
        runs, waits, stays = admitted(engine, request("a", 5.0), request("b", 5.0), asking("c", 1), arrived=clock.now)
        until(lambda: bool(runner.begun))
        runner.go()
        clock.now += 5
        runner.let_go()
        answers = [await read(stream) for stream in (runs, waits, stays)]
    assert [answer.text for answer in answers] == ["aa", "", "c"]
    assert [type(answer.error) for answer in answers] == [DeadlineExceeded, DeadlineExceeded, type(None)]
    assert [stream.ends for stream in (runs, waits, stays)] == [1, 1, 1]


async def test_readers_whose_event_loop_is_closed_are_let_go() -> None:
    (orphan,) = await asyncio.to_thread(streams, [asking("a", 2000)], arrived=asyncio.get_running_loop().time())
    with stepped(max_running=1) as (engine, runner):
        runner.let_go()
        assert engine.admit([orphan]) == [None]
        until(partial(idle, engine))
        assert orphan.closed
        assert len(orphan.seen) <= 1
        assert (await ask(engine, asking("b", 1))).text == "b"


# When the model fails


async def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    with running(partial(FaultyRunner, script=[OOPS]), max_running=2, max_step_tokens=3) as engine:
        hit, spared = admitted(engine, asking("abcdef", 2), asking("xyz", 4))
        answers = [await read(hit), await read(spared)]
        engine.check()
        assert engine.stats().failed_steps == 1
    assert isinstance(answers[0].error, InternalError)
    assert "scripted" not in answers[0].error.message
    assert answers[1].text == "xyzx"
    assert (hit.ends, spared.ends) == (1, 1)


class Miscounting(ToyRunner):
    """Returns `extra` tokens too many (or too few) while anyone asks for nine."""

    def __init__(self, config: EngineConfig, extra: int) -> None:
        super().__init__(config)
        self._extra = extra

    def run(self, step: Step) -> list[Outcome]:
        sampled = super().run(step)
        if all(advance.sequence.limit != 9 for advance in step.advances):
            return sampled
        return [*sampled, *[(Sampled(1),)] * self._extra][: len(sampled) + self._extra]


class Speechless(ToyRunner):
    """Has no third token for whoever asked for nine."""

    def run(self, step: Step) -> list[Outcome]:
        asking = [advance.sequence for advance in step.advances if advance.samples]
        return [
            InternalError("no numbers") if one.limit == 9 and one.generated == 2 else outcome
            for one, outcome in zip(asking, super().run(step), strict=True)
        ]


async def test_one_without_a_token_ends_in_an_error_and_its_neighbours_go_on() -> None:
    with running(Speechless, max_running=2) as engine:
        broken, whole = admitted(engine, asking("ab", 9), asking("cd", 5))
        lost, kept = await read(broken), await read(whole)
        assert (lost.text, type(lost.error)) == ("ab", InternalError)
        assert (kept.text, kept.error) == ("cdcdc", None)
        assert (broken.ends, whole.ends) == (1, 1)
        until(lambda: engine.stats().running == 0)
        assert engine.stats().failed_steps == 0


@pytest.mark.parametrize("extra", [-1, 1])
async def test_a_step_with_the_wrong_number_of_tokens_is_a_failed_step(extra: int) -> None:
    """Also for the one whose answer was complete with it: it gets an error, not silence."""
    with running(partial(Miscounting, extra=extra)) as engine:
        members = admitted(engine, asking("a", 1), asking("b", 9))
        answers = [await read(stream) for stream in members]
        assert (await ask(engine, asking("c", 1))).text == "c"
    assert [type(answer.error) for answer in answers] == [InternalError, InternalError]
    assert [stream.ends for stream in members] == [1, 1]


async def test_steps_that_fail_one_after_another_make_the_engine_unhealthy() -> None:
    with running(partial(FaultyRunner, script=[OOPS] * 3)) as engine:
        for _ in range(3):
            engine.check()
            answer = await ask(engine, request())
            assert isinstance(answer.error, InternalError)
        with pytest.raises(EngineStalled, match="3 steps failed in a row"):
            engine.check()
        assert (await ask(engine, request())).error is None
        engine.check()


async def test_failures_with_a_success_between_them_do_not_add_up() -> None:
    with running(partial(FaultyRunner, script=[OOPS, OOPS, None, OOPS, OOPS])) as engine:
        for _ in range(5):
            await ask(engine, asking("a", 1))
        engine.check()
        assert engine.stats().failed_steps == 4


async def test_a_model_that_always_fails_still_answers_everyone_once() -> None:
    with running(partial(FaultyRunner, script=[OOPS] * 1000), max_running=3) as engine:
        everyone = admitted(engine, *(request() for _ in range(20)))
        answers = [await read(stream) for stream in everyone]
        until(partial(idle, engine))
    assert all(isinstance(answer.error, InternalError) for answer in answers)
    assert [stream.ends for stream in everyone] == [1] * 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_thread_dies_everyone_is_told_and_nobody_gets_in() -> None:
    with running(partial(FaultyRunner, script=[None, SystemError(), KeyboardInterrupt()]), max_running=1) as engine:
        assert (await ask(engine, asking("a", 1))).text == "a"
        everyone = admitted(engine, *(request() for _ in range(3)))
        answers = [await read(stream) for stream in everyone]
        engine.stop()
        with pytest.raises(EngineStalled, match="thread has ended"):
            engine.check()
        (outcome,) = engine.admit([Witness(request(), 0.0)])
    assert [type(answer.error) for answer in answers] == [InternalError, NotReady, NotReady]
    assert [stream.ends for stream in everyone] == [1, 1, 1]
    assert isinstance(outcome, NotReady)


class Dying(SteppedRunner):
    def run(self, step: Step) -> list[Outcome]:
        super().run(step)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_who_arrives_during_the_last_step_of_a_dying_thread_is_told_too() -> None:
    with stepped(kind=Dying) as (engine, runner):
        (first,) = admitted(engine, request())
        until(lambda: bool(runner.begun))
        (late,) = admitted(engine, request())
        runner.let_go()
        answers = [await read(stream) for stream in (first, late)]
        assert isinstance(engine.admit([Witness(request(), 0.0)])[0], NotReady)
    assert [type(answer.error) for answer in answers] == [NotReady, NotReady]


# Start and stop


async def test_stopping_ends_the_step_under_way_and_tells_everyone() -> None:
    with stepped(max_running=1) as (engine, runner):
        runs, waits = admitted(engine, asking("a", 9), asking("b", 9))
        until(lambda: bool(runner.begun))
        (late,) = admitted(engine, asking("c", 9))
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        until(lambda: isinstance(engine.admit([Witness(request(), 0.0)])[0], NotReady))
        refused = engine.admit([Witness(request("x" * 9999), 0.0), Witness(request(), 0.0)])
        runner.let_go()
        stopping.join()
        answers = [await read(stream) for stream in (runs, waits, late)]
    assert [type(outcome) for outcome in refused] == [PromptTooLong, NotReady]
    assert [answer.text for answer in answers] == ["a", "", ""]
    assert [type(answer.error) for answer in answers] == [NotReady, NotReady, NotReady]
    assert [stream.ends for stream in (runs, waits, late)] == [1, 1, 1]
    with pytest.raises(EngineStalled):
        engine.check()


def test_stopping_twice_is_stopping_once() -> None:
    with running() as engine:
        engine.stop()


def test_what_was_never_started_can_be_stopped() -> None:
    Engine(lambda: ToyRunner(EngineConfig()), EngineConfig()).stop()


def test_stopping_while_the_model_loads_ends_the_thread_when_it_is_loaded() -> None:
    loading, loaded = threading.Event(), threading.Event()

    def make(config: EngineConfig) -> ToyRunner:
        loading.set()
        assert loaded.wait(PATIENCE_S)
        return ToyRunner(config)

    engine = Engine(lambda: make(EngineConfig()), EngineConfig())
    starting = threading.Thread(target=engine.start)
    starting.start()
    assert loading.wait(PATIENCE_S)
    engine.stop(timeout_s=0)
    loaded.set()
    starting.join()
    engine.stop(PATIENCE_S)
    with pytest.raises(EngineStalled, match="thread has ended"):
        engine.check()


def test_the_model_is_loaded_on_the_engines_own_thread_and_says_how_it_runs() -> None:
    threads: list[str] = []

    def make(config: EngineConfig) -> ToyRunner:
        threads.append(threading.current_thread().name)
        return ToyRunner(config)

    with running(make) as engine:
        assert threads == ["engine"]
        assert engine.kind == "toy"


def test_what_loading_raised_is_raised_by_start() -> None:
    def make() -> ToyRunner:
        raise OOPS

    engine = Engine(make, EngineConfig())
    with pytest.raises(RuntimeError, match="scripted"):
        engine.start()
    engine.stop()
    with pytest.raises(EngineStalled):
        engine.check()
