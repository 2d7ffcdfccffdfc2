"""Estimates the cold start of a GPU worker, phase by phase, in seconds.

Source: one measurement of awslabs' data-on-eks (ray-batch-inference, 10 July 2026) on a g6e.2xlarge with Ray 2.56 and
KubeRay 1.6.1. The image had 11.6 GB and came from a registry in the same region; the weights had 15 GiB and came from
S3. The phases that move bytes are scaled by size; the other phases are as measured. No figures of GCP or Azure exist.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_GB = 11.6
WEIGHTS_GIB = 15.0
IMAGE_MB_PER_S = 11_600 / 121
WEIGHTS_MIB_PER_S = 860.0


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float


def phases(image_gb: float = IMAGE_GB, weights_gib: float = WEIGHTS_GIB) -> tuple[Phase, ...]:
    """The phases from a waiting request to a loaded model, in order."""
    return (
        Phase("autoscaler requests a node", 13),
        Phase("machine starts and joins the cluster", 40),
        Phase("GPU is registered", 36),
        Phase(f"image of {image_gb:g} GB is pulled", image_gb * 1000 / IMAGE_MB_PER_S),
        Phase("worker joins the Ray head", 53),
        Phase("replica starts", 52),
        Phase(f"{weights_gib:g} GiB of weights are read", weights_gib * 1024 / WEIGHTS_MIB_PER_S),
        Phase("engine starts", 33.8),
    )


def total(phases: tuple[Phase, ...]) -> float:
    """Seconds of all phases together."""
    return sum(phase.seconds for phase in phases)


def source(provider: str) -> str:
    """Where the figures come from, as one line."""
    limit = "" if provider == "aws" else f"; no measurement of {provider} is available"
    return f"measured on AWS by data-on-eks on 2026-07-10, scaled by size{limit}"
