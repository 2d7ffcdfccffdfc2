"""What every route shares: the gateway, the configuration, the clock, and how an HTTP call becomes a request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.requests import Request

from serve_app.api.gateway import Gateway
from serve_app.api.native.schema import SamplingFields
from serve_app.config import AppConfig, Model
from serve_app.core.queries import GetModelInfo, ModelInfo
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams
from serve_app.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`clock` gives monotonic seconds; `infos` is what models said of themselves so far."""

    gateway: Gateway
    config: AppConfig
    clock: Callable[[], float]
    infos: dict[str, ModelInfo] = field(default_factory=dict)

    async def info(self, model: str) -> ModelInfo:
        """What a model says of itself, asked once. Raises ServeAppError."""
        if model not in self.infos:
            self.infos[model] = await self.gateway.query(model, GetModelInfo(), self.config.limits.warm_wait_s)
        return self.infos[model]

    def model(self, name: str | None) -> Model:
        """The named model, or the first of the configuration. Raises ModelNotFound."""
        models = self.config.models
        if name is None:
            return models[0]
        for model in models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in models)
        raise ModelNotFound(f"there is no model {name[:128]!r}; the models here are: {known}", param="model")

    def asked(self, http: Request, name: str | None) -> Model:
        """The model that a call names; should the call be refused, the refusal counts as its. Raises ModelNotFound."""
        model = self.model(name)
        http.state.model = model.name
        return model

    def chosen(self, http: Request, name: str | None) -> Model:
        """The model that the body names, or else `?model=`, which must exist either way. Raises ModelNotFound."""
        in_address = self.model(http.query_params.get("model")).name
        return self.asked(http, in_address if name is None else name)

    def deadline(self, http: Request) -> float:
        """The instant by which every part of this call must have ended, on the monotonic clock."""
        arrived: float = http.state.arrived
        return arrived + self.config.limits.request_timeout_s

    def request(
        self, http: Request, id: str, model: Model, prompt: Prompt, params: SamplingParams, body: SamplingFields
    ) -> GenerationRequest:
        return GenerationRequest(
            id,
            model.name,
            prompt,
            params,
            time.monotonic(),
            self.deadline(http),
            cache_salt=body.cache_salt,
            truncate_prompt_tokens=body.truncate_prompt_tokens,
            priority=body.priority,
        )


def generation_id(http: Request) -> str:
    """The call's id with a suffix of our own: two calls may carry the same client id."""
    return f"{http.state.request_id}-{uuid4().hex[:12]}"
