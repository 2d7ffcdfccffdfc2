from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from serve_app.core.events import Chunk, FinishReason, Logprobs, TextDelta, TokenLogprob, ToolCallDelta
from serve_app.core.requests import SamplingParams
from serve_app.engines.stream import Token, TokenStream, wake_all
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.toy import END, ToyDecoder
from serve_app.errors import InternalError
from tests.engines.native.helpers import Answer, Panic, ScriptedParser, read, request, streams

LONG_S = 1000.0


def token(letter: str, reason: FinishReason | None = None) -> Token:
    return Token(ord(letter), 0.0, reason)


def send(stream: TokenStream, *letters: str, end: bool = False) -> None:
    """Put a token for each letter and wake the stream; with `end` the last token finishes the answer."""
    for number, letter in enumerate(letters, start=1):
        stream.put(token(letter, FinishReason.LENGTH if end and number == len(letters) else None))
    stream.wake()


def text_of(chunk: Chunk) -> str:
    return "".join(e.text for e in chunk.events)


def open_stream(params: SamplingParams | None = None) -> TokenStream:
    stream = TokenStream(replace(request(params=params), arrived=10.0))
    stream.open(3, ToyDecoder(), AnswerPlan(stream.request.params))
    return stream


async def test_the_first_token_is_sent_at_once() -> None:
    stream = open_stream()
    chunks = stream.chunks(LONG_S)
    send(stream, "a")
    assert text_of(await anext(chunks)) == "a"
    await chunks.aclose()


async def test_later_tokens_are_gathered_and_the_last_one_is_sent_at_once() -> None:
    stream = open_stream()
    chunks = stream.chunks(LONG_S)
    send(stream, "a")
    assert text_of(await anext(chunks)) == "a"
    rest = asyncio.create_task(anext(chunks))
    for letter in "bcd":
        send(stream, letter)
        await asyncio.sleep(0.001)
        assert not rest.done()
    send(stream, "e", end=True)
    assert text_of(await rest) == "bcde"
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_tokens_are_gathered_for_the_flush_interval() -> None:
    stream, loop = open_stream(), asyncio.get_running_loop()
    chunks = stream.chunks(0.02)
    send(stream, "a")
    await anext(chunks)
    flushed = loop.time()
    send(stream, "b")
    loop.call_later(0.005, send, stream, "c")
    assert text_of(await anext(chunks)) == "bc"
    assert loop.time() - flushed >= 0.019
    await chunks.aclose()


async def test_a_token_after_a_pause_is_sent_at_once() -> None:
    stream = open_stream()
    chunks = stream.chunks(0.01)
    send(stream, "a")
    await anext(chunks)
    waiting = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0.03)
    send(stream, "b")
    for _ in range(3):
        await asyncio.sleep(0)
    assert waiting.done()
    assert text_of(await waiting) == "b"
    await chunks.aclose()


async def test_without_flush_interval_every_token_is_sent_at_once() -> None:
    stream = open_stream()
    chunks = stream.chunks(0.0)
    for letter in "abc":
        send(stream, letter)
        assert text_of(await anext(chunks)) == letter
    await chunks.aclose()


async def test_a_complete_answer_is_one_chunk() -> None:
    stream = open_stream()
    send(stream, "a", "b", "c", end=True)
    answer = await read(stream, LONG_S)
    assert [text_of(chunk) for chunk in answer.chunks] == ["abc"]
    assert answer.reason == FinishReason.LENGTH


async def test_an_error_is_raised_after_the_tokens_before_it() -> None:
    stream = open_stream()
    send(stream, "a", "b")
    stream.fail(InternalError("broken"))
    stream.wake()
    answer = await read(stream, LONG_S)
    assert answer.text == "ab"
    assert str(answer.error) == "broken"


async def test_an_error_ends_gathering_at_once() -> None:
    stream = open_stream()
    chunks = stream.chunks(LONG_S)
    send(stream, "a")
    await anext(chunks)
    send(stream, "b")
    waiting = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0)
    stream.fail(InternalError("broken"))
    stream.wake()
    assert text_of(await waiting) == "b"
    with pytest.raises(InternalError, match="broken"):
        await anext(chunks)


async def test_a_wake_without_results_yields_no_chunk() -> None:
    stream = open_stream()
    waiting = asyncio.create_task(anext(stream.chunks(0.0)))
    for _ in range(3):
        stream.wake()
        await asyncio.sleep(0)
    assert not waiting.done()
    send(stream, "a")
    assert text_of(await waiting) == "a"


async def test_an_end_between_a_wake_and_the_next_read_is_not_lost() -> None:
    stream = open_stream()
    send(stream, "a")
    stream.put(token("b", FinishReason.LENGTH))
    stream.wake()
    chunks = stream.chunks(LONG_S)
    assert text_of(await anext(chunks)) == "ab"
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_a_chunk_carries_the_queue_time_of_its_request() -> None:
    stream = open_stream()
    chunks = stream.chunks(0.0)
    send(stream, "a")
    assert (await anext(chunks)).queue_s == 0
    stream.started = 12.5
    send(stream, "b")
    later = await anext(chunks)
    assert (later.queue_s, later.prompt_tokens) == (2.5, 3)
    await chunks.aclose()


# Text


async def consume(
    token_ids: bytes | list[int], end: FinishReason | None = None, **params: Any
) -> tuple[Answer, TokenStream]:
    """The answer that these tokens give; the last token has the finish reason `end`."""
    stream = open_stream(SamplingParams(**params))
    for number, token_id in enumerate(token_ids, start=1):
        stream.put(Token(token_id, 1.0, end if number == len(token_ids) else None))
    stream.wake()
    return await read(stream, leave_after=None if end else len(token_ids)), stream


async def test_the_token_that_ends_an_answer_has_no_text() -> None:
    answer, _ = await consume([ord("a"), END], FinishReason.STOP)
    assert [(event.text, event.finish_reason) for event in answer.events] == [("a", None), ("", FinishReason.STOP)]
    answer, _ = await consume(b"a!", FinishReason.STOP)
    assert answer.text == "a"


@pytest.mark.parametrize(("skip", "text"), [(True, "a"), (False, "a<end>")])
async def test_the_end_of_an_answer_is_included_on_request(skip: bool, text: str) -> None:
    params = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=skip, stop=("END",))
    for token_ids, expected in (([ord("a"), END], text), ([*b"a!"], "a!")):
        stream = TokenStream(replace(request(params=params), arrived=10.0))
        stream.open(3, ToyDecoder(skip), AnswerPlan(params))
        for token_id, reason in zip(token_ids, (None, FinishReason.STOP), strict=True):
            stream.put(Token(token_id, 1.0, reason))
        stream.wake()
        answer = await read(stream)
        assert (answer.text, answer.reason) == (expected, FinishReason.STOP)
    answer, _ = await consume(b"fine ENDless", FinishReason.LENGTH, stop=("END",), include_stop_str_in_output=True)
    assert answer.text == "fine END"


@pytest.mark.parametrize(
    ("token_ids", "params", "stopped_by"),
    [
        ([ord("a"), END], {}, None),
        (b"a!", {"stop_token_ids": (ord("!"),)}, ord("!")),
        (b"a!", {"stop_token_ids": (7,)}, None),
        (b"fine END!", {"stop": ("X", "END")}, "END"),
    ],
)
async def test_stopped_by_names_the_stop_of_the_request(
    token_ids: bytes | list[int], params: Any, stopped_by: str | int | None
) -> None:
    answer, _ = await consume(token_ids, FinishReason.STOP, **params)
    assert [event.stopped_by for event in answer.events] == [None] * (len(answer.events) - 1) + [stopped_by]


async def test_the_token_that_completes_a_grammar_is_text() -> None:
    stream = open_stream()
    stream.put(Token(ord("a"), 1.0))
    stream.put(Token(ord("}"), 1.0, FinishReason.STOP, complete=True))
    stream.wake()
    assert (await read(stream)).text == "a}"


async def test_a_stop_string_across_tokens_ends_the_answer_and_closes_the_stream() -> None:
    answer, stream = await consume(b"fine ENDless", FinishReason.LENGTH, stop=("END",))
    assert (answer.text, len(answer.events), answer.reason) == ("fine ", 8, FinishReason.STOP)
    assert stream.closed


async def test_a_stop_string_before_min_tokens_is_text() -> None:
    answer, _ = await consume(b".a.b", FinishReason.LENGTH, stop=(".",), min_tokens=2)
    assert (answer.text, answer.reason) == (".a", FinishReason.STOP)


@pytest.mark.parametrize("ending", [ord("x"), END])
async def test_the_last_event_carries_the_text_held_back(ending: int) -> None:
    reason = FinishReason.STOP if ending == END else FinishReason.LENGTH
    answer, _ = await consume([*b"EN", ending], reason, stop=("NDX",))
    assert answer.text == ("EN" if ending == END else "ENx")
    assert [event.text for event in answer.events[:2]] == ["E", ""]


async def test_a_character_of_several_tokens_comes_with_its_last_token() -> None:
    answer, _ = await consume("é€".encode(), FinishReason.LENGTH)
    assert [event.text for event in answer.events] == ["", "é", "", "", "€"]


@given(st.text(min_size=1, max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
async def test_the_joined_events_are_the_text_up_to_the_first_stop_string(text: str, stop: list[str]) -> None:
    answer, _ = await consume(text.encode(), FinishReason.LENGTH, stop=tuple(stop))
    met = next((text[:n] for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stop))), None)
    assert answer.text == (text if met is None else met[: min(met.find(s) for s in stop if s in met)])


async def test_an_event_carries_its_time_and_logprobs() -> None:
    likely = Logprobs(TokenLogprob(97, "a", -0.5), ())
    stream = open_stream()
    stream.put(Token(97, 2.5, FinishReason.LENGTH, likely))
    stream.wake()
    (event,) = (await read(stream)).events
    assert (event.token_id, event.elapsed_s, event.logprobs) == (97, 2.5, likely)


async def test_a_decoder_error_ends_its_own_answer() -> None:
    stream = open_stream()
    stream.put(token("a"))
    stream.put(Token(-1, 0.0))
    stream.put(token("b"))
    stream.wake()
    answer = await read(stream)
    assert (answer.text, stream.closed) == ("a", True)
    assert isinstance(answer.error, InternalError)


class PanickingDecoder(ToyDecoder):
    def step(self, token_id: int) -> str:
        raise Panic


async def test_a_panic_in_one_stream_does_not_keep_others_from_waking() -> None:
    broken, healthy = TokenStream(request()), open_stream()
    broken.open(3, PanickingDecoder(), AnswerPlan(SamplingParams()))
    for stream in (broken, healthy):
        stream.put(token("a", FinishReason.LENGTH))
    wake_all([broken, healthy])
    assert (await read(healthy)).text == "a"
    answer = await read(broken)
    assert (answer.text, broken.closed) == ("", True)
    assert isinstance(answer.error, InternalError)


# Tool calls


def open_with_parser(parser: ScriptedParser, params: SamplingParams | None = None) -> TokenStream:
    stream = TokenStream(request())
    params = params or SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    stream.open(3, ToyDecoder(params.skip_special_tokens), AnswerPlan(params, parser=parser))
    return stream


async def test_each_event_carries_the_deltas_of_its_text_and_the_last_one_those_of_the_end() -> None:
    parser = ScriptedParser(TextDelta("held"))
    stream = open_with_parser(parser)
    for token_id in "aé".encode():
        stream.put(Token(token_id, 1.0))
    stream.put(Token(END, 1.0, FinishReason.STOP))
    stream.wake()
    events = (await read(stream)).events
    assert parser.fed == ["a", "", "é", "<end>"], "the parameters of the plan replace those of the request"
    assert [event.deltas for event in events] == [
        (ToolCallDelta(0, arguments="a"),),
        (),
        (ToolCallDelta(0, arguments="é"),),
        (ToolCallDelta(0, arguments="<end>"), TextDelta("held")),
    ]


async def test_a_stop_string_completes_the_deltas() -> None:
    parser = ScriptedParser(TextDelta("held"))
    stream = open_with_parser(parser, SamplingParams(stop=("END",)))
    send(stream, *"fine ENDless")
    events = (await read(stream)).events
    assert parser.fed == ["f", "i", "n", "e", " ", "", "", ""]
    assert events[-1].deltas == (TextDelta("held"),)


async def test_a_parser_error_ends_its_own_answer() -> None:
    stream = open_with_parser(ScriptedParser(TextDelta("held"), fails_on="b"))
    send(stream, "a", "b", "c")
    answer = await read(stream)
    assert (answer.text, stream.closed) == ("a", True)
    assert isinstance(answer.error, InternalError)


async def test_events_without_tool_choice_have_no_deltas() -> None:
    answer, _ = await consume(b"ab", FinishReason.LENGTH)
    assert [event.deltas for event in answer.events] == [None, None]


# Waking


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the calls that reach it from other threads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> asyncio.Handle:
        self.calls += 1
        return super().call_soon_threadsafe(callback, *args, **kwargs)


def calls(*runners: asyncio.Runner) -> list[int]:
    loops = [runner.get_loop() for runner in runners]
    return [loop.calls for loop in loops if isinstance(loop, CountingLoop)]


def test_waking_all_streams_makes_one_call_into_each_event_loop() -> None:
    async def some(count: int) -> list[TokenStream]:
        return [open_stream() for _ in range(count)]

    async def answers(members: list[TokenStream]) -> list[str]:
        return [(await read(stream)).text for stream in members]

    with asyncio.Runner(loop_factory=CountingLoop) as one, asyncio.Runner(loop_factory=CountingLoop) as other:
        groups = [(one, one.run(some(5))), (other, other.run(some(2)))]
        all_streams = [stream for _, members in groups for stream in members]
        for stream in all_streams:
            stream.put(token("a", FinishReason.LENGTH))
        before = calls(one, other)
        wake_all(all_streams)
        assert calls(one, other) == [count + 1 for count in before]
        assert [runner.run(answers(members)) for runner, members in groups] == [["a"] * 5, ["a"] * 2]


def test_streams_of_a_closed_event_loop_are_closed() -> None:
    orphaned = streams([request(), request()])
    wake_all(orphaned)
    assert [stream.closed for stream in orphaned] == [True, True]


async def test_a_consumer_that_fails_does_not_keep_other_streams_from_waking() -> None:
    failing, other = open_stream(), open_stream()

    def fail() -> None:
        raise OSError("the connection is closed")

    failing.on_wake = fail
    for stream in (failing, other):
        stream.put(token("a", FinishReason.LENGTH))
    wake_all([failing, other])
    assert (await read(other)).text == "a"
    assert failing.closed
