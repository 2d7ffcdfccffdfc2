"""Computes the tokens that vLLM's KV cache holds on a machine, after weights, activations and CUDA graphs.

The reserves are what vLLM reported for Llama-3-8B on GPUs of 80 GB (vllm-project/vllm, pull requests 10511 and 11005,
and issue 20264). They grow with the width of the model, its vocabulary and `max_step_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra_pulumi.catalogue import InstanceType
from infra_pulumi.sizing_facts import BYTES, GIB, Dtype, Load, attention

# The share of a GPU's nominal memory that CUDA reports: 22.5 of an A10G's or L4's 24 GiB, 45 of an L40S's 48.
VISIBLE = 0.94
CONTEXT_GIB = 1.8  # CUDA's context, and for several GPUs NCCL, which needs as much again
ACTIVATIONS_GIB = 1.3
GRAPHS_GIB = 0.5
# vLLM divides the heads of a layer evenly, and the usual models have a power of two of them.
_TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class VllmSetup:
    """The keys of a model's engine that decide its memory. `tensor_parallel` None is as few GPUs as hold the model."""

    tensor_parallel: int | None = None
    pipeline_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    fp8_kv_cache: bool = False
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True)
class VllmFit:
    """A replica on `gpus` GPUs of one machine, whose KV cache holds `kv_tokens` tokens."""

    gpus: int
    kv_tokens: int

    def sequences(self, load: Load) -> int:
        """How many of the load's sequences run at the same time."""
        return min(load.streams, self.kv_tokens // load.context)


def fit(machine: InstanceType, weights: float, dtype: Dtype, load: Load, setup: VllmSetup) -> VllmFit | None:
    """The replica with the fewest GPUs that holds the model and one sequence of the load; None if none does."""
    choices = (setup.tensor_parallel,) if setup.tensor_parallel else _TENSOR_PARALLEL
    for tensor in choices:
        gpus = tensor * setup.pipeline_parallel
        tokens = kv_tokens(machine, weights, dtype, tensor, setup)
        if gpus <= machine.gpu_count and tokens >= load.context:
            return VllmFit(gpus, tokens)
    return None


def kv_tokens(machine: InstanceType, weights: float, dtype: Dtype, tensor: int, setup: VllmSetup) -> int:
    """The tokens that the KV cache holds on `tensor` GPUs for each pipeline stage; 0 if the model does not fit."""
    gpus = tensor * setup.pipeline_parallel
    usable = (machine.gpu_memory_gib or 0) * VISIBLE * setup.gpu_memory_utilization
    reserved = CONTEXT_GIB * (1 if gpus == 1 else 2) + ACTIVATIONS_GIB + (0 if setup.enforce_eager else GRAPHS_GIB)
    free = (usable - reserved) * GIB - weights * BYTES[dtype] / gpus
    return max(0, int(free / kv_bytes_per_token(weights, tensor, setup)))


def kv_bytes_per_token(weights: float, tensor: int, setup: VllmSetup) -> float:
    """Bytes of one token's KV cache on each GPU. With more GPUs than KV heads, several GPUs have the same head."""
    shape = attention(weights)
    heads = max(1, shape.kv_heads / tensor)
    return 2 * shape.layers / setup.pipeline_parallel * heads * shape.head_dim * (1 if setup.fp8_kv_cache else 2)
