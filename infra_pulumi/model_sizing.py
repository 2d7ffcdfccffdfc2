"""Ranks the machines that hold a model by the cost of a million tokens.

Memory is the sum of weights, the KV cache of all streams, CUDA's context and activations. Throughput is a measurement
if one is given; otherwise it is derived from the GPU's memory bandwidth and arithmetic: a decoding step reads all
weights and the KV cache once, and computes two operations per weight and stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from infra_pulumi.catalogue import Catalogue, InstanceType

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int8", "int4"]
GIB = 2**30

# Bytes per weight. Quantized weights need 4 % more: a scale per block of 64, and embeddings stay in 16 bits.
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.04, "int4": 0.58}

# Billions of weights, and KiB of KV cache per token in 16 bits: 2 x layers x KV heads x head width x 2 bytes, from the
# models' published configurations.
KV_KIB = (
    (1.3, 32.0, "Llama-3.2-1B: 16 layers, 8 heads of 64"),
    (3.3, 112.0, "Llama-3.2-3B: 28 layers, 8 heads of 128"),
    (8.1, 128.0, "Mistral-7B and Llama-3.1-8B: 32 layers, 8 heads of 128"),
    (14.8, 192.0, "Qwen2.5-14B: 48 layers, 8 heads of 128"),
    (32.8, 256.0, "Qwen2.5-32B: 64 layers, 8 heads of 128"),
    (72.8, 320.0, "Llama-3.1-70B: 80 layers, 8 heads of 128"),
    (405.9, 504.0, "Llama-3.1-405B: 126 layers, 8 heads of 128"),
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
USABLE = 0.9  # usable share of a GPU's memory; the driver and fragmentation take the rest
OVERHEAD_GIB = 1.5  # CUDA's context and activations


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` concurrent sequences on one replica, each with `context` tokens of prompt and answer."""

    streams: int = 32
    context: int = 2048


@dataclass(frozen=True, slots=True)
class Fit:
    """A machine that holds the model. Several GPUs of one replica compute one after the other, not in parallel."""

    machine: InstanceType
    gpus_per_replica: int
    replicas: int
    required_gib: float
    tokens_per_s: float
    throughput: Literal["measured", "derived"]
    usd_per_million_tokens: float
    spot_usd_per_million_tokens: float | None


def parameters(text: str) -> float:
    """The number of weights of a size such as `7b`, `0.5B` or `135m`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?)([bm])", text.strip().lower())
    if match is None or not 1e6 <= (count := float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]) <= 1e12:
        raise ValueError(f"invalid model size {text!r}; write it like 7b, 0.5b or 135m")
    return count


def kv_bytes_per_token(weights: float) -> float:
    """Bytes of KV cache per token, from the next larger model in KV_KIB."""
    kib = next((kib for billions, kib, _ in KV_KIB if weights <= billions * 1e9), KV_KIB[-1][1])
    return kib * 1024


def required_bytes(weights: float, dtype: Dtype, load: Load) -> float:
    """Bytes of weights and KV cache of one replica under `load`."""
    return weights * BYTES[dtype] + kv_bytes_per_token(weights) * load.streams * load.context


def ranked(
    catalogue: Catalogue, weights: float, dtype: Dtype, load: Load, measured: Mapping[str, float]
) -> tuple[Fit, ...]:
    """Machines that hold the model, cheapest tokens first. `measured` has tokens per second of a machine by type."""
    fits = [
        fit
        for machine in catalogue.instance_types
        if machine.gpu and not machine.refused and (fit := _fit(machine, weights, dtype, load, measured))
    ]
    return tuple(sorted(fits, key=lambda fit: (fit.usd_per_million_tokens, fit.machine.name)))


def _fit(machine: InstanceType, weights: float, dtype: Dtype, load: Load, measured: Mapping[str, float]) -> Fit | None:
    if dtype == "bfloat16" and machine.compute_capability and float(machine.compute_capability) < 8:
        return None  # GPUs before Ampere have no bfloat16 units
    required = required_bytes(weights, dtype, load)
    gpus = _gpus_for(machine, required)
    if gpus is None:
        return None
    replicas = machine.gpu_count // gpus
    known = measured.get(machine.type)
    if known is None and not derivable(machine):
        return None
    rate = known if known is not None else replicas * derived_tokens_per_s(machine, weights, dtype, load)
    million = 1e6 / 3600 / rate
    return Fit(
        machine=machine,
        gpus_per_replica=gpus,
        replicas=replicas,
        required_gib=required / GIB,
        tokens_per_s=rate,
        throughput="derived" if known is None else "measured",
        usd_per_million_tokens=machine.usd_per_hour * million,
        spot_usd_per_million_tokens=None if machine.spot_usd_per_hour is None else machine.spot_usd_per_hour * million,
    )


def _gpus_for(machine: InstanceType, required: float) -> int | None:
    """Number of GPUs that one replica needs, or None if the machine has too few."""
    free = ((machine.gpu_memory_gib or 0) * USABLE - OVERHEAD_GIB) * GIB
    gpus = -int(-required // free) if free > 0 else machine.gpu_count + 1
    return gpus if gpus <= machine.gpu_count else None


def derivable(machine: InstanceType) -> bool:
    """Whether GPUS has the data sheet of the machine's GPU."""
    return (str(machine.gpu), float(machine.gpu_memory_gib or 0)) in GPUS


def derived_tokens_per_s(machine: InstanceType, weights: float, dtype: Dtype, load: Load) -> float:
    """Tokens per second of one replica with all streams decoding. Several GPUs split the layers and take turns."""
    gb_per_s, tflops = GPUS[(str(machine.gpu), float(machine.gpu_memory_gib or 0))]
    reading = required_bytes(weights, dtype, Load(load.streams, load.context // 2)) / (gb_per_s * 1e9)
    computing = 2 * weights * load.streams / (tflops * 1e12)
    return load.streams * EFFICIENCY / max(reading, computing)
