"""The context of all routes: engine, telemetry, configuration and clock; it also builds the requests to the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.requests import Request

from serve_app.api.generation import until_disconnect
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.config import AppConfig, Limits, Model
from serve_app.core.engine import Engine
from serve_app.core.queries import A, GetModelInfo, ModelInfo, Query
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams
from serve_app.errors import ModelNotFound

# Clients of Text Generation Inference send these names, which it ignores; an empty name is no name in vLLM.
_PLACEHOLDERS = ("", "tgi", "dummy")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`clock` returns monotonic seconds. `known` holds the facts of each model that was loaded once."""

    engine: Engine
    telemetry: ServiceTelemetry
    config: AppConfig
    clock: Callable[[], float]
    known: dict[str, ModelInfo] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def model_of_body(self, name: str | None) -> Model:
        """The model that a body names; for a name that stands for any model, the first one. Raises ModelNotFound."""
        return self.model(self._chosen(name))

    def model(self, name: str | None) -> Model:
        """The named model, or the first of the configuration. Raises ModelNotFound."""
        models = self.config.models
        if name is None:
            return models[0]
        for model in models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in models)
        raise ModelNotFound(f"Model {name[:128]!r} does not exist. Known models: {known}.", param="model")

    def model_of(self, http: Request, name: str | None) -> Model:
        """The model that the body of a call names. Errors of the call are counted under it. Raises ModelNotFound."""
        model = self.model_of_body(name)
        http.state.model = model.name
        return model

    def model_of_body_or_query(self, http: Request, name: str | None) -> Model:
        """The model that the body names, else that of `?model=`. Both must exist. Raises ModelNotFound."""
        of_query, chosen = self.model(http.query_params.get("model")).name, self._chosen(name)
        return self.model_of(http, of_query if chosen is None else chosen)

    def _chosen(self, name: str | None) -> str | None:
        """The name of a body, or None if it stands for any model."""
        known = any(model.name == name for model in self.config.models)
        return None if name in _PLACEHOLDERS and not known else name

    def deadline(self, http: Request) -> float:
        """The instant by which every part of this call must have ended, on `clock`."""
        arrived: float = http.state.arrived
        return arrived + self.limits.request_timeout_s

    def request(
        self, http: Request, id: str, model: Model, prompt: Prompt, params: SamplingParams, stream: bool
    ) -> GenerationRequest:
        """A whole answer waits for a sleeping model for a limited time; a stream reports that it waits."""
        wake_wait_s = None if stream else self.limits.warm_wait_s
        return GenerationRequest(
            id, model.name, prompt, params, self.clock(), self.deadline(http), wake_wait_s=wake_wait_s
        )

    async def query(self, http: Request, model: str, query: Query[A]) -> A:
        """The result of a query, within `limits.warm_wait_s`. Raises ServeAppError, ClientDisconnect."""
        deadline = min(self.clock() + self.limits.warm_wait_s, self.deadline(http))
        return await until_disconnect(http.receive, self.engine.query(model, query, deadline))

    async def info(self, model: str, deadline: float) -> ModelInfo:
        """The facts of a model, which are queried once. Raises ServeAppError."""
        if model not in self.known:
            deadline = min(self.clock() + self.limits.warm_wait_s, deadline)
            self.known[model] = await self.engine.query(model, GetModelInfo(), deadline)
        return self.known[model]


def generation_id(http: Request) -> str:
    """The id of the call with a suffix of our own, because two calls can carry the same id of the client."""
    return f"{http.state.request_id}-{uuid4().hex[:12]}"
