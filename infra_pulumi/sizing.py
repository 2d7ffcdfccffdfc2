"""Which machines hold a model, and what a million tokens cost there.

Memory is counted: weights, keys and values of every stream, and what CUDA and activations take. Throughput is
somebody's measurement where one is given, else derived from the GPU's memory bandwidth and arithmetic: a step of
decoding reads all weights and all keys and values once, and computes two operations a weight and stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from infra_pulumi.catalogue import Catalogue, InstanceType

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int8", "int4"]
GIB = 2**30

# A weight's bytes. Quantized ones have a scale for each block of 64, and embeddings stay in 16 bits: 4 % more.
BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.04, "int4": 0.58}

# Billions of weights, and KiB of keys and values a token in 16 bits: 2 x layers x heads of keys x their width x 2 bytes
# of the models' published configurations.
KV_KIB = (
    (1.3, 32.0, "Llama-3.2-1B: 16 layers, 8 heads of 64"),
    (3.3, 112.0, "Llama-3.2-3B: 28 layers, 8 heads of 128"),
    (8.1, 128.0, "Mistral-7B and Llama-3.1-8B: 32 layers, 8 heads of 128"),
    (14.8, 192.0, "Qwen2.5-14B: 48 layers, 8 heads of 128"),
    (32.8, 256.0, "Qwen2.5-32B: 64 layers, 8 heads of 128"),
    (72.8, 320.0, "Llama-3.1-70B: 80 layers, 8 heads of 128"),
    (405.9, 504.0, "Llama-3.1-405B: 126 layers, 8 heads of 128"),
)

# GB/s and dense 16-bit TFLOP/s of NVIDIA's data sheets. An A100 with 80 GiB is the PCIe one, the slower.
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

# Of the bandwidth and of the arithmetic. One stream of Llama-3.1-8B on an A100 reached 0.77 of the former
# (vLLM 0.23, johnmusgrave.com); many streams add attention, sampling and waiting.
EFFICIENCY = 0.6
USABLE = 0.9  # of a GPU's memory; the rest is the driver's and fragmentation
OVERHEAD_GIB = 1.5  # CUDA's context and activations


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` sequences at a time on one replica, each of `context` tokens, prompt and answer."""

    streams: int = 32
    context: int = 2048


@dataclass(frozen=True, slots=True)
class Fit:
    """One machine that holds the model. `gpus_per_replica` above 1 run one after the other, not side by side."""

    machine: InstanceType
    gpus_per_replica: int
    replicas: int
    needed_gib: float
    tokens_per_s: float
    throughput: Literal["measured", "derived"]
    usd_per_million_tokens: float
    spot_usd_per_million_tokens: float | None


def parameters(text: str) -> float:
    """Of `7b`, `0.5B` or `135m`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?)([bm])", text.strip().lower())
    if match is None or not 1e6 <= (count := float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]) <= 1e12:
        raise ValueError(f"{text!r} is no size of a model; write it like 7b, 0.5b or 135m")
    return count


def kv_bytes_per_token(weights: float) -> float:
    """Of a model of that size as they are made today, by the next larger one of the table."""
    kib = next((kib for billions, kib, _ in KV_KIB if weights <= billions * 1e9), KV_KIB[-1][1])
    return kib * 1024


def needed_bytes(weights: float, dtype: Dtype, load: Load) -> float:
    return weights * BYTES[dtype] + kv_bytes_per_token(weights) * load.streams * load.context


def ranked(
    catalogue: Catalogue, weights: float, dtype: Dtype, load: Load, measured: Mapping[str, float]
) -> tuple[Fit, ...]:
    """The machines that hold it, cheapest tokens first. `measured`: tokens a second of a whole machine, by its type."""
    fits = [
        fit
        for machine in catalogue.instance_types
        if machine.gpu and not machine.refused and (fit := _fit(machine, weights, dtype, load, measured))
    ]
    return tuple(sorted(fits, key=lambda fit: (fit.usd_per_million_tokens, fit.machine.name)))


def _fit(machine: InstanceType, weights: float, dtype: Dtype, load: Load, measured: Mapping[str, float]) -> Fit | None:
    if dtype == "bfloat16" and machine.compute_capability and float(machine.compute_capability) < 8:
        return None  # not in hardware before Ampere
    needed = needed_bytes(weights, dtype, load)
    gpus = _gpus_for(machine, needed)
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
        needed_gib=needed / GIB,
        tokens_per_s=rate,
        throughput="derived" if known is None else "measured",
        usd_per_million_tokens=machine.usd_per_hour * million,
        spot_usd_per_million_tokens=None if machine.spot_usd_per_hour is None else machine.spot_usd_per_hour * million,
    )


def _gpus_for(machine: InstanceType, needed: float) -> int | None:
    """How many of its GPUs one replica fills; None where all are too few."""
    free = ((machine.gpu_memory_gib or 0) * USABLE - OVERHEAD_GIB) * GIB
    gpus = -int(-needed // free) if free > 0 else machine.gpu_count + 1
    return gpus if gpus <= machine.gpu_count else None


def derivable(machine: InstanceType) -> bool:
    """Whether its GPU's data sheet is known here."""
    return (str(machine.gpu), float(machine.gpu_memory_gib or 0)) in GPUS


def derived_tokens_per_s(machine: InstanceType, weights: float, dtype: Dtype, load: Load) -> float:
    """Of one replica while all streams decode. Several GPUs hold one part of the layers each, and take turns."""
    gb_per_s, tflops = GPUS[(str(machine.gpu), float(machine.gpu_memory_gib or 0))]
    reading = needed_bytes(weights, dtype, Load(load.streams, load.context // 2)) / (gb_per_s * 1e9)
    computing = 2 * weights * load.streams / (tflops * 1e12)
    return load.streams * EFFICIENCY / max(reading, computing)
