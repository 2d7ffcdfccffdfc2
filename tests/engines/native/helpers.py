"""Builders and fakes for tests of the native engine: requests, streams, sequences, runners and stream readers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from serve_app.config import NativeOptions
from serve_app.core.events import Chunk, Delta, FinishReason, Logprobs, TokenEvent, TokenLogprob, ToolCallDelta
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt, TokenPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.kv_cache import BLOCK, CacheOp, Copy
from serve_app.engines.native.sequence import Advance, Outcome, Runner, Sampled, Sequence, Step
from serve_app.engines.stream import Embedding, Token, TokenStream
from serve_app.engines.toy import ToyRunner, ToyText
from serve_app.errors import ServeAppError

TIMEOUT_S = 10.0


class Panic(BaseException):
    """Like pyo3's PanicException, which is a BaseException and no Exception."""


class ScriptedParser:
    """A tool-call parser that returns each text as arguments of one call, and `last` at the end."""

    def __init__(self, last: Delta, fails_on: str = "") -> None:
        self.fed: list[str] = []
        self._last = last
        self._fails_on = fails_on

    def feed(self, text: str) -> list[Delta]:
        self.fed.append(text)
        if text and text == self._fails_on:
            raise Panic
        return [ToolCallDelta(0, arguments=text)] if text else []

    def end(self) -> list[Delta]:
        return [self._last]


class ManualClock:
    """A clock that advances only when a test changes `now`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class RecordingStream(TokenStream):
    """A stream that records everything that the engine puts into it."""

    def __init__(self, request: GenerationRequest, arrived: float | None = None) -> None:
        """`arrived` replaces the request's arrival; the time to its deadline stays."""
        if arrived is not None:
            request = replace(request, arrived=arrived, deadline=arrived + request.timeout_s)
        super().__init__(request)
        self.tokens: list[Token] = []
        self.embeddings: list[tuple[float, ...]] = []
        self.errors: list[ServeAppError] = []

    def put(self, result: Token | Embedding) -> None:
        if isinstance(result, Token):
            self.tokens.append(result)
        else:
            self.embeddings.append(result.vector)
        super().put(result)

    def fail(self, error: ServeAppError) -> None:
        self.errors.append(error)
        super().fail(error)

    @property
    def terminal_events(self) -> int:
        """Must be 1 for an admitted request whose consumer stayed."""
        finished = sum(token.finish_reason is not None for token in self.tokens)
        return len(self.errors) + len(self.embeddings) + finished


@dataclass
class Answer:
    """The chunks that a consumer received, and the error that ended them."""

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


def describe(token: int, logprob: float) -> TokenLogprob:
    """The log probability of a token of a vocabulary whose texts are the ids."""
    return TokenLogprob(token, f"<{token}>", logprob)


def request(
    prompt: str | Seq[int] = "abc", timeout_s: float = 60.0, params: SamplingParams | None = None
) -> GenerationRequest:
    content = TextPrompt(prompt) if isinstance(prompt, str) else TokenPrompt(tuple(prompt))
    return GenerationRequest("id", "toy", content, params or SamplingParams(max_tokens=5), 0.0, timeout_s)


def limited_request(prompt: str | Seq[int], max_tokens: int) -> GenerationRequest:
    return request(prompt, params=SamplingParams(max_tokens=max_tokens))


def streams(requests: Seq[GenerationRequest], arrived: float = 0.0) -> list[RecordingStream]:
    """Streams without consumers: their event loop is closed."""

    async def make() -> list[RecordingStream]:
        return [RecordingStream(request, arrived) for request in requests]

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
    """The tokens of a step that sampled one token for every sequence."""
    tokens = [one for outcome in outcomes for one in (outcome if isinstance(outcome, tuple) else (outcome,))]
    assert len(tokens) == len(outcomes)
    return [token for token in tokens if isinstance(token, Sampled)]


def next_token(tokens: Seq[int]) -> int:
    """The token after `tokens` in FakeCacheRunner's language: a function of them with 4 values that often repeats."""
    return (tokens[-1] + len(tokens) // 7 + sum(tokens[-9:-4])) % 4 + 1


class FakeCacheRunner:
    """Keeps token ids where a model keeps keys and values, and samples from the token ids in its cache."""

    def __init__(self, slots: int) -> None:
        self._cache: list[dict[int, int]] = [{} for _ in range(slots)]

    def apply(self, op: CacheOp) -> None:
        if isinstance(op, Copy):
            source = self._cache[op.source]
            self._cache[op.target] |= {position: source[position] for position in range(op.count)}
        else:
            self._cache[op.slot] = {p: token for p, token in self._cache[op.slot].items() if p < op.keep}

    def run(self, step: Step) -> list[Outcome]:
        """Also executes the cache operations of a step that comes from the scheduler without an engine."""
        for op in step.cache_ops:
            self.apply(op)
        return [outcome for advance in step.advances for outcome in self._advance(advance)]

    def within(self, blocks: Seq[int]) -> bool:
        """Whether each slot holds at most its number of blocks."""
        return all(max(held, default=-1) < n * BLOCK for held, n in zip(self._cache, blocks, strict=True))

    def _advance(self, advance: Advance) -> list[Outcome]:
        sequence = advance.sequence
        assert sequence.slot is not None
        cached, start, end = self._cache[sequence.slot], sequence.computed, sequence.computed + advance.count
        cached |= dict(enumerate((*sequence.tokens[start:end], *advance.drafts), start=start))
        self._read_out(advance, cached)
        texts = [[cached[position] for position in range(end + ahead)] for ahead in range(1 + len(advance.drafts))]
        return [tuple(Sampled(next_token(text)) for text in texts)] if advance.samples else []

    def _read_out(self, advance: Advance, cached: dict[int, int]) -> None:
        """The log probability of a prompt token is its position; the hidden state of a row is (token, 1)."""
        sequence, readout = advance.sequence, advance.sequence.readout
        rows = [sequence.computed + row for row in advance.readout_rows]
        if readout is None or not rows:
            return
        if sequence.embeds:
            readout.add_states([sum(cached[row] for row in rows), len(rows)], len(rows))
        else:
            tokens = [TokenLogprob(sequence.tokens[row + 1], "", row + 1) for row in rows]
            readout.add_logprobs([Logprobs(token, ()) for token in tokens])


@dataclass
class Faults:
    """What fails in a FaultyCacheRunner: these sequences, passes of more rows, the next passes, the next operations."""

    poisoned: set[Sequence] = field(default_factory=set)
    max_rows: int = 10**9
    passes: int = 0
    ops: int = 0


class FaultyCacheRunner(FakeCacheRunner):
    """Fails as `faults` say. A failing pass has computed half of its advances; a failing copy leaves wrong content."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.faults = Faults()
        self.passes: list[int] = []

    def apply(self, op: CacheOp) -> None:
        if self.faults.ops:
            self.faults.ops -= 1
            if isinstance(op, Copy):
                self._cache[op.target] = dict.fromkeys(range(op.count), 0)
            raise RuntimeError("scripted")
        super().apply(op)

    def run(self, step: Step) -> list[Outcome]:
        self.passes.append(step.rows)
        faults = self.faults
        fails_all, faults.passes = faults.passes > 0, max(0, faults.passes - 1)
        if step.rows > faults.max_rows:
            error: BaseException = RuntimeError("DefaultCPUAllocator: can't allocate memory")
        elif fails_all or any(advance.sequence in faults.poisoned for advance in step.advances):
            error = Panic("scripted")
        else:
            return super().run(step)
        super().run(Step(step.advances[: len(step.advances) // 2]))
        raise error

    def free_memory(self) -> None:
        self.faults.max_rows += self.faults.max_rows < 1


class SteppedRunner(ToyRunner):
    """Runs a step only when the test permits it, and records the sequences and rows of every step."""

    def __init__(self, config: NativeOptions) -> None:
        super().__init__(config)
        self.begun: list[list[Sequence]] = []
        self.rows: list[int] = []
        self._permits = threading.Semaphore(0)
        self._unblocked = False

    def run(self, step: Step) -> list[Outcome]:
        self.rows.append(step.rows)
        self.begun.append([advance.sequence for advance in step.advances])
        assert self._unblocked or self._permits.acquire(timeout=TIMEOUT_S), "the test did not permit this step"
        return super().run(step)

    def permit(self, steps: int = 1) -> None:
        """Let the current step end, and `steps - 1` more; returns once the next one has begun."""
        expected = len(self.begun) + steps
        self._permits.release(steps)
        wait_until(lambda: len(self.begun) >= expected)

    def unblock(self) -> None:
        """Permit all further steps."""
        self._unblocked = True
        self._permits.release()


class FaultyRunner(ToyRunner):
    """Raises the exception that `script` holds for each step; None, or the end of the script, is a good step."""

    def __init__(self, config: NativeOptions, script: Seq[BaseException | None]) -> None:
        super().__init__(config)
        self._script = list(script)

    def run(self, step: Step) -> list[Outcome]:
        fault = self._script.pop(0) if self._script else None
        if fault is not None:
            raise fault
        return super().run(step)


@contextmanager
def running(
    make: Callable[[NativeOptions], Runner] = ToyRunner, clock: Callable[[], float] = time.monotonic, **config: int
) -> Iterator[NativeEngine]:
    """A started engine, without drafts unless `config` sets them."""
    settings = NativeOptions(**{"draft_tokens": 0, **config})
    engine = NativeEngine(lambda: make(settings), settings, clock)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(TIMEOUT_S)


@contextmanager
def stepped(
    clock: Callable[[], float] = time.monotonic, kind: type[SteppedRunner] = SteppedRunner, **config: int
) -> Iterator[tuple[NativeEngine, SteppedRunner]]:
    """A started engine whose steps wait for the test's permission."""
    made: list[SteppedRunner] = []

    def make(settings: NativeOptions) -> SteppedRunner:
        made.append(kind(settings))
        return made[0]

    with running(make, clock, **config) as engine:
        try:
            yield engine, made[0]
        finally:
            made[0].unblock()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for another thread, TIMEOUT_S at most."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.0005)


async def read(stream: TokenStream, flush_interval_s: float = 0.0, leave_after: int | None = None) -> Answer:
    """Consume a stream to its end, or until `leave_after` tokens have come, and close it."""
    answer = Answer()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async for chunk in stream.chunks(flush_interval_s):
                answer.chunks.append(chunk)
                if leave_after is not None and len(answer.events) >= leave_after:
                    break
    except ServeAppError as error:
        answer.error = error
    finally:
        stream.close()
    return answer


def open_streams(*requests: GenerationRequest) -> list[RecordingStream]:
    """Streams of requests that arrive now."""
    return [RecordingStream(request, time.monotonic()) for request in requests]


def admit(engine: NativeEngine, *requests: GenerationRequest, arrived: float | None = None) -> list[RecordingStream]:
    """Streams of requests that the engine admitted in one batch."""
    made = [RecordingStream(request, time.monotonic() if arrived is None else arrived) for request in requests]
    assert engine.admit(made) == [None] * len(made)
    return made


async def generate(engine: NativeEngine, request: GenerationRequest, leave_after: int | None = None) -> Answer:
    (stream,) = admit(engine, request)
    return await read(stream, leave_after=leave_after)
