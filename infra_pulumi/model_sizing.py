"""Ranks the machines that hold a model by the cost of a million tokens.

Memory of the native engine is the sum of weights, the KV cache of all streams, CUDA's context and activations; the
file vllm_sizing.py has vLLM's. Throughput is a measurement if one is given; otherwise it is derived from the GPU's
memory bandwidth and arithmetic: a decoding step reads all weights and the KV cache once, and computes two operations
per weight and stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from infra_pulumi import vllm_sizing
from infra_pulumi.catalogue import Catalogue, InstanceType
from infra_pulumi.sizing_facts import BYTES, EFFICIENCY, GIB, GPUS, Dtype, Load, attention
from infra_pulumi.vllm_sizing import VllmSetup

USABLE = 0.9  # usable share of a GPU's memory; the driver and fragmentation take the rest
OVERHEAD_GIB = 1.5  # CUDA's context and activations


@dataclass(frozen=True, slots=True)
class Fit:
    """A machine that holds the model. `kv_tokens` and `sequences` are vLLM's, whose GPUs compute in parallel.

    With the native engine, several GPUs of one replica compute one after the other.
    """

    machine: InstanceType
    gpus_per_replica: int
    replicas: int
    required_gib: float
    tokens_per_s: float
    throughput: Literal["measured", "derived"]
    usd_per_million_tokens: float
    spot_usd_per_million_tokens: float | None
    kv_tokens: int | None = None
    sequences: int | None = None


@dataclass(frozen=True, slots=True)
class _Replica:
    """The GPUs of one replica, the load that it computes at the same time, and how many GPUs compute in parallel."""

    gpus: int
    load: Load
    parallel: int = 1
    kv_tokens: int | None = None


def parameters(text: str) -> float:
    """The number of weights of a size such as `7b`, `0.5B` or `135m`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?)([bm])", text.strip().lower())
    if match is None or not 1e6 <= (count := float(match[1]) * {"b": 1e9, "m": 1e6}[match[2]]) <= 1e12:
        raise ValueError(f"invalid model size {text!r}; write it like 7b, 0.5b or 135m")
    return count


def kv_bytes_per_token(weights: float) -> float:
    """Bytes of KV cache per token, in 16 bits."""
    shape = attention(weights)
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * 2


def required_bytes(weights: float, dtype: Dtype, load: Load) -> float:
    """Bytes of weights and KV cache of one replica under `load`."""
    return weights * BYTES[dtype] + kv_bytes_per_token(weights) * load.streams * load.context


def ranked(
    catalogue: Catalogue,
    weights: float,
    dtype: Dtype,
    load: Load,
    measured: Mapping[str, float],
    vllm: VllmSetup | None = None,
) -> tuple[Fit, ...]:
    """Machines that hold the model, cheapest tokens first. `measured` has tokens per second of a machine by type.

    The engine is the native one, or vLLM with a setup.
    """
    fits = [
        fit
        for machine in catalogue.instance_types
        if machine.gpu
        and not machine.refused
        and _supports(machine, dtype)
        and (replica := _replica(machine, weights, dtype, load, vllm))
        and (fit := _fit(machine, weights, dtype, replica, measured))
    ]
    return tuple(sorted(fits, key=lambda fit: (fit.usd_per_million_tokens, fit.machine.name)))


def _supports(machine: InstanceType, dtype: Dtype) -> bool:
    """GPUs before Ampere have no bfloat16 units, and vLLM's kernels for fp8 need Ampere."""
    return dtype not in ("bfloat16", "fp8") or float(machine.compute_capability or 0) >= 8


def _replica(
    machine: InstanceType, weights: float, dtype: Dtype, load: Load, vllm: VllmSetup | None
) -> _Replica | None:
    if vllm is None:
        gpus = _gpus_for(machine, required_bytes(weights, dtype, load))
        return None if gpus is None else _Replica(gpus, load)
    found = vllm_sizing.fit(machine, weights, dtype, load, vllm)
    if found is None:
        return None
    return _Replica(found.gpus, Load(found.sequences(load), load.context), found.gpus, found.kv_tokens)


def _fit(
    machine: InstanceType, weights: float, dtype: Dtype, replica: _Replica, measured: Mapping[str, float]
) -> Fit | None:
    known = measured.get(machine.type)
    if known is None and not derivable(machine):
        return None
    replicas = machine.gpu_count // replica.gpus
    derived = replicas * replica.parallel
    rate = known if known is not None else derived * derived_tokens_per_s(machine, weights, dtype, replica.load)
    million = 1e6 / 3600 / rate
    return Fit(
        machine=machine,
        gpus_per_replica=replica.gpus,
        replicas=replicas,
        required_gib=required_bytes(weights, dtype, replica.load) / GIB,
        tokens_per_s=rate,
        throughput="derived" if known is None else "measured",
        usd_per_million_tokens=machine.usd_per_hour * million,
        spot_usd_per_million_tokens=None if machine.spot_usd_per_hour is None else machine.spot_usd_per_hour * million,
        kv_tokens=replica.kv_tokens,
        sequences=None if replica.kv_tokens is None else replica.load.streams,
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
    """Tokens per second of one replica with all streams decoding, if its GPUs split the layers and take turns."""
    gb_per_s, tflops = GPUS[(str(machine.gpu), float(machine.gpu_memory_gib or 0))]
    reading = required_bytes(weights, dtype, Load(load.streams, load.context // 2)) / (gb_per_s * 1e9)
    computing = 2 * weights * load.streams / (tflops * 1e12)
    return load.streams * EFFICIENCY / max(reading, computing)
