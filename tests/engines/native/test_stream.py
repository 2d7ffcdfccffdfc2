from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from serve_app.core.events import Chunk, FinishReason, Logprobs, TokenLogprob
from serve_app.core.requests import SamplingParams
from serve_app.engines.native.stream import Token, TokenStream, wake_all
from serve_app.engines.toy import END, ToyDecoder
from serve_app.errors import InternalError

from .helpers import Answer, read, request, streams

FOREVER_S = 1000.0


def token(letter: str, reason: FinishReason | None = None) -> Token:
    return Token(ord(letter), 0.0, reason)


def say(stream: TokenStream, *letters: str, end: bool = False) -> None:
    """Put each letter; the last one ends the stream when told so."""
    for number, letter in enumerate(letters, start=1):
        stream.put(token(letter, FinishReason.LENGTH if end and number == len(letters) else None))
    stream.wake()


def letters(chunk: Chunk) -> str:
    return "".join(e.text for e in chunk.events)


def made(params: SamplingParams | None = None) -> TokenStream:
    stream = TokenStream(replace(request(params=params), arrived=10.0))
    stream.open(3, ToyDecoder())
    return stream


async def test_the_first_token_comes_at_once() -> None:
    stream = made()
    chunks = stream.chunks(FOREVER_S)
    say(stream, "a")
    assert letters(await anext(chunks)) == "a"
    await chunks.aclose()


async def test_later_tokens_are_gathered_and_the_end_comes_at_once() -> None:
    stream = made()
    chunks = stream.chunks(FOREVER_S)
    say(stream, "a")
    assert letters(await anext(chunks)) == "a"
    rest = asyncio.create_task(anext(chunks))
    for letter in "bcd":
        say(stream, letter)
        await asyncio.sleep(0.001)
        assert not rest.done()
    say(stream, "e", end=True)
    assert letters(await rest) == "bcde"
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_gathering_lasts_as_long_as_the_flush_interval_and_no_longer() -> None:
    stream, loop = made(), asyncio.get_running_loop()
    chunks = stream.chunks(0.02)
    say(stream, "a")
    await anext(chunks)
    flushed = loop.time()
    say(stream, "b")
    loop.call_later(0.005, say, stream, "c")
    assert letters(await anext(chunks)) == "bc"
    assert loop.time() - flushed >= 0.019
    await chunks.aclose()


async def test_after_a_pause_a_token_comes_at_once_again() -> None:
    stream = made()
    chunks = stream.chunks(0.01)
    say(stream, "a")
    await anext(chunks)
    waiting = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0.03)
    say(stream, "b")
    for _ in range(3):
        await asyncio.sleep(0)
    assert waiting.done()
    assert letters(await waiting) == "b"
    await chunks.aclose()


async def test_no_interval_means_no_gathering() -> None:
    stream = made()
    chunks = stream.chunks(0.0)
    for letter in "abc":
        say(stream, letter)
        assert letters(await anext(chunks)) == letter
    await chunks.aclose()


async def test_an_answer_that_was_ready_comes_whole() -> None:
    stream = made()
    say(stream, "a", "b", "c", end=True)
    answer = await read(stream, FOREVER_S)
    assert [letters(chunk) for chunk in answer.chunks] == ["abc"]
    assert answer.reason == FinishReason.LENGTH


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    stream = made()
    say(stream, "a", "b")
    stream.fail(InternalError("broken"))
    stream.wake()
    answer = await read(stream, FOREVER_S)
    assert answer.text == "ab"
    assert str(answer.error) == "broken"


async def test_an_error_ends_gathering_at_once() -> None:
    stream = made()
    chunks = stream.chunks(FOREVER_S)
    say(stream, "a")
    await anext(chunks)
    say(stream, "b")
    waiting = asyncio.create_task(anext(chunks))
    await asyncio.sleep(0)
    stream.fail(InternalError("broken"))
    stream.wake()
    assert letters(await waiting) == "b"
    with pytest.raises(InternalError, match="broken"):
        await anext(chunks)


async def test_a_wake_without_news_yields_nothing() -> None:
    stream = made()
    waiting = asyncio.create_task(anext(stream.chunks(0.0)))
    for _ in range(3):
        stream.wake()
        await asyncio.sleep(0)
    assert not waiting.done()
    say(stream, "a")
    assert letters(await waiting) == "a"


async def test_an_end_that_comes_between_a_wake_and_the_readers_look_is_not_lost() -> None:
    stream = made()
    say(stream, "a")
    stream.put(token("b", FinishReason.LENGTH))
    stream.wake()
    chunks = stream.chunks(FOREVER_S)
    assert letters(await anext(chunks)) == "ab"
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_a_chunk_says_how_long_the_request_queued() -> None:
    stream = made()
    chunks = stream.chunks(0.0)
    say(stream, "a")
    assert (await anext(chunks)).queue_s == 0
    stream.started = 12.5
    say(stream, "b")
    later = await anext(chunks)
    assert (later.queue_s, later.prompt_tokens) == (2.5, 3)
    await chunks.aclose()


# Text


async def heard(said: bytes | list[int], end: FinishReason | None = None, **params: Any) -> tuple[Answer, TokenStream]:
    """What a reader makes of the tokens; the last of them ends the answer if told so."""
    stream = made(SamplingParams(**params))
    for number, token_id in enumerate(said, start=1):
        stream.put(Token(token_id, 1.0, end if number == len(said) else None))
    stream.wake()
    return await read(stream, leave_after=None if end else len(said)), stream


async def test_the_token_that_ends_an_answer_has_no_text() -> None:
    answer, _ = await heard([ord("a"), END], FinishReason.STOP)
    assert [(event.text, event.finish_reason) for event in answer.events] == [("a", None), ("", FinishReason.STOP)]
    answer, _ = await heard(b"a!", FinishReason.STOP)
    assert answer.text == "a"


@pytest.mark.parametrize(("skip", "text"), [(True, "a"), (False, "a<end>")])
async def test_what_ended_an_answer_is_shown_when_asked_for(skip: bool, text: str) -> None:
    wish = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=skip, stop=("END",))
    for said, told in (([ord("a"), END], text), ([*b"a!"], "a!")):
        stream = TokenStream(replace(request(params=wish), arrived=10.0))
        stream.open(3, ToyDecoder(skip))
        for token_id, reason in zip(said, (None, FinishReason.STOP), strict=True):
            stream.put(Token(token_id, 1.0, reason))
        stream.wake()
        answer = await read(stream)
        assert (answer.text, answer.reason) == (told, FinishReason.STOP)
    answer, _ = await heard(b"fine ENDless", FinishReason.LENGTH, stop=("END",), include_stop_str_in_output=True)
    assert answer.text == "fine END"


@pytest.mark.parametrize(
    ("said", "wish", "by"),
    [
        ([ord("a"), END], {}, None),
        (b"a!", {"stop_token_ids": (ord("!"),)}, ord("!")),
        (b"a!", {"stop_token_ids": (7,)}, None),
        (b"fine END!", {"stop": ("X", "END")}, "END"),
    ],
)
async def test_what_of_the_request_ended_it_is_told(said: bytes | list[int], wish: Any, by: str | int | None) -> None:
    answer, _ = await heard(said, FinishReason.STOP, **wish)
    assert [event.stopped_by for event in answer.events] == [None] * (len(answer.events) - 1) + [by]


async def test_the_token_that_completes_an_answer_is_text() -> None:
    stream = made()
    stream.put(Token(ord("a"), 1.0))
    stream.put(Token(ord("}"), 1.0, FinishReason.STOP, complete=True))
    stream.wake()
    assert (await read(stream)).text == "a}"


async def test_a_stop_string_ends_it_across_tokens_and_sends_the_engine_away() -> None:
    answer, stream = await heard(b"fine ENDless", FinishReason.LENGTH, stop=("END",))
    assert (answer.text, len(answer.events), answer.reason) == ("fine ", 8, FinishReason.STOP)
    assert stream.closed


async def test_a_stop_string_counts_from_min_tokens_on() -> None:
    answer, _ = await heard(b".a.b", FinishReason.LENGTH, stop=(".",), min_tokens=2)
    assert (answer.text, answer.reason) == (".a", FinishReason.STOP)


@pytest.mark.parametrize("ending", [ord("x"), END])
async def test_the_last_event_carries_what_was_held_back(ending: int) -> None:
    reason = FinishReason.STOP if ending == END else FinishReason.LENGTH
    answer, _ = await heard([*b"EN", ending], reason, stop=("NDX",))
    assert answer.text == ("EN" if ending == END else "ENx")
    assert [event.text for event in answer.events[:2]] == ["E", ""]


async def test_a_character_cut_over_tokens_comes_with_its_last_one() -> None:
    answer, _ = await heard("é€".encode(), FinishReason.LENGTH)
    assert [event.text for event in answer.events] == ["", "é", "", "", "€"]


@given(st.text(min_size=1, max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
async def test_the_joined_events_are_the_full_text(text: str, stop: list[str]) -> None:
    answer, _ = await heard(text.encode(), FinishReason.LENGTH, stop=tuple(stop))
    met = next((text[:n] for n in range(1, len(text) + 1) if text[:n].endswith(tuple(stop))), None)
    assert answer.text == (text if met is None else met[: min(met.find(s) for s in stop if s in met)])


async def test_an_event_says_when_and_how_likely() -> None:
    likely = Logprobs(TokenLogprob(97, "a", -0.5), ())
    stream = made()
    stream.put(Token(97, 2.5, FinishReason.LENGTH, likely))
    stream.wake()
    (event,) = (await read(stream)).events
    assert (event.token_id, event.elapsed_s, event.logprobs) == (97, 2.5, likely)


async def test_a_decoder_that_breaks_ends_its_own_answer() -> None:
    stream = made()
    stream.put(token("a"))
    stream.put(Token(-1, 0.0))
    stream.put(token("b"))
    stream.wake()
    answer = await read(stream)
    assert (answer.text, stream.closed) == ("a", True)
    assert isinstance(answer.error, InternalError)


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


def test_a_step_makes_one_call_into_each_loop() -> None:
    async def some(count: int) -> list[TokenStream]:
        return [made() for _ in range(count)]

    async def answers(members: list[TokenStream]) -> list[str]:
        return [(await read(stream)).text for stream in members]

    with asyncio.Runner(loop_factory=CountingLoop) as one, asyncio.Runner(loop_factory=CountingLoop) as other:
        groups = [(one, one.run(some(5))), (other, other.run(some(2)))]
        everyone = [stream for _, members in groups for stream in members]
        for stream in everyone:
            stream.put(token("a", FinishReason.LENGTH))
        before = calls(one, other)
        wake_all(everyone)
        assert calls(one, other) == [count + 1 for count in before]
        assert [runner.run(answers(members)) for runner, members in groups] == [["a"] * 5, ["a"] * 2]


def test_streams_of_a_closed_loop_are_closed() -> None:
    left = streams([request(), request()])
    wake_all(left)
    assert [stream.closed for stream in left] == [True, True]
