"""Makers for the engine's tests: requests, streams, sequences, scripted runners and their readers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from serve_app.config import Engine as EngineConfig
from serve_app.core.events import Chunk, FinishReason, Logprobs, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt, TokenPrompt
from serve_app.engines.native.engine import Engine
from serve_app.engines.native.kv_cache import BLOCK, Copy
from serve_app.engines.native.sequence import Advance, Outcome, Runner, Sampled, Sequence, Step
from serve_app.engines.native.stream import Embedded, Token, TokenStream
from serve_app.engines.toy import ToyRunner, ToyText
from serve_app.errors import ServeAppError

PATIENCE_S = 10.0


class Clock:
    """Time that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Witness(TokenStream):
    """A stream that remembers everything the engine ever put into it."""

    def __init__(self, request: GenerationRequest, arrived: float | None = None) -> None:
        """`arrived` replaces the request's arrival; the time to its deadline stays."""
        if arrived is not None:
            request = replace(request, arrived=arrived, deadline=arrived + request.timeout_s)
        super().__init__(request)
        self.seen: list[Token] = []
        self.vectors: list[tuple[float, ...]] = []
        self.errors: list[ServeAppError] = []

    def put(self, told: Token | Embedded) -> None:
        if isinstance(told, Token):
            self.seen.append(told)
        else:
            self.vectors.append(told.vector)
        super().put(told)

    def fail(self, error: ServeAppError) -> None:
        self.errors.append(error)
        super().fail(error)

    @property
    def ends(self) -> int:
        """Terminal events: exactly one for whoever was admitted and stayed."""
        return len(self.errors) + len(self.vectors) + sum(token.finish_reason is not None for token in self.seen)


@dataclass
class Answer:
    """What a reader got."""

    chunks: list[Chunk] = field(default_factory=list)
    error: ServeAppError | None = None

    @property
    def events(self) -> list[TokenEvent]:
        return [event for chunk in self.chunks for event in chunk.events]

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def reason(self) -> FinishReason | None:
        return self.events[-1].finish_reason if self.events else None


def request(
    prompt: str | Seq[int] = "abc", timeout_s: float = 60.0, params: SamplingParams | None = None
) -> GenerationRequest:
    asked = TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt))
    return GenerationRequest("id", "toy", asked, params or SamplingParams(max_tokens=5), 0.0, timeout_s)


def streams(requests: Seq[GenerationRequest], arrived: float = 0.0) -> list[Witness]:
    """Streams whose event loop is closed already: nobody reads them."""

    async def make() -> list[Witness]:
        return [Witness(request, arrived) for request in requests]

    with asyncio.Runner() as runner:
        return runner.run(make())


def sequences(requests: Seq[GenerationRequest], arrived: float = 0.0, context: int = 64) -> list[Sequence]:
    text = ToyText()
    prompts = text.encode([r.prompt for r in requests])
    return [
        Sequence(stream, ids, text.end_ids, context)
        for stream, ids in zip(streams(requests, arrived), prompts, strict=True)
        if not isinstance(ids, ServeAppError)
    ]


def sequence(
    prompt: str | Seq[int] = "abc", params: SamplingParams | None = None, timeout_s: float = 60.0, context: int = 64
) -> Sequence:
    return sequences([request(prompt, timeout_s, params)], context=context)[0]


def tokens_of(outcomes: Seq[Sampled | Outcome]) -> list[Sampled]:
    """The outcomes of a step in which every sequence got one token."""
    tokens = [one for outcome in outcomes for one in (outcome if isinstance(outcome, tuple) else (outcome,))]
    assert len(tokens) == len(outcomes)
    return [token for token in tokens if isinstance(token, Sampled)]


def successor(tokens: Seq[int]) -> int:
    """The next token of a text, in a language of few words that often repeats itself."""
    return (tokens[-1] + len(tokens) // 7 + sum(tokens[-9:-4])) % 4 + 1


class Keeper:
    """Holds tokens where a model holds keys and values, and answers from what is really there."""

    def __init__(self, slots: int) -> None:
        self._held: list[dict[int, int]] = [{} for _ in range(slots)]

    def run(self, step: Step) -> list[Outcome]:
        for order in step.orders:
            if isinstance(order, Copy):
                source = self._held[order.source]
                self._held[order.target] |= {position: source[position] for position in range(order.count)}
            else:
                self._held[order.slot] = {p: token for p, token in self._held[order.slot].items() if p < order.keep}
        return [outcome for advance in step.advances for outcome in self._advance(advance)]

    def memory(self, blocks: Seq[int]) -> bool:
        """Whether no slot holds more than it may."""
        return all(max(held, default=-1) < n * BLOCK for held, n in zip(self._held, blocks, strict=True))

    def _advance(self, advance: Advance) -> list[Outcome]:
        asked = advance.sequence
        assert asked.slot is not None
        held, start, end = self._held[asked.slot], asked.computed, asked.computed + advance.count
        held |= dict(enumerate((*asked.tokens[start:end], *advance.drafts), start=start))
        self._read(advance, held)
        texts = [[held[position] for position in range(end + ahead)] for ahead in range(1 + len(advance.drafts))]
        return [tuple(Sampled(successor(text)) for text in texts)] if advance.samples else []

    def _read(self, advance: Advance, held: dict[int, int]) -> None:
        """The position of each token of a prompt as its probability; the sum of tokens, and one for each, as states."""
        asked, reading = advance.sequence, advance.sequence.reading
        rows = [asked.computed + row for row in advance.reads]
        if reading is None or not rows:
            return
        if asked.embeds:
            reading.add_states([sum(held[row] for row in rows), len(rows)], len(rows))
        else:
            told = [TokenLogprob(asked.tokens[row + 1], "", row + 1) for row in rows]
            reading.add_logprobs([Logprobs(one, ()) for one in told])


class SteppedRunner(ToyRunner):
    """Takes a step only when the test says so, and keeps a record of who was in it."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.begun: list[list[Sequence]] = []
        self.rows: list[int] = []
        self._permits = threading.Semaphore(0)
        self._free = False

    def run(self, step: Step) -> list[Outcome]:
        self.rows.append(step.rows)
        self.begun.append([advance.sequence for advance in step.advances])
        assert self._free or self._permits.acquire(timeout=PATIENCE_S), "the test forgot to let the runner go"
        return super().run(step)

    def go(self, steps: int = 1) -> None:
        """Let the step under way end, and `steps - 1` more; returns once the next one is under way."""
        wanted = len(self.begun) + steps
        self._permits.release(steps)
        until(lambda: len(self.begun) >= wanted)

    def let_go(self) -> None:
        """No more waiting."""
        self._free = True
        self._permits.release()


class FaultyRunner(ToyRunner):
    """Raises what the script holds for each step; None, or the script's end, is a good step."""

    def __init__(self, config: EngineConfig, script: Seq[BaseException | None]) -> None:
        super().__init__(config)
        self._script = list(script)

    def run(self, step: Step) -> list[Outcome]:
        fault = self._script.pop(0) if self._script else None
        if fault is not None:
            raise fault
        return super().run(step)


@contextmanager
def running(
    make: Callable[[EngineConfig], Runner] = ToyRunner, clock: Callable[[], float] = time.monotonic, **config: int
) -> Iterator[Engine]:
    settings = EngineConfig(**{"draft_tokens": 0, **config})
    engine = Engine(lambda: make(settings), settings, clock)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(PATIENCE_S)


@contextmanager
def stepped(
    clock: Callable[[], float] = time.monotonic, kind: type[SteppedRunner] = SteppedRunner, **config: int
) -> Iterator[tuple[Engine, SteppedRunner]]:
    """An engine whose every step waits for the test."""
    made: list[SteppedRunner] = []

    def make(settings: EngineConfig) -> SteppedRunner:
        made.append(kind(settings))
        return made[0]

    with running(make, clock, **config) as engine:
        try:
            yield engine, made[0]
        finally:
            made[0].let_go()


def until(condition: Callable[[], bool]) -> None:
    """Wait, within reason, for another thread."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


async def read(stream: TokenStream, flush_interval_s: float = 0.0, leave_after: int | None = None) -> Answer:
    """All of a stream, or `leave_after` tokens of it."""
    answer = Answer()
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in stream.chunks(flush_interval_s):
                answer.chunks.append(chunk)
                if leave_after is not None and len(answer.events) >= leave_after:
                    break
    except ServeAppError as error:
        answer.error = error
    finally:
        stream.close()
    return answer


def admitted(engine: Engine, *requests: GenerationRequest, arrived: float | None = None) -> list[Witness]:
    """Streams of requests that the engine took in together."""
    made = [Witness(request, time.monotonic() if arrived is None else arrived) for request in requests]
    assert engine.admit(made) == [None] * len(made)
    return made


async def ask(engine: Engine, asked: GenerationRequest, leave_after: int | None = None) -> Answer:
    (stream,) = admitted(engine, asked)
    return await read(stream, leave_after=leave_after)
