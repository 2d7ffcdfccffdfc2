"""An engine that plays a script, and a meter that keeps what it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from serve_app.config import Autoscaling, Deployment, Model
from serve_app.core.engine import EngineLoad
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.queries import A, ModelState, ModelStatus, Query
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt
from serve_app.errors import ServeAppError

# A chunk is yielded, an exception raised, a number slept in seconds, an event awaited.
Step = Chunk | BaseException | float | asyncio.Event
Script = Callable[[GenerationRequest], Iterable[Step]]


def chunk(text: str = "a", end: FinishReason | None = None) -> Chunk:
    return Chunk((TokenEvent(1, text, 0.1, end),), prompt_tokens=1, queue_s=0.0)


LAST = chunk("z", FinishReason.STOP)


def request(id: str = "r", priority: int = 0, timeout_s: float = 30.0, wake_wait_s: float | None = None) -> Any:
    now = time.monotonic()
    return GenerationRequest(
        id, "m", TextPrompt("hi"), SamplingParams(), now, now + timeout_s, wake_wait_s, priority=priority
    )


def model(min_replicas: int = 1, places: int = 2, waiting: int = 2, target: float | None = None) -> Model:
    scale = Autoscaling(min_replicas=min_replicas, target_ongoing_requests=target)
    deployment = Deployment(max_ongoing_requests=places, max_queued_requests=waiting, autoscaling=scale)
    return Model(name="m", source="toy", deployment=deployment, batching={"max_batch_size": 1})


@dataclass
class ScriptedEngine:
    """Plays `script` for each request; `answer` is the result of each query, or raised if it is an exception."""

    script: Script = lambda request: [chunk(), LAST]
    answer: Any = "answer"
    query_gate: asyncio.Event | None = None
    state: ModelState = ModelState.READY
    requests: list[GenerationRequest] = field(default_factory=list)
    queries: list[Query[Any]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    running: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.running += 1
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Chunk):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.running -= 1
            self.closed.append(request.id)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        self.queries.append(query)
        if self.query_gate is not None:
            await self.query_gate.wait()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]

    def health(self, model: str) -> ModelStatus:
        return ModelStatus(model, self.state)

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(self.running, 0, 1)


@dataclass
class KeptMeter:
    chunks: list[Chunk] = field(default_factory=list)
    errors: list[ServeAppError] = field(default_factory=list)
    ends: int = 0

    def chunk(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def failed(self, error: ServeAppError) -> None:
        self.errors.append(error)

    def ended(self) -> None:
        self.ends += 1
