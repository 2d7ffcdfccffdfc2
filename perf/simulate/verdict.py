"""Whether the product meets its bars in the simulations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from perf.formatting import format_number
from perf.simulate.cluster import Cluster
from perf.simulate.outcome import Outcome
from perf.simulate.results import Bar, Simulation
from perf.simulate.settings import PRODUCT, RAY, Fleet, Job, Losses, Profile, Traffic
from perf.simulate.traffic import Trace

ROUTING_MS = 1.0
SHARE_OF_QUEUE = 0.5
# Every second one request, so that the replica shows its speed, and then long prompts at the same moment.
_BEFORE_S, _LONG_PROMPTS, _LONG_TOKENS = 60, 64, 4000


def bars(simulations: Sequence[Simulation]) -> Iterator[Bar]:
    """The bars of the product that its simulations show."""
    products = [one for one in simulations if one.strategy == PRODUCT.name]
    for product in products:
        at = f"start {product.start_s:g} s"
        if product.routing_ms is not None:
            p99 = product.routing_ms.p99
            measured = f"p99 {format_number(p99)} ms with up to {product.most_ready:,} replicas"
            yield Bar(
                name=f"routing decision at most {ROUTING_MS:g} ms, {at}", measured=measured, met=p99 <= ROUTING_MS
            )
        for other in simulations:
            if other.strategy == RAY.name and other.start_s == product.start_s:
                yield _against(product, other, at)
        measured = f"{product.flaps} changes of direction within 5 minutes, {product.decisions} decisions"
        yield Bar(name=f"no flapping, {at}", measured=measured, met=product.flaps == 0)


def _against(product: Simulation, other: Simulation, at: str) -> Bar:
    measured = (
        f"{format_number(product.queue_s.p95)} s against {format_number(other.queue_s.p95)} s, "
        f"{format_number(product.replica_hours)} against {format_number(other.replica_hours)} replica-hours"
    )
    sooner = product.queue_s.p95 <= SHARE_OF_QUEUE * other.queue_s.p95
    name = f"queue time p95 at most half of Ray's default policy, at no more replica-hours, {at}"
    return Bar(name=name, measured=measured, met=sooner and product.replica_s <= other.replica_s)


def backlog_bar(profile: Profile, seed: int) -> Bar:
    """Replicas are added once for 64 long prompts that arrive together at one busy replica."""
    outcome = backlog(profile, seed)
    targets = [outcome.first_target, *(target for _, target in outcome.decisions)]
    ups = sum(after > before for before, after in pairwise(targets))
    measured = f"{ups} decision{'s' * (ups != 1)}: from {targets[0]} to {max(targets)} replicas"
    name = f"a backlog of {_LONG_PROMPTS} long prompts is one decision, start {profile.start_s:g} s"
    return Bar(name=name, measured=measured, met=ups == 1)


def backlog(profile: Profile, seed: int) -> Outcome:
    """Runs the product with the backlog of `backlog_bar`."""
    at = np.concatenate([np.arange(_BEFORE_S, dtype=float), np.full(_LONG_PROMPTS, float(_BEFORE_S))])
    count = len(at)
    zeros = np.zeros(count, dtype=np.int64)
    prompt = np.where(at < _BEFORE_S, 1000, _LONG_TOKENS)
    answer = np.full(count, 100)
    numbers = np.arange(count)
    trace = Trace(at, numbers, numbers, zeros, zeros, prompt, answer, zeros.astype(bool), _BEFORE_S + 240.0)
    job = Job(PRODUCT, profile, Traffic(), replace(Losses(), per_hour=0.0), Fleet(), seed)
    return Cluster(job, trace).run()
