"""Assigns the units of an experiment to variants. Pure functions: every ingress finds the same variant."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from itertools import pairwise

from serve_app.core.experiments import CLUSTERS, Caller
from serve_app.experiment_config import Experiment

# Hashes with different persons are independent of each other.
_SPLIT, _CLUSTER, _SHADOW, _COUNTED = b"split", b"cluster", b"shadow", b"counted"


@dataclass(frozen=True, slots=True)
class Region:
    """The places from `low` up to `high`, of 0 to 100, that belong to a variant."""

    low: float
    high: float
    variant: str


def unit_of(experiment: Experiment, caller: Caller) -> str:
    """The user, key, session or request that an experiment assigns; "" if the call does not say."""
    return str(getattr(caller, experiment.unit))


def place(name: str, unit: str, person: bytes = _SPLIT) -> float:
    """The place of a unit, uniform from 0 up to 100. The salt is the experiment's name.

    So that two experiments assign a user independently of each other.
    """
    text = f"{name}\0{unit}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8, person=person).digest()) / 2**64 * 100


def cluster_of(name: str, unit: str) -> int:
    """The cluster of a unit in the statistics, independent of its place."""
    return int(place(name, unit, _CLUSTER) / 100 * CLUSTERS)


def is_shadowed(experiment: Experiment, request: str) -> bool:
    """Whether a request is among the share that is mirrored to the shadow variant."""
    shadow = experiment.shadow
    return shadow is not None and place(experiment.name, request, _SHADOW) < shadow.percent


def exposure(experiment: Experiment, now: datetime) -> float:
    """The part of their share that the variants get now, from 0 to 1. Without a ramp it is 1, before its begin 0."""
    if not experiment.ramp:
        return 1.0
    begun = [step.percent for step in experiment.ramp if step.at <= now]
    return begun[-1] / 100 if begun else 0.0


def regions(experiment: Experiment, share: float) -> list[Region]:
    """The places of the variants other than the control, if they get `share` (0 to 1) of their percent.

    The places for a smaller share are among those for a larger one, so that a ramp only moves units from the control
    to a variant. The first variant grows from 0 upwards and the second one from 100 downwards: with up to two variants
    this holds for changes of their percent too. Further variants follow the first one.
    """
    found, low = list[Region](), 0.0
    for number, variant in enumerate(experiment.variants[1:]):
        if number == 1:
            found.append(Region(100 - variant.percent * share, 100.0, variant.name))
            continue
        found.append(Region(low, low + variant.percent * share, variant.name))
        low += variant.percent
    return found


def variant_at(experiment: Experiment, share: float, at: float) -> str:
    """The name of the variant that has this place."""
    for region in regions(experiment, share):
        if region.low <= at < region.high:
            return region.variant
    return experiment.control.name


def is_counted(experiment: Experiment, share: float, unit: str) -> bool:
    """Whether the statistics count the requests of a unit while the variants get `share` of their percent.

    Of the control they count the same share of the units, and none that a ramp will give to a variant later. So the
    counted requests are divided over the variants in the same way at all times: otherwise a change of the traffic
    during a ramp would look like a difference between variants. A unit is counted for one variant only.
    """
    at = place(experiment.name, unit)
    if variant_at(experiment, 1.0, at) == experiment.control.name:
        return place(experiment.name, unit, _COUNTED) < 100 * share
    return variant_at(experiment, share, at) != experiment.control.name


def flips(old: Experiment, new: Experiment) -> list[tuple[str, str]]:
    """The pairs of variants other than the control between which a change of the configuration moves units."""
    edges = {edge for one in (old, new) for region in regions(one, 1.0) for edge in (region.low, region.high)}
    bounds = sorted(edges)
    middles = [(low + high) / 2 for low, high in pairwise(bounds) if high > low]
    controls = {old.control.name, new.control.name}
    moves = [(variant_at(old, 1.0, at), variant_at(new, 1.0, at)) for at in middles]
    return sorted({move for move in moves if move[0] != move[1] and not controls & set(move)})
