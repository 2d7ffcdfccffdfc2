"""The traffic of a simulation, and the policies with which the product is compared."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perf.simulate.scalers import Delay, Oracle, RayByRequests, View, computed_once
from perf.simulate.settings import Traffic
from perf.simulate.traffic import generate
from serve_app.core.scaling import Demand
from tests.perf.service_simulation import SMALL, trace

# Traffic


def test_conversations_grow_and_families_are_shared() -> None:
    requests = generate(replace(SMALL, users=400_000), 1)
    assert np.all(np.diff(requests.at) >= 0)
    assert 0 <= requests.at[0] <= requests.at[-1] < SMALL.seconds
    order = np.lexsort((requests.at, requests.session))
    same = np.diff(requests.session[order]) == 0
    assert same.sum() > 500
    assert np.all(np.diff(requests.prompt[order])[same] > 0)
    assert np.all(np.diff(requests.family[order])[same] == 0)
    first, second = order[:-1][same][0], order[1:][same][0]
    tokens = int(requests.prompt[first] + requests.answer[first])
    before, after = (requests.digests(int(number), tokens, 64) for number in (first, second))
    assert before == after, "the prompt of the second request begins with the first one and its answer"
    sizes = np.sort(np.bincount(requests.family))[::-1]
    assert sizes[0] > 5 * sizes[20] > 0, "Zipf"


def test_the_rate_follows_the_day_and_the_users() -> None:
    day = Traffic(users=20_000, seconds=86_400, from_hour=0, bursts=(), think_s=5)
    hours = np.bincount((generate(day, 1).at // 3600).astype(int), minlength=24)
    assert hours.sum() == pytest.approx(20_000 * day.sessions_per_day * day.turns, rel=0.03)
    assert hours[15] / hours[3] == pytest.approx(1.6 / 0.4, rel=0.15)


# The policies that the product is compared with


def test_rays_policy_decides_as_ray_does() -> None:
    """Random numbers of requests for an hour, with Ray's own functions beside ours."""
    policy = pytest.importorskip("ray.serve.autoscaling_policy")
    ray_config = pytest.importorskip("ray.serve.config")
    rng = random.Random(1)
    config = ray_config.AutoscalingConfig(
        max_replicas=100, target_ongoing_requests=4, upscale_delay_s=30, downscale_delay_s=60
    )
    ours, theirs, delay = 3, 3, Delay(30, 60)
    state: dict[str, Any] = {}
    scaler, requests = RayByRequests(4), 10
    clock: dict[str, float] = {}
    original = policy._apply_delay_logic
    policy._apply_delay_logic = lambda *args: original(*args, _now=clock["now"])
    decide = policy._apply_autoscaling_config(policy.replica_queue_length_autoscaling_policy)
    try:
        changes = 0
        for tick in range(7200):
            now = clock["now"] = tick * 0.5
            if rng.random() < 0.02:
                requests = rng.choice([3, 20, 60, 200])
            view = View(ours, ours, 100, requests, Demand, [])
            wanted = scaler.wanted(view, now)
            total = scaler.mean(now)
            context = ray_config.AutoscalingContext(
                None, "d", "a", theirs, theirs, [], total, 0.0, {}, {}, 1, 100, state, None, None, now, config
            )
            decided, state = decide(context)
            theirs = min(100, max(1, math.ceil(decided)))
            before, ours = ours, min(100, max(1, delay.apply(wanted, ours, now)))
            changes += before != ours
            assert ours == theirs, now
    finally:
        policy._apply_delay_logic = original
    assert changes > 20


def test_rays_metric_is_as_old_as_its_reports() -> None:
    """The mean of the last 30 s, recorded every 6 s and sent every 10 s."""
    scaler = RayByRequests(1)

    def wanted(now: float, requests: int) -> int:
        return scaler.wanted(View(1, 1, 1000, requests, Demand, []), now)

    assert [wanted(now * 0.5, 10) for now in range(120)] == [10] * 120
    assert [wanted(60.0, 10), wanted(60.5, 10)] == [10, 10]
    assert {wanted(61 + now * 0.5, 100) for now in range(18)} == {10}
    assert wanted(70.0, 100) > 10
    assert [wanted(70.5 + now * 0.5, 100) for now in range(100)][-1] == 100


def test_the_oracle_has_replicas_when_the_work_comes() -> None:
    oracle = Oracle(np.array([0.8] * 100 + [8.0] * 100 + [0.8] * 100), start_s=20)

    def at(now: float) -> int:
        return oracle.wanted(View(1, 1, 100, 0, Demand, []), now)

    assert (at(0), at(81), at(150), at(250)) == (1, 10, 10, 1)


def test_the_oracle_counts_each_block_once() -> None:
    assert computed_once(trace([0.0, 1.0], [640, 640], [64, 64]), 64) == [640, 640]
    twice = trace([0.0, 1.0], [640, 768], [64, 64])
    twice.session[:] = 0
    assert computed_once(twice, 64) == [640, 768 - 704]
