"""A simulated service: exact results of small cases, and what must hold in every case."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace

import numpy as np
import pytest

from perf.simulate.cache import BlockCache
from perf.simulate.replica import Replica, Request
from perf.simulate.runner import run_one
from perf.simulate.settings import PRODUCT, Fleet, Job, Losses, Profile, Traffic
from perf.simulate.traffic import generate
from tests.perf.service_simulation import BY_NAME, LOSSES, NO_LOSSES, SIMPLE, SMALL, one_replica, run, small, trace

# Small cases


def test_one_request_takes_its_prompt_and_its_answer() -> None:
    (request,) = one_replica(SIMPLE, trace([1.0], [200], [11])).requests
    assert request.began == pytest.approx(1.0)
    assert request.first == pytest.approx(1.0 + 200 / 100)
    assert request.ended == pytest.approx(3.0 + 10 / 10), "the first token comes with the prompt"


def test_prompts_wait_for_each_other_and_slow_down_those_that_decode() -> None:
    """The second prompt is computed in chunks of 49 tokens, since one row of each step decodes.

    A step takes 0.1 + 0.49 s, so that 98 tokens take two steps, in which the first request decodes 2 of its 10 tokens.
    """
    first, second = one_replica(SIMPLE, trace([0.0, 0.0], [200, 98], [11, 1])).requests
    assert first.first == pytest.approx(2.0)
    assert second.began == pytest.approx(2.0)
    assert second.first == second.ended == pytest.approx(2.0 + 2 * 0.59)
    assert first.ended == pytest.approx(2.0 + 2 * 0.59 + 8 * 0.1)


def test_a_request_waits_for_a_slot() -> None:
    requests = one_replica(SIMPLE, trace([0.0, 0.0, 0.0], [100, 100, 100], [101, 101, 1])).requests
    assert requests[2].began == pytest.approx(min(request.ended or math.inf for request in requests[:2]))


def test_all_sequences_share_the_speed_of_the_replica() -> None:
    """Four sequences of 101 tokens at 20 tokens per second together."""
    profile = replace(SIMPLE, prompt_rate=1e9, answer_rate=20, slots=4)
    requests = one_replica(profile, trace([0.0] * 4, [10] * 4, [101] * 4)).requests
    assert [request.ended for request in requests] == pytest.approx([100 / 5] * 4, rel=5e-3)


def test_the_queue_is_that_of_the_theory() -> None:
    """Poisson arrivals at one slot with a constant time of service (M/D/1): mean wait rho S / (2 (1 - rho))."""
    rng, service_s, rho = np.random.default_rng(5), 2.0, 0.7
    at = np.cumsum(rng.exponential(service_s / rho, 6_000))
    profile = replace(SIMPLE, slots=1, max_ongoing=1)
    job = Job(BY_NAME["round-robin"], profile, Traffic(), NO_LOSSES, Fleet(most=1, max_queued=10**6, timeout_s=1e9), 1)
    requests = trace(at.tolist(), [100] * len(at), [11] * len(at), float(at[-1]))
    waits = [(request.began or math.inf) - request.arrived for request in run(job, requests).requests]
    assert np.mean(waits) == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.15)
    # Lindley's recursion gives each wait exactly.
    expected, free = [], 0.0
    for arrived in at:
        expected.append(max(0.0, free - arrived))
        free = max(free, arrived) + service_s
    assert waits == pytest.approx(expected, abs=1e-5)


def test_a_known_prefix_is_not_computed_again() -> None:
    replica = Replica("a", replace(SIMPLE, block_tokens=10), 0.0)
    known = BlockCache(100)
    known.add([1, 2, 3])
    replica.cache = known
    request = Request(0, 0.0, 45, 1, array("Q", [1, 2, 9, 8]), array("Q", [1, 2, 9, 8]))
    replica.submit(request, 0.0)
    assert request.cached == 20
    assert replica.next_at() == pytest.approx(0.25)


def test_the_cache_frees_the_end_of_the_prompt_that_was_not_used_for_longest() -> None:
    cache = BlockCache(4)
    cache.add([1, 2, 3])
    cache.add([1, 7])
    assert (cache.matched([1, 2, 3]), len(cache)) == (3, 4)
    cache.add([8])
    assert (cache.matched([1, 2, 3]), cache.matched([1, 7])) == (2, 2)


def test_a_lost_replica_computed_what_it_had_time_for() -> None:
    replica = Replica("a", SIMPLE, 0.0)
    requests = [Request(number, 0.0, 100, 50, array("Q"), array("Q")) for number in range(2)]
    for request in requests:
        replica.submit(request, 0.0)
    replica.step(replica.next_at())
    replica.lose(1.0 + 0.59)
    assert replica.abandon() == [requests[1], requests[0]]
    assert [request.resumed for request in requests] == [2, 0], "the first token, and one of one step"
    replica.advance(100.0)
    assert requests[1].remaining == pytest.approx(100 - 49)


# What must hold in every case


@pytest.mark.parametrize("name", BY_NAME)
def test_every_request_ends_once_and_no_replica_exceeds_its_slots(name: str) -> None:
    outcome = small(BY_NAME[name])
    assert len(outcome.requests) == len(generate(SMALL, 3)) > 300
    for request in outcome.requests:
        assert request.ended is not None
        assert request.ended >= request.arrived
        assert request.error in ("", "lost", "refused")
        if not request.error:
            assert request.began is not None
            assert request.first is not None
            assert request.arrived <= request.began < request.first <= request.ended
            assert 0 <= request.cached < request.prompt
    assert 0 < outcome.most_running <= Profile().slots
    assert outcome.lost_replicas > 0


def test_only_strategies_that_resume_lose_no_request() -> None:
    sudden = Losses(per_hour=60, noticed=0)
    product = small(PRODUCT, sudden)
    assert product.resumed > 0
    assert not any(request.error for request in product.requests)
    assert any(request.error == "lost" for request in small(BY_NAME["ray-16"], sudden).requests)


def test_a_full_queue_refuses_requests() -> None:
    outcome = small(PRODUCT, NO_LOSSES, start_s=180, most=1, max_queued=5)
    assert any(request.error == "refused" for request in outcome.requests)
    assert outcome.most_running == Profile().slots


def test_replicas_are_paid_from_their_start_to_their_end() -> None:
    """One replica all the time, and no other."""
    assert one_replica(SIMPLE, trace([0.0], [10], [5], seconds=60.0)).replica_s == pytest.approx(60.0)


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    job = Job(PRODUCT, Profile(start_s=5), SMALL, LOSSES, Fleet(most=12), 3)
    times = {"routing_ms", "decision_ms", "cpu_s"}
    first, second = (run_one(job).model_dump(exclude=times) for _ in range(2))
    assert first == second
    assert run_one(replace(job, seed=4)).model_dump(exclude=times) != first
