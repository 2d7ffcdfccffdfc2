"""Facts for the sizing of models: bytes of weights and of the KV cache, and the speed of GPUs, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "fp8", "int8", "int4"]
GIB = 2**30

# Bytes per weight. Quantized weights need 4 % more: a scale per block of 64, and embeddings stay in 16 bits. fp8: the
# published checkpoint of Llama-3.1-8B has 9.1 GB. Larger models need less: 72.7 GB for 70.6 billion weights.
BYTES: dict[Dtype, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.13,
    "int8": 1.04,
    "int4": 0.58,
}


@dataclass(frozen=True, slots=True)
class Attention:
    """What decides the size of a KV cache."""

    layers: int
    kv_heads: int
    head_dim: int


# Billions of weights, and the attention of a model of at most that size, from the models' published configurations.
ATTENTION = (
    (1.3, Attention(16, 8, 64)),  # Llama-3.2-1B
    (3.3, Attention(28, 8, 128)),  # Llama-3.2-3B
    (8.1, Attention(32, 8, 128)),  # Mistral-7B and Llama-3.1-8B
    (14.8, Attention(48, 8, 128)),  # Qwen2.5-14B
    (32.8, Attention(64, 8, 128)),  # Qwen2.5-32B
    (72.8, Attention(80, 8, 128)),  # Llama-3.1-70B
    (405.9, Attention(126, 8, 128)),  # Llama-3.1-405B
)

# GB/s and dense 16-bit TFLOP/s from NVIDIA's data sheets. The A100 with 80 GiB is the slower PCIe variant.
GPUS: dict[tuple[str, float], tuple[float, float]] = {
    ("T4", 16): (320, 65),
    ("V100", 16): (900, 125),
    ("A10G", 24): (600, 70),
    ("L4", 24): (300, 121),
    ("L40S", 48): (864, 362),
    ("A100", 40): (1555, 312),
    ("A100", 80): (1935, 312),
    ("H100", 80): (3350, 989),
    ("H100 NVL", 94): (3938, 835),
}

# The achieved share of bandwidth and arithmetic. One stream of Llama-3.1-8B on an A100 reached 0.77 of the bandwidth
# (vLLM 0.23, johnmusgrave.com); many streams add attention, sampling and waiting.
EFFICIENCY = 0.6


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` concurrent sequences on one replica, each with `context` tokens of prompt and answer."""

    streams: int = 32
    context: int = 2048


def attention(weights: float) -> Attention:
    """The attention of a model with this number of weights, from the next larger model in ATTENTION."""
    return next((found for billions, found in ATTENTION if weights <= billions * 1e9), ATTENTION[-1][1])
