from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from functools import partial
from types import FrameType

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.config import NativeOptions
from serve_app.core.events import FinishReason, TextToken
from serve_app.core.queries import (
    AddedToken,
    Detokenize,
    GetModelInfo,
    GetTokenizerInfo,
    ModelInfo,
    Query,
    Tokenize,
    TokenizerInfo,
)
from serve_app.core.requests import (
    GenerationRequest,
    SamplingParams,
    TextPrompt,
)
from serve_app.engines.native import kv_cache
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.failure import failure
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.sequence import Outcome, Sampled, Step
from serve_app.engines.protocol import Cause, EngineStalled
from serve_app.engines.toy import END, ToyRunner
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    QueueFull,
)

from .helpers import (
    TIMEOUT_S,
    Answer,
    FaultyRunner,
    ManualClock,
    Panic,
    SteppedRunner,
    admit,
    generate,
    limited_request,
    open_streams,
    read,
    request,
    running,
    stepped,
    streams,
    wait_until,
)

OOPS = RuntimeError("scripted")


def idle(engine: NativeEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == 0


# Queries


def test_queries_are_answered_without_a_step() -> None:
    with running(ToyRunner, max_context=64) as engine:
        tokens = engine.answer(Tokenize(TextPrompt("hi"), special_tokens=True))
        assert tokens == (TextToken(ord("h"), "h", 0, 1), TextToken(ord("i"), "i", 1, 2))
        assert engine.answer(Detokenize((*b"hi", END))) == "hi<end>"
        assert engine.answer(Detokenize((*b"hi", END), skip_special_tokens=True)) == "hi"
        info = ModelInfo(context=64, vocabulary=END + 1, special_ids=frozenset({END}), quantization="none")
        assert engine.answer(GetModelInfo()) == info
        assert engine.answer(GetTokenizerInfo()) == TokenizerInfo(
            "ToyText", {END: AddedToken("<end>")}, eos_token="<end>"
        )
        assert isinstance(engine.answer(Detokenize((END + 1,))), InvalidRequest)
        assert engine.stats().steps == 0


def test_an_unknown_query_is_an_internal_error() -> None:
    with running(ToyRunner) as engine:
        assert isinstance(engine.answer(Query()), InternalError)


# Answers


async def test_an_answer_is_complete_and_counts_its_prompt() -> None:
    with running() as engine:
        answer = await generate(engine, limited_request("abc", 5))
    assert (answer.text, answer.reason, answer.error) == ("abcab", FinishReason.LENGTH, None)
    assert answer.chunks[0].prompt_tokens == 3
    assert answer.chunks[0].queue_s >= 0


async def test_an_end_token_ends_the_answer() -> None:
    with running() as engine:
        answer = await generate(engine, limited_request([104, 105, END], 50))
    assert (answer.text, answer.reason) == ("hi", FinishReason.STOP)


async def test_special_tokens_and_stops_are_included_on_request() -> None:
    params = SamplingParams(max_tokens=50, skip_special_tokens=False, include_stop_str_in_output=True)
    with running() as engine:
        ended = await generate(engine, request([104, 105, END], params=params))
        ignored = await generate(engine, request([104, END], params=replace(params, max_tokens=4, ignore_eos=True)))
    assert (ended.text, ended.reason) == ("hi<end>", FinishReason.STOP)
    assert (ignored.text, ignored.reason) == ("h<end>h<end>", FinishReason.LENGTH)


async def test_characters_of_several_bytes_are_not_cut() -> None:
    with running() as engine:
        answer = await generate(engine, limited_request("a€é😀", 20))
    assert answer.text == "a€é😀a€é😀"
    assert answer.tokens == list(answer.text.encode())


async def test_a_stop_string_ends_the_answer_and_held_text_is_sent_without_one() -> None:
    with running() as engine:
        stopped = await generate(engine, request("one two ", params=SamplingParams(max_tokens=30, stop=("two one",))))
        missed = await generate(engine, request("one two ", params=SamplingParams(max_tokens=7, stop=("two one",))))
    assert (stopped.text, stopped.reason) == ("one ", FinishReason.STOP)
    assert (missed.text, missed.reason) == ("one two", FinishReason.LENGTH)
    assert missed.events[-1].text == "two"


REQUESTS = st.lists(
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
@given(shapes=REQUESTS)
async def test_an_answer_does_not_depend_on_concurrent_requests(
    shapes: list[tuple[str, int, tuple[str, ...], int | None, int]],
) -> None:
    """For requests of any length that arrive at any time and may be cancelled early."""

    async def later(engine: NativeEngine, request: GenerationRequest, leave_after: int | None, pause: int) -> Answer:
        for _ in range(pause):
            await asyncio.sleep(0)
        return await generate(engine, request, leave_after)

    requests = [request(text, params=SamplingParams(max_tokens=n, stop=stop)) for text, n, stop, *_ in shapes]
    with running(max_running=3, max_step_tokens=5, max_context=64) as engine:
        concurrent = await asyncio.gather(
            *(later(engine, r, leave, pause) for r, (*_, leave, pause) in zip(requests, shapes, strict=True))
        )
        wait_until(partial(idle, engine))
    with running(max_running=1, max_context=64) as engine:
        alone = [await generate(engine, r) for r in requests]
    for answer, expected, (*_, leave, _pause) in zip(concurrent, alone, shapes, strict=True):
        assert expected.reason is not None
        if leave is None:
            assert (answer.text, answer.tokens, answer.reason) == (expected.text, expected.tokens, expected.reason)
        else:
            assert answer.tokens == expected.tokens[: len(answer.tokens)]


async def test_only_the_first_chunk_carries_the_prompt() -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=0)
    with running(max_step_tokens=4, max_running=3) as engine:
        answer = await generate(engine, replace(request("hello you", params=params), prompt_details=True))
        other = await generate(engine, limited_request("hello you", 3))
    first, *others = answer.chunks
    assert first.prompt is not None
    assert first.prompt.text == "hello you"
    assert bytes(token.token_id for token in first.prompt.tokens) == b"hello you"
    assert bytes(logprobs.chosen.token_id for logprobs in first.prompt.logprobs) == b"ello you"
    assert all(chunk.prompt is None for chunk in (*others, *other.chunks))
    assert answer.text == "hel"


async def test_an_embedding_is_one_chunk_without_tokens() -> None:
    with running(max_step_tokens=4, max_running=3) as engine:
        requests = [replace(request("ab" * n), embed=True) for n in range(1, 9)]
        answers = [await read(stream) for stream in admit(engine, *requests)]
        stats = engine.stats()
    for n, answer in enumerate(answers, start=1):
        (chunk,) = answer.chunks
        assert (answer.error, chunk.events, chunk.finished, chunk.prompt_tokens) == (None, (), True, 2 * n)
        assert chunk.embedding == pytest.approx((0, 0.5**0.5, 0.5**0.5, 0))
    assert stats.generated_tokens == 0
    assert (stats.running, stats.waiting) == (0, 0)


# Steps


async def test_the_queue_is_bounded_and_served_in_order_of_arrival() -> None:
    with stepped(max_running=1, max_waiting=2) as (engine, runner):
        first = admit(engine, limited_request("a", 2))
        wait_until(lambda: bool(runner.begun))
        others = admit(engine, *(limited_request(letter, 1) for letter in "bcde"))
        runner.permit()
        wait_until(lambda: len(others[2].errors) == len(others[3].errors) == 1)
        runner.unblock()
        answers = [await read(stream) for stream in (*first, *others)]
    assert [answer.text for answer in answers] == ["aa", "b", "c", "", ""]
    assert [type(answer.error) for answer in answers[3:]] == [QueueFull, QueueFull]
    assert [bytes(s.tokens[:1]) for begun in runner.begun for s in begun] == [b"a", b"a", b"b", b"c"]


async def test_a_long_prompt_runs_beside_decoding_sequences_within_the_row_limit() -> None:
    with stepped(max_running=3, max_step_tokens=8) as (engine, runner):
        runner.unblock()
        short = admit(engine, limited_request("ab", 30))
        long = admit(engine, limited_request("x" * 50, 4), limited_request("y" * 30, 4))
        answers = [await read(stream) for stream in (*short, *long)]
    assert [len(answer.tokens) for answer in answers] == [30, 4, 4]
    assert max(runner.rows) == 8
    decode_steps = [s for begun in runner.begun for s in begun].count(runner.begun[0][0])
    assert decode_steps == 30, "one step for each token"
    assert all(short[0] is begun[0].stream for begun in runner.begun[:30])


async def test_all_slots_are_free_after_the_last_answer() -> None:
    with running(max_running=2) as engine:
        await asyncio.gather(*(generate(engine, limited_request("abc", 5)) for _ in range(6)))
        wait_until(partial(idle, engine))
        stats = engine.stats()
    assert (stats.slots, stats.tokens_held, stats.kv_tokens) == (2, 0, 2 * 2048)


async def test_stats_count_steps_rows_and_tokens() -> None:
    clock = ManualClock()
    with stepped(clock, max_running=2, max_waiting=8, max_context=32) as (engine, runner):
        admit(engine, limited_request("abcd", 3), arrived=clock.now)
        wait_until(lambda: len(runner.begun) == 1)
        admit(engine, limited_request("x", 1), arrived=clock.now)
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        clock.now += 2
        runner.permit()
        assert engine.stats().tokens_held == 4
        runner.unblock()
        wait_until(partial(idle, engine))
        wait_until(lambda: engine.stats().generated_tokens == 4)
        stats = engine.stats()
    assert (stats.steps, stats.rows, stats.decode_rows, stats.failed_passes) == (3, 7, 3, {})
    assert stats.busy_s == 2


async def test_the_step_age_grows_while_a_step_hangs() -> None:
    clock = ManualClock()
    with stepped(clock) as (engine, runner):
        assert engine.step_age() == 0
        admit(engine, limited_request("a", 1), arrived=clock.now)
        wait_until(lambda: bool(runner.begun))
        clock.now += 7
        assert engine.step_age() == 7
        runner.unblock()
        wait_until(lambda: engine.step_age() == 0)


# Idling


def calls_in(module: str, prompt_tokens: int, wake_ups: int) -> int:
    """Function calls in a module on the engine's thread while the engine goes idle `wake_ups` times.

    Before that the prefix cache is filled with a prompt of `prompt_tokens`.
    """
    calls: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == module:
            calls.append(frame.f_code.co_name)

    threading.setprofile(profile)
    try:
        with running(max_context=4096, max_step_tokens=4096) as engine:
            (stream,) = streams([limited_request("x" * prompt_tokens, 1)], arrived=time.monotonic())
            assert engine.admit([stream]) == [None]
            wait_until(lambda: stream.terminal_events == 1 and idle(engine))
            calls.clear()
            for _ in range(wake_ups):
                steps = engine.stats().steps
                assert engine.admit(streams([limited_request("y", 1)], arrived=time.monotonic())) == [None]
                wait_until(lambda seen=steps: engine.stats().steps > seen and idle(engine))  # type: ignore[misc]
    finally:
        threading.setprofile(None)
    return len(calls)


# After thousands of other tests in one process, the engine's thread did not start under the profiler.
@pytest.mark.long
def test_going_idle_does_no_work_for_the_content_of_the_prefix_cache() -> None:
    few, many = (calls_in(kv_cache.__file__, tokens, wake_ups=20) for tokens in (BLOCK, 60 * BLOCK))
    assert many < few + 60, "less than one call for each cached block"


# Cancellation and deadlines


async def test_a_closed_stream_frees_its_slot_before_the_next_step() -> None:
    with stepped(max_running=1) as (engine, runner):
        cancelled, successor = admit(engine, limited_request("a", 50), limited_request("b", 1))
        wait_until(lambda: bool(runner.begun))
        runner.permit(3)
        before = len(cancelled.tokens)
        cancelled.close()
        runner.permit()
        assert len(cancelled.tokens) == before + 1, "only the token of the current step"
        assert runner.begun[-1][0].stream is successor
        runner.unblock()
        assert (await read(successor)).text == "b"
    assert cancelled.terminal_events == 0


async def test_a_request_cancelled_in_the_queue_never_runs() -> None:
    with stepped(max_running=1) as (engine, runner):
        first, cancelled, last = admit(
            engine, limited_request("a", 2), limited_request("b", 2), limited_request("c", 1)
        )
        wait_until(lambda: bool(runner.begun))
        cancelled.close()
        runner.unblock()
        assert (await read(last)).text == "c"
        assert (await read(first)).text == "aa"
    assert cancelled.tokens == []


async def test_a_deadline_passes_while_running_and_while_waiting() -> None:
    clock = ManualClock()
    with stepped(clock, max_running=1) as (engine, runner):
        expires_running, expires_waiting, stays = admit(
            engine, request("a", 5.0), request("b", 5.0), limited_request("c", 1), arrived=clock.now
        )
        wait_until(lambda: bool(runner.begun))
        runner.permit()
        clock.now += 5
        runner.unblock()
        answers = [await read(stream) for stream in (expires_running, expires_waiting, stays)]
    assert [answer.text for answer in answers] == ["aa", "", "c"]
    assert [type(answer.error) for answer in answers] == [DeadlineExceeded, DeadlineExceeded, type(None)]
    assert [stream.terminal_events for stream in (expires_running, expires_waiting, stays)] == [1, 1, 1]


async def test_streams_of_a_closed_event_loop_are_cancelled() -> None:
    (orphaned,) = await asyncio.to_thread(
        streams, [limited_request("a", 2000)], arrived=asyncio.get_running_loop().time()
    )
    with stepped(max_running=1) as (engine, runner):
        runner.unblock()
        assert engine.admit([orphaned]) == [None]
        wait_until(partial(idle, engine))
        assert orphaned.closed
        assert len(orphaned.tokens) <= 1
        assert (await generate(engine, limited_request("b", 1))).text == "b"


# Failures of the model


async def test_a_request_that_fails_every_step_ends_and_the_others_continue() -> None:
    with running(partial(ToyRunner, fails_on="bad"), max_running=3) as engine:
        members = admit(engine, limited_request("abc", 4), limited_request("bad", 4), limited_request("xyz", 4))
        answers = [await read(stream) for stream in members]
        engine.check()
        assert engine.stats().failed_passes == {Cause.ERROR: 4}, "of 3 requests, of 2, and twice of 1"
        assert engine.stats().failed_sequences == {Cause.ERROR: 1}
    assert [answer.text for answer in answers] == ["abca", "", "xyzx"]
    assert isinstance(answers[1].error, InternalError)
    assert "fails on" not in answers[1].error.message
    assert [stream.terminal_events for stream in members] == [1, 1, 1]


async def test_a_pass_that_fails_once_fails_no_request() -> None:
    with running(partial(FaultyRunner, script=[OOPS, None, MemoryError()])) as engine:
        assert (await generate(engine, limited_request("abc", 4))).text == "abca"
        assert engine.stats().failed_passes == {Cause.ERROR: 1, Cause.MEMORY: 1}
        assert engine.stats().failed_sequences == {}


class SmallMemory(ToyRunner):
    """Has memory for passes of at most `most` rows."""

    def __init__(self, config: NativeOptions, most: int) -> None:
        super().__init__(config)
        self._most = most

    def run(self, step: Step) -> list[Outcome]:
        if step.rows > self._most:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return super().run(step)


@pytest.mark.parametrize("most", [1, 2, 7])
async def test_when_memory_is_full_steps_are_computed_in_smaller_passes(most: int) -> None:
    with running(partial(SmallMemory, most=most), max_running=4, draft_tokens=4) as engine:
        members = admit(engine, *(limited_request(text * 5, 9) for text in ("abcab", "xyzxy", "mnopq")))
        answers = [await read(stream) for stream in members]
        assert engine.stats().failed_sequences == {}
        assert set(engine.stats().failed_passes) == {Cause.MEMORY}
    assert [answer.text for answer in answers] == ["abcababca", "xyzxyxyzx", "mnopqmnop"]


async def test_a_request_that_memory_does_not_suffice_for_gets_an_error() -> None:
    with running(partial(SmallMemory, most=0)) as engine:
        answer = await generate(engine, limited_request("abc", 4))
        assert engine.stats().failed_sequences == {Cause.MEMORY: 1}
    assert isinstance(answer.error, InternalError)
    assert "memory of this replica" in answer.error.message


class Miscounting(ToyRunner):
    """Returns `extra` tokens too many (or too few) while a sequence has max_tokens 9."""

    def __init__(self, config: NativeOptions, extra: int) -> None:
        super().__init__(config)
        self._extra = extra

    def run(self, step: Step) -> list[Outcome]:
        sampled = super().run(step)
        if all(advance.sequence.max_tokens != 9 for advance in step.advances):
            return sampled
        return [*sampled, *[(Sampled(1),)] * self._extra][: len(sampled) + self._extra]


async def test_a_panic_of_a_native_extension_fails_only_its_step() -> None:
    with running(partial(FaultyRunner, script=[Panic("scripted")] * 2)) as engine:
        failed = await generate(engine, limited_request("a", 1))
        assert (await generate(engine, limited_request("b", 1))).text == "b"
        engine.check()
    assert isinstance(failed.error, InternalError)


class MissingToken(ToyRunner):
    """Computes NaN in place of the third token of sequences with max_tokens 9."""

    def run(self, step: Step) -> list[Outcome]:
        sampling = [advance.sequence for advance in step.advances if advance.samples]
        return [
            failure(Cause.NOT_FINITE) if sequence.max_tokens == 9 and sequence.generated == 2 else outcome
            for sequence, outcome in zip(sampling, super().run(step), strict=True)
        ]


async def test_a_sequence_without_a_token_fails_and_the_others_continue() -> None:
    with running(MissingToken, max_running=2) as engine:
        failing, healthy = admit(engine, limited_request("ab", 9), limited_request("cd", 5))
        failed, complete = await read(failing), await read(healthy)
        assert (failed.text, type(failed.error)) == ("ab", InternalError)
        assert (complete.text, complete.error) == ("cdcdc", None)
        assert (failing.terminal_events, healthy.terminal_events) == (1, 1)
        wait_until(lambda: engine.stats().running == 0)
        assert engine.stats().failed_passes == {}
        assert engine.stats().failed_sequences == {Cause.NOT_FINITE: 1}


@pytest.mark.parametrize("extra", [-1, 1])
async def test_a_request_for_which_the_runner_returns_the_wrong_number_of_tokens_fails(extra: int) -> None:
    with running(partial(Miscounting, extra=extra)) as engine:
        members = admit(engine, limited_request("a", 1), limited_request("b", 9))
        answers = [await read(stream) for stream in members]
        assert (await generate(engine, limited_request("c", 1))).text == "c"
    assert [type(answer.error) for answer in answers] == [type(None), InternalError]
    assert [stream.terminal_events for stream in members] == [1, 1]


async def test_consecutive_failed_steps_make_the_engine_unhealthy() -> None:
    with running(partial(FaultyRunner, script=[OOPS] * 6)) as engine:
        for _ in range(3):
            engine.check()
            answer = await generate(engine, request())
            assert isinstance(answer.error, InternalError)
        with pytest.raises(EngineStalled, match="3 steps failed in a row"):
            engine.check()
        assert (await generate(engine, request())).error is None
        engine.check()


async def test_a_successful_step_resets_the_failure_count() -> None:
    with running(partial(FaultyRunner, script=[*[OOPS] * 4, None, *[OOPS] * 4])) as engine:
        for _ in range(5):
            await generate(engine, limited_request("a", 1))
        engine.check()
        assert engine.stats().failed_sequences == {Cause.ERROR: 4}


async def test_every_request_to_a_failing_model_ends_exactly_once() -> None:
    with running(partial(FaultyRunner, script=[OOPS] * 1000), max_running=3) as engine:
        all_streams = admit(engine, *(request() for _ in range(20)))
        answers = [await read(stream) for stream in all_streams]
        wait_until(partial(idle, engine))
    assert all(isinstance(answer.error, InternalError) for answer in answers)
    assert [stream.terminal_events for stream in all_streams] == [1] * 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_the_thread_dies_all_requests_end_and_new_ones_are_refused() -> None:
    with running(
        partial(FaultyRunner, script=[None, *[SystemError()] * 2, KeyboardInterrupt()]), max_running=1
    ) as engine:
        assert (await generate(engine, limited_request("a", 1))).text == "a"
        all_streams = admit(engine, *(request() for _ in range(3)))
        answers = [await read(stream) for stream in all_streams]
        engine.stop()
        with pytest.raises(EngineStalled, match="thread has ended"):
            engine.check()
        (outcome,) = engine.admit(open_streams(request()))
    assert [type(answer.error) for answer in answers] == [InternalError, NotReady, NotReady]
    assert [stream.terminal_events for stream in all_streams] == [1, 1, 1]
    assert isinstance(outcome, NotReady)


class DyingRunner(SteppedRunner):
    def run(self, step: Step) -> list[Outcome]:
        super().run(step)
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_request_admitted_during_the_last_step_of_a_dying_thread_ends() -> None:
    with stepped(kind=DyingRunner) as (engine, runner):
        (first,) = admit(engine, request())
        wait_until(lambda: bool(runner.begun))
        (late,) = admit(engine, request())
        runner.unblock()
        answers = [await read(stream) for stream in (first, late)]
        assert isinstance(engine.admit(open_streams(request()))[0], NotReady)
    assert [type(answer.error) for answer in answers] == [NotReady, NotReady]


# Start and stop


async def test_stopping_completes_the_current_step_and_ends_all_requests() -> None:
    with stepped(max_running=1) as (engine, runner):
        first, second = admit(engine, limited_request("a", 9), limited_request("b", 9))
        wait_until(lambda: bool(runner.begun))
        (late,) = admit(engine, limited_request("c", 9))
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        wait_until(lambda: isinstance(engine.admit(open_streams(request()))[0], NotReady))
        refused = engine.admit(open_streams(request("x" * 9999), request()))
        runner.unblock()
        stopping.join()
        answers = [await read(stream) for stream in (first, second, late)]
    assert [type(outcome) for outcome in refused] == [PromptTooLong, NotReady]
    assert [answer.text for answer in answers] == ["a", "", ""]
    assert [type(answer.error) for answer in answers] == [NotReady, NotReady, NotReady]
    assert [stream.terminal_events for stream in (first, second, late)] == [1, 1, 1]
    with pytest.raises(EngineStalled):
        engine.check()


def test_an_engine_can_be_stopped_twice() -> None:
    with running() as engine:
        engine.stop()


def test_an_engine_that_never_started_can_be_stopped() -> None:
    NativeEngine(lambda: ToyRunner(NativeOptions()), NativeOptions()).stop()


def test_stopping_during_loading_ends_the_thread_after_loading() -> None:
    loading, loaded = threading.Event(), threading.Event()

    def make(config: NativeOptions) -> ToyRunner:
        loading.set()
        assert loaded.wait(TIMEOUT_S)
        return ToyRunner(config)

    engine = NativeEngine(lambda: make(NativeOptions()), NativeOptions())
    starting = threading.Thread(target=engine.start)
    starting.start()
    assert loading.wait(TIMEOUT_S)
    engine.stop(timeout_s=0)
    loaded.set()
    starting.join()
    engine.stop(TIMEOUT_S)
    with pytest.raises(EngineStalled, match="thread has ended"):
        engine.check()


def test_the_model_is_loaded_on_the_engine_thread() -> None:
    threads: list[str] = []

    def make(config: NativeOptions) -> ToyRunner:
        threads.append(threading.current_thread().name)
        return ToyRunner(config)

    with running(make) as engine:
        assert threads == ["engine"]
        assert engine.kind == "toy"


def test_start_raises_what_loading_raised() -> None:
    def make() -> ToyRunner:
        raise OOPS

    engine = NativeEngine(make, NativeOptions())
    with pytest.raises(RuntimeError, match="scripted"):
        engine.start()
    engine.stop()
    with pytest.raises(EngineStalled):
        engine.check()
