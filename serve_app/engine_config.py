"""The options of a model's engine: one section for each kind of engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from serve_app.section import Section

KINDS = ("native", "vllm", "auto")


class EngineOptions(Section):
    """What every engine has.

    `max_running` is the number of sequences that decode together; the memory budget may allow fewer. `max_context` is
    the limit of prompt plus answer in tokens; None is the model's own limit.
    """

    max_running: int = Field(32, ge=1, le=1024)
    max_waiting: int = Field(256, ge=1)
    max_context: int | None = Field(None, ge=16)
    prefix_cache: bool = True
    flush_interval_s: float = Field(0.02, ge=0, le=0.5)


class NativeOptions(EngineOptions):
    """The continuous-batching engine of this package.

    `max_step_tokens` is the limit of rows in one forward pass: a longer prompt is prefilled in chunks between decode
    steps. `draft_tokens` is the number of tokens that speculative decoding proposes while few sequences run; 0 switches
    it off. With `cache_weights` the packed weights of a model on CPU are kept in the cache folder: later starts map
    them, and all replicas of a node share their memory. A step that takes longer than `step_timeout_s`, and 5 times as
    long as expected, has hung: the replica's process ends, and Ray starts another.
    """

    kind: Literal["native"] = "native"
    max_step_tokens: int = Field(256, ge=1)
    draft_tokens: int = Field(4, ge=0, le=7)
    kv_memory_fraction: float = Field(0.5, gt=0, le=0.95)
    kv_memory_bytes: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    cache_weights: bool = True
    step_timeout_s: float = Field(10, ge=1)


class Speculative(Section):
    """Speculative decoding of vLLM: `method` proposes `tokens` tokens a step.

    `ngram` looks them up in the text so far. The other methods need the `model` that proposes: a folder or a hub id.
    """

    method: Literal["ngram", "draft_model", "eagle", "eagle3", "medusa", "mlp_speculator"] = "ngram"
    tokens: int = Field(4, ge=1, le=16)
    model: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _check_model(self) -> Speculative:
        if (self.model is None) != (self.method == "ngram"):
            raise ValueError("method ngram takes no model" if self.model else f"method {self.method} needs a model")
        return self


# The arguments of vLLM's engine that this service sets itself, with the key that sets each.
_SET_BY_KEYS = {
    "model": "source",
    "tokenizer": "source",
    "revision": "revision",
    "tokenizer_revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "dtype": "dtype",
    "quantization": "engine.quantization",
    "max_model_len": "engine.max_context",
    "max_num_seqs": "engine.max_running",
    "max_num_batched_tokens": "engine.max_step_tokens",
    "enable_prefix_caching": "engine.prefix_cache",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_memory_bytes",
    "tensor_parallel_size": "engine.tensor_parallel",
    "pipeline_parallel_size": "engine.pipeline_parallel",
    "enforce_eager": "engine.enforce_eager",
    "speculative_config": "engine.speculative",
    "enable_lora": "lora",
    "max_loras": "lora.max_loaded",
    "max_cpu_loras": "lora.max_loaded",
    "max_lora_rank": "lora.max_rank",
}
# Values of `load_format` with which vLLM loads pickled weights, which can contain code.
_PICKLED = frozenset({"auto", "hf", "npcache", "pt"})
# Those that the adapter needs as it sets them.
_FIXED = frozenset(
    {
        "disable_log_stats",
        "distributed_executor_backend",
        "generation_config",
        "max_logprobs",
        "scheduling_policy",
        "skip_tokenizer_init",
        "structured_outputs_config",
    }
)


class VllmOptions(EngineOptions):
    """vLLM in the process of the replica, for GPUs.

    `max_step_tokens` None is vLLM's own. `gpu_memory_utilization` is the share of each GPU that the replica may use;
    None is 0.9 of the share that it reserves. `quantization` None is what the checkpoint has. `options` are further
    arguments of vLLM's AsyncEngineArgs.
    """

    kind: Literal["vllm"]
    max_running: int = Field(256, ge=1, le=4096)
    max_waiting: int = Field(1024, ge=1)
    max_step_tokens: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    kv_memory_bytes: int | None = Field(None, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    quantization: Literal["fp8", "awq", "gptq", "compressed-tensors", "bitsandbytes"] | None = None
    enforce_eager: bool = False
    speculative: Speculative | None = None
    options: dict[str, Any] = Field({})

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("load_format") in _PICKLED:
            raise ValueError("load_format loads pickled weights, which can contain code; convert them to safetensors")
        for name in options:
            if name in _SET_BY_KEYS:
                raise ValueError(f"{name} is set by the key {_SET_BY_KEYS[name]} of the model; remove it here")
            if name in _FIXED:
                raise ValueError(f"{name} has the value that this service needs; remove it")
        return options

    @property
    def gpus(self) -> int:
        """The number of GPUs over which one replica distributes its model."""
        return self.tensor_parallel * self.pipeline_parallel


class AutoOptions(EngineOptions):
    """vLLM where it is installed and the replica reserves a GPU, else the native engine, with their own defaults."""

    kind: Literal["auto"]

    def chosen(self) -> dict[str, Any]:
        """The keys that the file sets, without `kind`."""
        return self.model_dump(exclude_unset=True, exclude={"kind"})


def _engine_kind(value: Any) -> str:
    """The engine of a section, for pydantic's choice of its class. Files of earlier versions have no kind."""
    kind = value.get("kind", "native") if isinstance(value, dict) else getattr(value, "kind", "native")
    return str(kind)


AnyEngine = Annotated[
    Annotated[NativeOptions, Tag("native")] | Annotated[VllmOptions, Tag("vllm")] | Annotated[AutoOptions, Tag("auto")],
    Discriminator(
        _engine_kind,
        custom_error_type="engine_kind",
        custom_error_message=f"kind is one of {', '.join(KINDS)}",
    ),
]
