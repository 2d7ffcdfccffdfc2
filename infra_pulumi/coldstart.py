"""How long a request waits when no GPU node is there, by phase.

The figures are one measurement: awslabs' data-on-eks, ray-batch-inference, 10 July 2026, on a g6e.2xlarge with Ray 2.56
and KubeRay 1.6.1. Its image had 11.6 GB and came from a registry in the region, its weights 15 GiB from S3. Phases that
move bytes are scaled by them; the others are as measured. Nobody's figures of GCP or Azure are at hand.
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
    """From a request that waits to a model that answers, in their order."""
    return (
        Phase("the autoscaler notices", 13),
        Phase("the machine starts and joins", 40),
        Phase("its GPU is registered", 36),
        Phase(f"the image of {image_gb:g} GB is pulled", image_gb * 1000 / IMAGE_MB_PER_S),
        Phase("the worker waits for the head", 53),
        Phase("the replica starts", 52),
        Phase(f"{weights_gib:g} GiB of weights are read", weights_gib * 1024 / WEIGHTS_MIB_PER_S),
        Phase("the engine starts", 33.8),
    )


def total(each: tuple[Phase, ...]) -> float:
    return sum(phase.seconds for phase in each)


def caveat(provider: str) -> str:
    """Whose figures these are."""
    where = "" if provider == "aws" else f"; none of {provider} are at hand"
    return f"measured on AWS by data-on-eks on 2026-07-10, scaled by bytes{where}"
