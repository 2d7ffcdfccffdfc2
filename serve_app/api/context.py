"""The context of all routes: engine, telemetry, configuration and clock; it also builds the requests to the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request

from serve_app.api.experiments import VARIANT_HEADER, Experiments, NoExperiments, caller_of, identity_of, session_of
from serve_app.api.generation import until_disconnect
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.api.timeouts import FIRST_TOKEN_TIMEOUT, REQUEST_TIMEOUT, timeout_s
from serve_app.config import AppConfig, Limits, Model, SamplingDefaults
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.core.experiments import Caller, Choice
from serve_app.core.queries import A, GetModelInfo, ModelInfo, Query
from serve_app.core.requests import Adapter, CacheControl, ChatPrompt, GenerationRequest, Prompt, SamplingParams
from serve_app.core.tenants import Identity
from serve_app.errors import InvalidRequest, ModelNotFound

# Clients of Text Generation Inference send these names, which it ignores; an empty name is no name in vLLM.
PLACEHOLDERS = ("", "tgi", "dummy")
_UNKNOWN = Caller()


@dataclass(frozen=True, slots=True)
class Served:
    """What a name stands for: a model, a LoRA adapter of the model, or the variant of an experiment for a caller."""

    model: Model
    adapter: Adapter | None = None
    choice: Choice | None = None

    @property
    def name(self) -> str:
        """The name of the model, also for an adapter."""
        return self.model.name

    @property
    def served_name(self) -> str:
        if self.choice is not None:
            return self.choice.assignment.experiment
        return self.model.name if self.adapter is None else self.adapter.name

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        choice = self.choice
        if choice is None or choice.temperature is None or choice.top_p is None:
            return self.model.sampling_defaults
        return SamplingDefaults(temperature=choice.temperature, top_p=choice.top_p)

    def prompt(self, prompt: Prompt) -> Prompt:
        """The prompt, with the chat template of the variant if it has its own."""
        if self.choice is None or not self.choice.template or not isinstance(prompt, ChatPrompt):
            return prompt
        return replace(prompt, template=self.choice.template)


# Records an action of an administrator: who, what, on what, with which details.
Audit = Callable[[Identity, str, str, dict[str, Any]], Awaitable[None]]


async def keep() -> None:
    """No other process has to know."""


async def no_audit(identity: Identity, action: str, target: str, details: dict[str, Any]) -> None:
    """Keep no record."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`clock` returns monotonic seconds. `known` holds the facts of each model that was loaded once.

    `publish` passes changes of the `adapters` on to the other ingresses. `audit` records the actions of administrators.
    """

    engine: Engine
    telemetry: ServiceTelemetry
    config: AppConfig
    clock: Callable[[], float]
    adapters: AdapterDirectory
    publish: Callable[[], Awaitable[None]] = keep
    experiments: Experiments = field(default_factory=NoExperiments)
    known: dict[str, ModelInfo] = field(default_factory=dict)
    audit: Audit = no_audit

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def served_names(self, identity: Identity) -> tuple[str, ...]:
        """The names of the models, adapters and experiments that the caller may use."""
        listed = [one.adapter.name for one in self.adapters.all()]
        models = [model.name for model in self.config.models]
        names = dict.fromkeys((*models, *listed, *self.experiments.names()))
        return tuple(name for name in names if _may_use(identity, name))

    def model_of_body(self, http: Request, name: str | None, user: str = "") -> Served:
        """The model that a body names; for a name that stands for any model, the first one.

        Raises ModelNotFound, and InvalidRequest if the call asks for a variant that does not exist.
        """
        return self.model(self._chosen(name), identity_of(http), caller_of(http, user))

    def model(self, name: str | None, identity: Identity, caller: Caller = _UNKNOWN) -> Served:
        """The named model or adapter, or the variant of the named experiment for a caller.

        None is the name of the first model of the configuration that the caller may use. Raises ModelNotFound, also
        for a model that the caller may not use, and InvalidRequest if the caller asks for a variant that does not
        exist.
        """
        if name is None:
            models = [model.name for model in self.config.models]
            name = next((one for one in models if _may_use(identity, one)), models[0])
        if not _may_use(identity, name):
            raise self._unknown(name, identity)
        choice = self.experiments.choose(name, caller)
        if choice is not None:
            return replace(self._model(choice.adapter or choice.model, identity), choice=choice)
        if caller.variant:
            raise InvalidRequest(f"Model {name[:128]!r} has no variants. Leave out '{VARIANT_HEADER}'.", VARIANT_HEADER)
        return self._model(name, identity)

    def _model(self, name: str, identity: Identity) -> Served:
        """Raises ModelNotFound."""
        models = self.config.models
        listed = self.adapters.find(name)
        wanted = name if listed is None else listed.model
        for model in models:
            if model.name == wanted:
                return Served(model, None if listed is None else listed.adapter)
        raise self._unknown(name, identity)

    def _unknown(self, name: str, identity: Identity) -> ModelNotFound:
        """The same error for a model that does not exist and for one that the caller may not use."""
        names = dict.fromkeys((*(model.name for model in self.config.models), *self.experiments.names()))
        known = ", ".join(one for one in names if _may_use(identity, one)) or "none"
        adapters = " GET /v1/models lists the LoRA adapters." if self.adapters.all() else ""
        return ModelNotFound(f"Model {name[:128]!r} does not exist. Known models: {known}.{adapters}", param="model")

    def model_of(self, http: Request, name: str | None, user: str = "") -> Served:
        """The model that the body of a call names, for the user that it names.

        Errors of the call are counted under it, and the answer has the variant in a header. Raises ModelNotFound, and
        InvalidRequest if the call asks for a variant that does not exist.
        """
        model = self.model_of_body(http, name, user)
        http.state.model = model.name
        if model.choice is not None:
            http.state.assignment = model.choice.assignment
        return model

    def model_of_body_or_query(self, http: Request, name: str | None) -> Served:
        """The model that the body names, else that of `?model=`. Both must exist. Raises as `model_of`."""
        chosen, of_query = self._chosen(name), http.query_params.get("model")
        if of_query is not None:
            self.model(of_query, identity_of(http))
        return self.model_of(http, of_query if chosen is None else chosen)

    def _chosen(self, name: str | None) -> str | None:
        """The name of a body, or None if it stands for any model."""
        if name not in PLACEHOLDERS or name in self.experiments.names():
            return name
        if any(model.name == name for model in self.config.models):
            return name
        return None if self.adapters.find(name) is None else name

    def deadline(self, http: Request) -> float:
        """The instant by which every part of this call must have ended, on `clock`.

        The client can make it earlier, not later. Raises InvalidRequest.
        """
        arrived: float = http.state.arrived
        longest = self.limits.request_timeout_s
        return arrived + min(longest, timeout_s(http, REQUEST_TIMEOUT) or longest)

    def request(
        self, http: Request, id: str, served: Served, prompt: Prompt, params: SamplingParams, stream: bool
    ) -> GenerationRequest:
        """A whole answer waits for a sleeping model for a limited time; a stream reports that it waits.

        Raises InvalidRequest if a header of the call is wrong.
        """
        first_token_s = timeout_s(http, FIRST_TOKEN_TIMEOUT)
        wake_wait_s = None if stream else self.limits.warm_wait_s
        choice, identity = served.choice, identity_of(http)
        assignment = None if choice is None else choice.assignment
        self.experiments.called(http.state.request_id, served.name, assignment, identity.tenant)
        return GenerationRequest(
            id,
            served.name,
            served.prompt(prompt),
            params,
            self.clock(),
            self.deadline(http),
            wake_wait_s=wake_wait_s,
            first_token_deadline=None if first_token_s is None else http.state.arrived + first_token_s,
            adapter=served.adapter,
            session=session_of(http),
            assignment=assignment,
            cache_control=_cache_control(http),
            tenant=identity.tenant,
            key=identity.key,
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


def _may_use(identity: Identity, name: str) -> bool:
    """Whether the caller may use the model, adapter or experiment; each is allowed by its own name."""
    return identity.models is None or name in identity.models


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
