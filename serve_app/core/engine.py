"""The Engine protocol: the interface of a model. Every engine and every stage of the gateway implements it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from serve_app.core.events import Chunk
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is: requests that run, requests that wait, and how many can run at the same time."""

    running: int
    waiting: int
    capacity: int


class Engine(Protocol):
    """Serves one model, or several by the request's `model`. Each stage of the gateway wraps an Engine and is one."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the tokens of one request; the last event of the last chunk has a finish reason.

        A request for an embedding yields one chunk without events. Closing the generator early cancels the request:
        the engine frees its slot before the next step.

        Raises ServeAppError before the first chunk or between chunks.
        """
        ...

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        """The result of a query to a model, by `deadline` (this process's monotonic clock). Raises ServeAppError."""
        ...

    def health(self, model: str) -> ModelStatus:
        """The state of a model. Raises ModelNotFound."""
        ...

    def load(self, model: str) -> EngineLoad:
        """How busy the engine is with a model. Raises ModelNotFound."""
        ...
