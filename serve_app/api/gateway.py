"""The one thing the front door needs from the corridor behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from serve_app.core.events import Chunk
from serve_app.core.http import HttpCall
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError


class Gateway(Protocol):
    """Sends requests to models. The HTTP layer knows nothing else of where models run."""

    def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        """Yield the tokens of one request; the last event of the last chunk has a finish reason.

        A request for an embedding has one chunk without tokens.

        `warm_wait_s` is how long it may wait for a model that is scaled to zero; None: as long as the request may take.

        Raises ServeAppError, before the first chunk or between chunks. Closing the generator
        early cancels the request: its slot is free before the model's next step.
        """
        ...

    async def query(self, model: str, question: Query[A], warm_wait_s: float) -> A:
        """Ask a model something that takes no step of it; it has `warm_wait_s` to wake and to answer.

        Raises ServeAppError.
        """
        ...

    def waiting_on(self, model: str) -> str:
        """What a request without a first token waits for, in one word: "warming" or "queued"."""
        ...

    async def models(self) -> list[ModelStatus]:
        """The state of every model of this service, in the order of the configuration."""
        ...

    async def metrics(self) -> bytes:
        """The whole service's metrics in Prometheus' text format."""
        ...

    def refused(self, error: ServeAppError, model: str | None) -> None:
        """Count a request that was answered with an error before or instead of its end."""
        ...

    def call_began(self) -> None:
        """Count an HTTP call that has come, whatever it is for."""
        ...

    def call_ended(self, call: HttpCall) -> None:
        """Count its end."""
        ...
