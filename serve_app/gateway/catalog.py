"""The first stage: the models of the configuration by name, each with its own chain of stages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from serve_app.core.engine import Engine, EngineLoad
from serve_app.core.events import Chunk
from serve_app.core.queries import A, ModelStatus, Query
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ModelNotFound

_LONGEST_NAME = 128


class Catalog:
    """An Engine of several models. `engines` maps a model's name to its Engine."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return self._engine(request.model).generate(request)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        return await self._engine(model).query(model, query, deadline)

    def health(self, model: str) -> ModelStatus:
        return self._engine(model).health(model)

    def load(self, model: str) -> EngineLoad:
        return self._engine(model).load(model)

    def _engine(self, model: str) -> Engine:
        engine = self._engines.get(model)
        if engine is None:
            known = ", ".join(self._engines)
            raise ModelNotFound(f"There is no model {model[:_LONGEST_NAME]!r}. The models are: {known}.", param="model")
        return engine
