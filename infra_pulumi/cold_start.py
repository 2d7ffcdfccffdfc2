"""Estimates the start of a replica on a new GPU node, and again on the same node, phase by phase, in seconds.

Source of the phases up to the weights: one measurement of awslabs' data-on-eks (ray-batch-inference, 10 July 2026) on a
g6e.2xlarge with Ray 2.56 and KubeRay 1.6.1. The image had 11.6 GB and came from a registry in the same region; the
weights had 15 GiB and came from S3. The phases that move bytes are scaled by size; the other phases are as measured. No
figures of GCP or Azure exist.

Source of vLLM's phases: its own logs for Llama-3-8B (vllm-project/vllm, pull request 11005; with compiled code in its
cache, pull request 17122). Larger models take longer: a model of 70 billion weights on eight GPUs took 70 s to compile
and 60 s for the CUDA graphs (issue 19824).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Engine: TypeAlias = Literal["native", "vllm", "vllm-eager"]

IMAGE_GB = 11.6
WEIGHTS_GIB = 15.0
IMAGE_MB_PER_S = 11_600 / 121
WEIGHTS_MIB_PER_S = 860.0
GPU_REGISTERED_S = 36.0
ENGINE_STARTS_S = 33.8
# vLLM's start took 39.3 s with compilation and CUDA graphs; this is what is left of it.
VLLM_STARTS_S = 5.0
COMPILE_S = 19.4
COMPILED_CODE_S = 6.4
GRAPHS_S = 15.0


@dataclass(frozen=True, slots=True)
class Phase:
    """`again` is the time on a node that has run the same model in the same worker pod before."""

    name: str
    seconds: float
    again: float = 0


def phases(
    image_gb: float = IMAGE_GB,
    weights_gib: float = WEIGHTS_GIB,
    engine: Engine = "native",
    prepull: bool = False,
) -> tuple[Phase, ...]:
    """The phases from a waiting request to a loaded model, in order.

    With `prepull` the node pulls the image while its GPU is being registered.
    """
    pull_s = image_gb * 1000 / IMAGE_MB_PER_S
    read_s = weights_gib * 1024 / WEIGHTS_MIB_PER_S
    early_s = min(pull_s, GPU_REGISTERED_S) if prepull else 0
    return (
        Phase("autoscaler requests a node", 13),
        Phase("machine starts and joins the cluster", 40),
        Phase("GPU is registered", GPU_REGISTERED_S),
        Phase(f"image of {image_gb:g} GB is pulled" + (", after the prepull" if prepull else ""), pull_s - early_s),
        Phase("worker joins the Ray head", 53),
        Phase("replica starts", 52, 52),
        Phase(f"{weights_gib:g} GiB of weights are read", read_s, read_s),
        *_engine_phases(engine),
    )


def _engine_phases(engine: Engine) -> tuple[Phase, ...]:
    if engine == "native":
        return (Phase("engine starts", ENGINE_STARTS_S, ENGINE_STARTS_S),)
    starts = Phase("vLLM measures its memory", VLLM_STARTS_S, VLLM_STARTS_S)
    if engine == "vllm-eager":
        return (starts,)
    return (
        starts,
        Phase("torch.compile, or its cache is read", COMPILE_S, COMPILED_CODE_S),
        Phase("CUDA graphs are captured", GRAPHS_S, GRAPHS_S),
    )


def total(phases: tuple[Phase, ...]) -> float:
    """Seconds of all phases together, on a new node."""
    return sum(phase.seconds for phase in phases)


def total_again(phases: tuple[Phase, ...]) -> float:
    """Seconds of all phases together, on a node that has run the model before."""
    return sum(phase.again for phase in phases)


def source(provider: str) -> str:
    """Where the figures come from, as one line."""
    limit = "" if provider == "aws" else f"; no measurement of {provider} is available"
    return f"measured on AWS by data-on-eks on 2026-07-10, scaled by size{limit}; vLLM's phases are from its logs"
