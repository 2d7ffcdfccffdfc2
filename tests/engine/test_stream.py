from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.engine.stream import TokenStream, wake_all
from serve_app.errors import InternalError
from serve_app.types import Chunk, FinishReason, TokenEvent

from .toys import read, request, streams

FOREVER_S = 1000.0


def event(letter: str, reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(ord(letter), letter, 0.0, reason)


def say(stream: TokenStream, *letters: str, end: bool = False) -> None:
    """Put each letter; the last one ends the stream when told so."""
    for number, letter in enumerate(letters, start=1):
        stream.put(event(letter, FinishReason.STOP if end and number == len(letters) else None))
    stream.wake()


def letters(chunk: Chunk) -> str:
    return "".join(e.text for e in chunk.events)


def made() -> TokenStream:
    return TokenStream(request(), arrived=10.0)


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
    assert answer.reason == FinishReason.STOP


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


async def test_an_end_put_before_its_wake_is_not_lost() -> None:
    """The engine's thread puts at any moment: here between a wake and the reader's look."""
    stream = made()
    say(stream, "a")
    stream.put(event("b", FinishReason.STOP))
    chunks = stream.chunks(FOREVER_S)
    assert letters(await anext(chunks)) == "ab"
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_a_chunk_says_how_long_the_request_queued() -> None:
    stream = made()
    stream.prompt_tokens = 3
    chunks = stream.chunks(0.0)
    say(stream, "a")
    assert (await anext(chunks)).queue_s == 0
    stream.started = 12.5
    say(stream, "b")
    later = await anext(chunks)
    assert (later.queue_s, later.prompt_tokens) == (2.5, 3)
    await chunks.aclose()


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
            stream.put(event("a", FinishReason.STOP))
        before = calls(one, other)
        wake_all(everyone)
        assert calls(one, other) == [count + 1 for count in before]
        assert [runner.run(answers(members)) for runner, members in groups] == [["a"] * 5, ["a"] * 2]


def test_streams_of_a_closed_loop_are_closed() -> None:
    left = streams([request(), request()])
    wake_all(left)
    assert [stream.closed for stream in left] == [True, True]
