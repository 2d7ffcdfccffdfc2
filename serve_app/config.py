"""The one typed tree of configuration. Read once, frozen, unknown keys refused, every number bounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_TEMPLATES = Path(__file__).parent / "templates"
_OURS = "builtin:"


class ConfigError(Exception):
    """The configuration file cannot be used; the text lists every fault with its path."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Autoscaling(Section):
    """Ray Serve's replica autoscaling. `min_replicas: 0` lets an idle model leave the machine."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(32, gt=0)
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    downscale_to_zero_delay_s: float = Field(300, ge=0)
    look_back_period_s: float = Field(15, gt=10)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class Deployment(Section):
    """What Ray Serve is told of one deployment. Times in seconds."""

    max_ongoing_requests: int = Field(ge=1)
    max_queued_requests: int = Field(ge=1)
    num_replicas: int | None = Field(None, ge=1)
    autoscaling: Autoscaling | None = None
    health_check_period_s: float = Field(10, gt=0)
    health_check_timeout_s: float = Field(30, gt=0)
    graceful_shutdown_wait_loop_s: float = Field(2, gt=0)
    graceful_shutdown_timeout_s: float = Field(600, ge=0)  # as `limits.request_timeout_s`: no stream is cut
    max_surge_percent: int = Field(100, ge=0, le=100)

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Deployment:
        if (self.num_replicas is None) == (self.autoscaling is None):
            raise ValueError("state exactly one of num_replicas and autoscaling")
        return self

    @model_validator(mode="after")
    def _can_scale(self) -> Deployment:
        """Callers beyond the last place are refused and so not counted: replicas are added only for those before it."""
        scaling, most = self.autoscaling, self.max_ongoing_requests + self.max_queued_requests
        if scaling and scaling.max_replicas > 1 and scaling.target_ongoing_requests >= most:
            raise ValueError(
                f"autoscaling.target_ongoing_requests {scaling.target_ongoing_requests:g} is never passed with "
                f"{most} requests at most (max_ongoing_requests + max_queued_requests), so there would always be one "
                "replica; lower it"
            )
        return self

    @property
    def scales_to_zero(self) -> bool:
        return self.autoscaling is not None and self.autoscaling.min_replicas == 0


class Resources(Section):
    """What one replica reserves of a Ray node. `num_gpus` may be a fraction of one, or whole ones."""

    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)
    accelerator_type: str | None = None

    @field_validator("num_gpus")
    @classmethod
    def _one_is_shared_or_whole(cls, count: float) -> float:
        if count > 1 and count != int(count):
            raise ValueError(f"{count:g} is neither a part of one GPU nor a whole number of them")
        return count


class Batching(Section):
    """Admission by `@serve.batch`: how many requests enter the engine together, and how long the first waits."""

    max_batch_size: int = Field(32, ge=1)
    batch_wait_timeout_s: float = Field(0.002, ge=0, le=1)


class Engine(Section):
    """The continuous-batching loop of one replica.

    `max_running` is the number of slots (sequences that decode together); the memory budget may
    allow fewer. `max_context` caps prompt plus answer. `max_step_tokens` bounds the rows of one
    forward pass, so that a long prompt is prefilled in chunks between decode steps. `draft_tokens`
    is how many tokens are guessed ahead while few sequences run; 0 guesses none.
    """

    max_running: int = Field(32, ge=1, le=1024)
    max_waiting: int = Field(256, ge=1)
    max_context: int = Field(2048, ge=16)
    max_step_tokens: int = Field(256, ge=1)
    prefix_cache: bool = True
    draft_tokens: int = Field(4, ge=0, le=7)
    kv_memory_fraction: float = Field(0.5, gt=0, le=0.95)
    kv_memory_bytes: int | None = Field(None, ge=1)
    flush_interval_s: float = Field(0.02, ge=0, le=0.5)
    threads: int | None = Field(None, ge=1)


class SamplingDefaults(Section):
    """What a request gets for the fields it leaves out."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)


class Model(Section):
    """One model: one deployment with an engine of its own.

    `source` is `builtin:smollm2-135m`, a folder, a GGUF file, or a hub id (pinned by `revision`). `chat_template` is
    the path of a Jinja file that is used in place of the model's own template, or `builtin:` and the name of one of
    ours. `embeddings` has /v1/embeddings answer for it.
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    source: str = Field(min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = Field(None, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "int8", "int4"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: str | dict[str, int | str] | None = None
    embeddings: bool = False
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    resources: Resources = Resources()
    batching: Batching = Batching()
    engine: Engine = Engine()
    deployment: Deployment

    @field_validator("chat_template")
    @classmethod
    def _one_that_is_there(cls, source: str | None) -> str | None:
        known = [f"{_OURS}{path.stem}" for path in sorted(_TEMPLATES.glob("*.jinja"))]
        if source is not None and source.startswith(_OURS) and source not in known:
            raise ValueError(f"{source} is not there; it is the path of a Jinja file, or one of {', '.join(known)}")
        return source

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.batching.max_batch_size > self.deployment.max_ongoing_requests:
            raise ValueError(
                f"batching.max_batch_size {self.batching.max_batch_size} can never fill with "
                f"deployment.max_ongoing_requests {self.deployment.max_ongoing_requests}"
            )
        if self.device == "cuda" and self.resources.num_gpus == 0:
            raise ValueError("device: cuda needs resources.num_gpus above 0")
        return self


class Ingress(Section):
    """Who answers HTTP: a deployment of its own, or (`fused`) the replicas of the only model themselves."""

    fused: bool = False
    deployment: Deployment | None = None
    num_cpus: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_shape(self) -> Ingress:
        if self.fused and (self.deployment is not None or self.num_cpus):
            raise ValueError(
                "fused: true makes the model's own deployment the ingress; remove ingress.deployment and "
                "ingress.num_cpus, or set fused: false"
            )
        if not self.fused and self.deployment is None:
            raise ValueError("state ingress.deployment, or fused: true where there is exactly one model")
        return self


class Limits(Section):
    """What one request may ask for, and how long anybody waits. Times in seconds."""

    max_body_bytes: int = Field(1_048_576, ge=1024)
    max_batch_items: int = Field(256, ge=1)
    request_timeout_s: float = Field(600, gt=0)
    warm_wait_s: float = Field(30, gt=0)
    heartbeat_s: float = Field(5, gt=0, le=10)


class Tracing(Section):
    """Spans of requests, sent to an OpenTelemetry collector by OTLP over HTTP.

    `sampling_ratio` is the share of the requests that are traced; a caller's own decision (`traceparent`) stands.
    `capture_content` puts prompts and answers into spans. What the collector wants to be told in headers, such as a
    key, comes from OTEL_EXPORTER_OTLP_HEADERS.
    """

    endpoint: str = Field("http://127.0.0.1:4318/v1/traces", pattern=r"^https?://[^\s/]+")
    sampling_ratio: float = Field(0.01, ge=0, le=1)
    capture_content: bool = False


class Telemetry(Section):
    """What the service tells of itself. `tracing: null` traces nothing.

    `opentelemetry_metrics`: its times by OpenTelemetry's names as well.
    """

    opentelemetry_metrics: bool = False
    tracing: Tracing | None = None
    log_format: Literal["text", "json"] = "text"


class AppConfig(Section):
    """The `args` of serve_config.yaml. The first model answers requests that name none."""

    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    ingress: Ingress
    limits: Limits = Limits()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _distinct(self) -> AppConfig:
        slugs = [deployment_name(model.name) for model in self.models]
        twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
        if twice:
            raise ValueError(f"two models would share the deployment {', '.join(twice)}; give them distinct names")
        return self

    @model_validator(mode="after")
    def _fusible(self) -> AppConfig:
        if self.ingress.fused and len(self.models) != 1:
            raise ValueError(
                f"ingress.fused takes exactly one model, not {len(self.models)}; set it to false and state "
                "ingress.deployment"
            )
        if self.ingress.fused and self.models[0].deployment.scales_to_zero:
            raise ValueError(
                "with ingress.fused nobody could answer while the model is scaled to zero, and health checks would "
                "wake it; set min_replicas to 1 or more, or fused to false and state ingress.deployment"
            )
        return self


def template_path(source: str) -> Path:
    """The file that a model's `chat_template` names."""
    if source.startswith(_OURS):
        return _TEMPLATES / f"{source.removeprefix(_OURS)}.jinja"
    return Path(source).expanduser()


def deployment_name(model: str) -> str:
    """The Ray Serve deployment of a model: its name with what a deployment name cannot hold replaced."""
    return "model-" + "".join(c if c.isalnum() or c in "._-" else "-" for c in model)


class HttpOptions(BaseModel):
    """Where Ray Serve's proxy listens; its other options are Ray's to judge."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class ServeFile(Section):
    """What the start-up program needs of a Ray Serve config file: the address, and the application's route and args."""

    http_options: HttpOptions
    name: str
    route_prefix: str
    args: AppConfig


def load_serve_file(path: str | Path) -> ServeFile:
    """Read the single application of a Ray Serve config file.

    Raises ConfigError with every fault and its place when the file cannot be used.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass --config with the path of a serve_config.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError(f"{path}: expected a Ray Serve config with exactly one entry under `applications`")
    application: dict[str, Any] = applications[0]
    try:
        return ServeFile(
            http_options=document.get("http_options", {}),
            name=application.get("name", "default"),
            route_prefix=application.get("route_prefix", "/"),
            args=application.get("args", {}),
        )
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{describe(error)}") from None


def describe(error: ValidationError) -> str:
    """Every fault of a pydantic error, one a line: path, then what is wrong."""
    faults = [(".".join(str(part) for part in fault["loc"]), fault) for fault in error.errors()]
    return "\n".join(
        f"  {path or '(top)'}: {fault['msg']}"
        for path, fault in faults
        # A list with a faulty member is also reported as too short.
        if fault["type"] != "too_short" or not any(other.startswith(f"{path}.") for other, _ in faults)
    )


def cache_dir() -> Path:
    """Where converted models are kept: the user's cache folder, by the XDG base directory specification."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "serve_app"
