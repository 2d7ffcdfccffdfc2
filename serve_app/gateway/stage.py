"""The base of all stages: passes everything on to the engine that it wraps."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from serve_app.core.engine import Engine, EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest


class Stage:
    """An Engine around `inner`. A stage overrides what it changes."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return self.inner.generate(request)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        return await self.inner.query(model, query, deadline)

    def health(self, model: str) -> ModelStatus:
        return self.inner.health(model)

    def load(self, model: str) -> EngineLoad:
        return self.inner.load(model)
