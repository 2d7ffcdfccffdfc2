"""The context of all routes: engine, telemetry, configuration and clock; it also builds the requests to the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.requests import Request

from serve_app.api.generation import until_disconnect
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.config import AppConfig, Limits, Model, SamplingDefaults
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.core.queries import A, GetModelInfo, ModelInfo, Query
from serve_app.core.requests import Adapter, CacheControl, GenerationRequest, Prompt, SamplingParams
from serve_app.errors import ModelNotFound

# Clients of Text Generation Inference send these names, which it ignores; an empty name is no name in vLLM.
PLACEHOLDERS = ("", "tgi", "dummy")

# Requests with the same value go to the same replica, as far as its load allows.
SESSION_HEADER = "x-session-id"
_LONGEST_SESSION = 128


@dataclass(frozen=True, slots=True)
class Served:
    """What a name stands for: a model, or a LoRA adapter of the model."""

    model: Model
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """The name of the model, also for an adapter."""
        return self.model.name

    @property
    def served_name(self) -> str:
        return self.model.name if self.adapter is None else self.adapter.name

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        return self.model.sampling_defaults


async def keep() -> None:
    """No other process has to know."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`clock` returns monotonic seconds. `known` holds the facts of each model that was loaded once.

    `publish` passes changes of the `adapters` on to the other ingresses.
    """

    engine: Engine
    telemetry: ServiceTelemetry
    config: AppConfig
    clock: Callable[[], float]
    adapters: AdapterDirectory
    publish: Callable[[], Awaitable[None]] = keep
    known: dict[str, ModelInfo] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def served_names(self) -> tuple[str, ...]:
        """The names of all models and adapters."""
        listed = [one.adapter.name for one in self.adapters.all()]
        return (*(model.name for model in self.config.models), *listed)

    def model_of_body(self, name: str | None) -> Served:
        """The model that a body names; for a name that stands for any model, the first one. Raises ModelNotFound."""
        return self.model(self._chosen(name))

    def model(self, name: str | None) -> Served:
        """The named model or adapter, or the first model of the configuration. Raises ModelNotFound."""
        models = self.config.models
        if name is None:
            return Served(models[0])
        listed = self.adapters.find(name)
        wanted = name if listed is None else listed.model
        for model in models:
            if model.name == wanted:
                return Served(model, None if listed is None else listed.adapter)
        known = ", ".join(model.name for model in models)
        adapters = " GET /v1/models lists the LoRA adapters." if self.adapters.all() else ""
        raise ModelNotFound(f"Model {name[:128]!r} does not exist. Known models: {known}.{adapters}", param="model")

    def model_of(self, http: Request, name: str | None) -> Served:
        """The model that the body of a call names. Errors of the call are counted under it. Raises ModelNotFound."""
        model = self.model_of_body(name)
        http.state.model = model.name
        return model

    def model_of_body_or_query(self, http: Request, name: str | None) -> Served:
        """The model that the body names, else that of `?model=`. Both must exist. Raises ModelNotFound."""
        of_query, chosen = self.model(http.query_params.get("model")).served_name, self._chosen(name)
        return self.model_of(http, of_query if chosen is None else chosen)

    def _chosen(self, name: str | None) -> str | None:
        """The name of a body, or None if it stands for any model."""
        if name not in PLACEHOLDERS or any(model.name == name for model in self.config.models):
            return name
        return None if self.adapters.find(name) is None else name

    def deadline(self, http: Request) -> float:
        """The instant by which every part of this call must have ended, on `clock`."""
        arrived: float = http.state.arrived
        return arrived + self.limits.request_timeout_s

    def request(
        self, http: Request, id: str, served: Served, prompt: Prompt, params: SamplingParams, stream: bool
    ) -> GenerationRequest:
        """A whole answer waits for a sleeping model for a limited time; a stream reports that it waits."""
        wake_wait_s = None if stream else self.limits.warm_wait_s
        return GenerationRequest(
            id,
            served.name,
            prompt,
            params,
            self.clock(),
            self.deadline(http),
            wake_wait_s=wake_wait_s,
            adapter=served.adapter,
            session=http.headers.get(SESSION_HEADER, "")[:_LONGEST_SESSION],
            cache_control=_cache_control(http),
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


def configured_adapters(config: AppConfig) -> AdapterDirectory:
    """The adapters of all models of the configuration."""
    return AdapterDirectory(
        {
            model.name: [Adapter(one.name, one.source, one.revision) for one in model.lora.adapters]
            for model in config.models
            if model.lora is not None
        }
    )


def _cache_control(http: Request) -> CacheControl:
    """What the header `cache-control` asks of the response cache. Other directives have no effect (RFC 9111, 5.2.1)."""
    values = ",".join(http.headers.getlist("cache-control")).lower().split(",")
    directives = {value.strip() for value in values}
    if "no-store" in directives:
        return "no-store"
    return "no-cache" if "no-cache" in directives else ""


def generation_id(http: Request) -> str:
    """The id of the call with a suffix of our own, because two calls can carry the same id of the client."""
    return f"{http.state.request_id}-{uuid4().hex[:12]}"
