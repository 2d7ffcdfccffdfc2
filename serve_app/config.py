"""The configuration: one typed, immutable tree. Unknown keys are refused and every number has bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from serve_app.auth_config import AuthOptions, is_loopback
from serve_app.cache_config import CacheOptions
from serve_app.database_config import DatabaseOptions
from serve_app.engine_config import (
    KINDS,
    AnyEngine,
    AutoOptions,
    EngineOptions,
    NativeOptions,
    Speculative,
    VllmOptions,
)
from serve_app.jobs_config import BatchOptions, IdempotencyOptions
from serve_app.lora_config import NAME_PATTERN, Lora, LoraAdapter, valid_name
from serve_app.quota_config import Price, QuotaOptions
from serve_app.section import Section

__all__ = [
    "KINDS",
    "AppConfig",
    "AuthOptions",
    "AutoOptions",
    "Autoscaling",
    "BatchOptions",
    "Batching",
    "CacheOptions",
    "ConfigError",
    "Cors",
    "DatabaseOptions",
    "Deployment",
    "EngineOptions",
    "IdempotencyOptions",
    "Ingress",
    "Limits",
    "Lora",
    "LoraAdapter",
    "Model",
    "NativeOptions",
    "Price",
    "QuotaOptions",
    "Resources",
    "SamplingDefaults",
    "Section",
    "Speculative",
    "StoredResponses",
    "Telemetry",
    "Tracing",
    "VllmOptions",
    "cache_dir",
    "check_template",
    "deployment_name",
    "describe",
    "is_loopback",
    "template_path",
    "valid_name",
]

_TEMPLATES = Path(__file__).parent / "templates"
_BUILTIN = "builtin:"
# Browsers send schemes and hosts in lower case.
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


class ConfigError(Exception):
    """The configuration cannot be used. The message lists every fault with its path."""


class Autoscaling(Section):
    """A variable number of replicas, with times in seconds. With `min_replicas: 0` an idle model has no replica.

    The replicas of a model are sized for the work that waits: a request should have its first token within
    `target_ttft_s`, and `min_idle` replicas more than the requests need are kept ready. With `target_ongoing_requests`
    they are sized by Ray Serve for this number of requests each, as the replicas of an ingress always are.
    """

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ttft_s: float = Field(2, gt=0)
    min_idle: int = Field(0, ge=0)
    target_ongoing_requests: float | None = Field(None, gt=0)
    upscale_delay_s: float = Field(0, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    downscale_to_zero_delay_s: float = Field(300, ge=0)
    look_back_period_s: float = Field(15, gt=10)  # handles report their requests to Ray every 10 s

    @model_validator(mode="after")
    def _check_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        if self.min_idle > self.max_replicas:
            raise ValueError(f"min_idle {self.min_idle} is above max_replicas {self.max_replicas}")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Autoscaling:
        if self.target_ongoing_requests is None:
            return self
        for key in ("target_ttft_s", "min_idle"):
            if key in self.model_fields_set:
                raise ValueError(f"{key} and target_ongoing_requests exclude each other: remove one of them")
        return self

    @property
    def by_work(self) -> bool:
        """Whether the work that waits decides, and not Ray Serve's number of requests."""
        return self.target_ongoing_requests is None


class Deployment(Section):
    """Ray Serve's options for one deployment, with times in seconds."""

    max_ongoing_requests: int = Field(ge=1)
    max_queued_requests: int = Field(ge=1)
    num_replicas: int | None = Field(None, ge=1)
    autoscaling: Autoscaling | None = None
    health_check_period_s: float = Field(10, gt=0)
    health_check_timeout_s: float = Field(30, gt=0)
    graceful_shutdown_wait_loop_s: float = Field(2, gt=0)
    graceful_shutdown_timeout_s: float = Field(600, ge=0)  # `limits.request_timeout_s`: a rollout interrupts no stream
    max_surge_percent: int = Field(100, ge=0, le=100)
    max_replicas_per_node: int | None = Field(None, ge=1, le=100)

    @model_validator(mode="after")
    def _check_scaling(self) -> Deployment:
        if (self.num_replicas is None) == (self.autoscaling is None):
            raise ValueError("set exactly one of num_replicas and autoscaling")
        return self

    @model_validator(mode="after")
    def _check_target(self) -> Deployment:
        """Ray counts the requests that run on replicas, and a replica never runs more than `max_ongoing_requests`."""
        scaling = self.autoscaling
        target = scaling.target_ongoing_requests if scaling else None
        if scaling and target and scaling.max_replicas > 1 and target >= self.max_ongoing_requests:
            raise ValueError(
                f"autoscaling.target_ongoing_requests {target:g} must be below "
                f"max_ongoing_requests {self.max_ongoing_requests}: otherwise Ray never adds a replica"
            )
        return self

    @property
    def most_replicas(self) -> int:
        return self.autoscaling.max_replicas if self.autoscaling else self.num_replicas or 1

    @property
    def scales_to_zero(self) -> bool:
        scaling = self.autoscaling
        return scaling is not None and scaling.min_replicas == 0 and scaling.min_idle == 0


class Resources(Section):
    """The resources of a Ray node that one replica reserves. `num_gpus` is at most 1, or a whole number."""

    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    accelerator_type: str | None = None

    @field_validator("num_gpus")
    @classmethod
    def _check_gpus(cls, count: float) -> float:
        if count > 1 and count != int(count):
            raise ValueError(f"{count:g} is neither a fraction of one GPU nor a whole number of GPUs")
        return count


class Batching(Section):
    """Admission by `@serve.batch`: the most requests that enter the engine together, and the first one's wait."""

    max_batch_size: int = Field(32, ge=1)
    batch_wait_timeout_s: float = Field(0.002, ge=0, le=1)


class SamplingDefaults(Section):
    """Values for the fields that a request leaves out."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)


class Model(Section):
    """One model, which is one deployment. Each of its replicas has its own engine.

    `source` is `builtin:smollm2-135m`, a folder, a GGUF file, or a hub id with its `revision`. `chat_template` replaces
    the model's own template: the path of a Jinja file, or `builtin:` and the name of a template of this package.
    `embeddings` serves the model at /v1/embeddings. With `sanitize_control_tokens` the texts of a conversation never
    become control tokens of the chat template.
    """

    name: str = Field(min_length=1, pattern=NAME_PATTERN)
    source: str = Field(min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = Field(None, min_length=1)
    sanitize_control_tokens: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "int8", "int4"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: str | dict[str, int | str] | None = None
    embeddings: bool = False
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    resources: Resources = Resources()
    batching: Batching = Batching()
    engine: AnyEngine = NativeOptions()
    lora: Lora | None = None
    price: Price = Price()
    deployment: Deployment

    @field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, source: str | None) -> str | None:
        return check_template(source)

    @model_validator(mode="after")
    def _check_consistency(self) -> Model:
        if self.batching.max_batch_size > self.deployment.max_ongoing_requests:
            raise ValueError(
                f"batching.max_batch_size {self.batching.max_batch_size} must not exceed "
                f"deployment.max_ongoing_requests {self.deployment.max_ongoing_requests}: such a batch never fills"
            )
        if self.device == "cuda" and self.resources.num_gpus == 0:
            raise ValueError("device: cuda needs resources.num_gpus above 0")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Model:
        if isinstance(self.engine, VllmOptions):
            self._check_vllm(self.engine)
        if isinstance(self.engine, AutoOptions) and self.quantization not in ("auto", "none"):
            raise ValueError(f"quantization: {self.quantization} needs engine.kind: native")
        return self

    def _check_vllm(self, engine: VllmOptions) -> None:
        if self.embeddings:
            raise ValueError("embeddings need engine.kind: native; serve them by a second model with that engine")
        if self.quantization != "auto":
            raise ValueError("quantization is for engine.kind: native; set engine.quantization")
        if self.device_map is not None or self.device == "cpu":
            raise ValueError("device_map and device: cpu are for engine.kind: native; remove them")
        if self.is_toy:
            raise ValueError("the toy model has no weights; remove engine.kind: vllm")
        reserved = max(self.resources.num_gpus, 1)
        if engine.gpus % reserved or (self.resources.num_gpus < 1 and engine.gpus > 1):
            raise ValueError(
                f"engine.tensor_parallel × engine.pipeline_parallel is {engine.gpus}, but resources.num_gpus is "
                f"{self.resources.num_gpus:g}: set num_gpus to {engine.gpus}, or, for a replica on several nodes, to "
                "its GPUs on each"
            )
        if engine.gpus > reserved and self.deployment.max_replicas_per_node is not None:
            raise ValueError("deployment.max_replicas_per_node is not for replicas on several nodes; remove it")

    @property
    def is_toy(self) -> bool:
        """Whether this is the built-in toy model, which has no weights."""
        return self.source.startswith("builtin:toy")

    @property
    def may_use_vllm(self) -> bool:
        """Whether vLLM computes the model; with `engine.kind: auto` it does if it is installed."""
        if isinstance(self.engine, AutoOptions):
            return self.resources.num_gpus > 0 and not self.embeddings and not self.is_toy
        return isinstance(self.engine, VllmOptions)

    @property
    def native_options(self) -> NativeOptions:
        """The options of the native engine: those of the file, or its own with what the kind `auto` sets."""
        if isinstance(self.engine, NativeOptions):
            return self.engine
        assert isinstance(self.engine, AutoOptions), "vLLM has other options"
        return NativeOptions(**self.engine.chosen())

    @property
    def vllm_options(self) -> VllmOptions:
        """The options of vLLM: those of the file, or its own with what the kind `auto` sets, on all reserved GPUs."""
        if isinstance(self.engine, VllmOptions):
            return self.engine
        assert isinstance(self.engine, AutoOptions), "the native engine has other options"
        gpus = max(1, int(self.resources.num_gpus))
        return VllmOptions(kind="vllm", tensor_parallel=gpus, **self.engine.chosen())


_INGRESS_DEPLOYMENT = Deployment(num_replicas=1, max_ongoing_requests=1024, max_queued_requests=256)


class Ingress(Section):
    """The deployment that answers HTTP. It mostly waits, so that it reserves no CPU by default."""

    deployment: Deployment = _INGRESS_DEPLOYMENT
    num_cpus: float = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _refuse_fused(cls, section: Any) -> Any:
        if isinstance(section, dict) and "fused" in section:
            raise ValueError("fused was removed; an ingress always runs in front of the models: remove the key")
        return section


class Limits(Section):
    """Bounds of one request, with times in seconds."""

    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_batch_items: int = Field(256, ge=1)
    request_timeout_s: float = Field(600, gt=0)
    warm_wait_s: float = Field(30, gt=0)
    heartbeat_s: float = Field(5, gt=0, le=10)
    upload_timeout_s: float = Field(30, gt=0)
    stalled_client_s: float = Field(60, gt=0)


class Cors(Section):
    """Cross-origin resource sharing: the web pages that may call the service from a browser. By default none may.

    An origin is `scheme://host` or `scheme://host:port`, or `*` for all of them. A browser remembers the permission for
    `max_age_s` seconds.
    """

    allow_origins: tuple[str, ...] = ()
    max_age_s: int = Field(600, ge=0)

    @field_validator("allow_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin; write scheme://host or scheme://host:port in lower case, without a "
                    'path and without a slash at the end, or "*"'
                )
        return origins


class StoredResponses(Section):
    """The responses of OpenAI's Responses API that each ingress process keeps in its memory.

    `max_stored: 0` stores none. A response expires `ttl_s` seconds after its last use.
    """

    max_stored: int = Field(1000, ge=0)
    max_stored_bytes: int = Field(67_108_864, ge=1024)
    ttl_s: float = Field(86_400, gt=0)


class Tracing(Section):
    """Spans of requests, sent to an OpenTelemetry collector by OTLP over HTTP.

    `sampling_ratio` is the share of traced requests among those without a `traceparent` header, which decides
    otherwise. `capture_content` puts prompts and answers into spans.
    """

    endpoint: str = Field("http://127.0.0.1:4318/v1/traces", pattern=r"^https?://[^\s/]+")
    sampling_ratio: float = Field(0.01, ge=0, le=1)
    capture_content: bool = False


class Telemetry(Section):
    """Traces, logs and metrics. `tracing: null` switches traces off.

    `opentelemetry_metrics` exports the latencies by OpenTelemetry's names too.
    """

    opentelemetry_metrics: bool = False
    tracing: Tracing | None = None
    log_format: Literal["text", "json"] = "text"


class AppConfig(Section):
    """The `args` of serve_config.yaml. The first model serves the requests that name no model.

    `response_cache: null` switches the cache off, `batches: null` switches batch jobs off; `auth: null` serves everyone
    on this machine without keys.
    """

    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    ingress: Ingress = Ingress()
    limits: Limits = Limits()
    cors: Cors = Cors()
    responses: StoredResponses = StoredResponses()
    response_cache: CacheOptions | None = None
    auth: AuthOptions | None = None
    database: DatabaseOptions = DatabaseOptions()
    batches: BatchOptions | None = None
    idempotency: IdempotencyOptions = IdempotencyOptions()
    quotas: QuotaOptions = QuotaOptions()
    telemetry: Telemetry = Telemetry()

    @property
    def checks_keys(self) -> bool:
        return self.auth is not None and not self.auth.allow_anonymous

    def check_address(self, host: str) -> None:
        """Raises ConfigError if the service must not listen on this address: strangers could use it."""
        if self.auth is None and not is_loopback(host):
            raise ConfigError(
                f"the service would listen on {host} without authentication. Set `auth: {{}}` to demand API keys "
                '(docs/operations.md, "Keys and tenants"), or `auth: {allow_anonymous: true}` if everyone who reaches '
                "the port may use the service; or listen on 127.0.0.1."
            )

    @model_validator(mode="after")
    def _check_names(self) -> AppConfig:
        slugs = [deployment_name(model.name) for model in self.models]
        twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        if twice:
            raise ValueError(f"several models have the deployment {', '.join(twice)}: rename them")
        adapters = [adapter.name for model in self.models if model.lora for adapter in model.lora.adapters]
        names = [*(model.name for model in self.models), *adapters]
        if taken := sorted({name for name in adapters if names.count(name) > 1}):
            raise ValueError(f"the names of adapters and models must differ, but {', '.join(taken)} occurs twice")
        return self


def check_template(source: str | None) -> str | None:
    """A `chat_template`. Raises ValueError if it names a template that this package does not have."""
    known = [f"{_BUILTIN}{path.stem}" for path in sorted(_TEMPLATES.glob("*.jinja"))]
    if source is not None and source.startswith(_BUILTIN) and source not in known:
        raise ValueError(f"{source} does not exist; use the path of a Jinja file, or one of {', '.join(known)}")
    return source


def template_path(source: str) -> Path:
    """The file of a model's `chat_template`."""
    if source.startswith(_BUILTIN):
        return _TEMPLATES / f"{source.removeprefix(_BUILTIN)}.jinja"
    return Path(source).expanduser()


def deployment_name(model: str) -> str:
    """The Ray Serve deployment of a model: its name, with `-` for characters that a deployment name cannot have."""
    return "model-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in model)


def describe(
    error: ValidationError, sentence: Callable[[str, str, str], str] = lambda path, message, kind: message
) -> str:
    """Every fault of a pydantic error, one per line: its path, then `sentence(path, message, type)`."""
    faults = [(_path(fault["loc"]), fault) for fault in error.errors()]
    return "\n".join(
        f"  {path or '(top)'}: {sentence(path, fault['msg'].removeprefix('Value error, '), fault['type'])}"
        for path, fault in faults
        # pydantic also reports a list with a faulty member as too short.
        if fault["type"] != "too_short" or not any(other.startswith(f"{path}.") for other, _ in faults)
    )


def _path(place: tuple[int | str, ...]) -> str:
    """The path of a fault as the file has it: pydantic's place also has the kind of an engine after `engine`."""
    parts = [part for before, part in pairwise(("", *place)) if not (before == "engine" and part in KINDS)]
    return ".".join(str(part) for part in parts)


def cache_dir() -> Path:
    """The folder of converted models, in the user's cache folder by the XDG base directory specification."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "serve_app"
