"""Weighted fair queueing between tenants: proportional shares, no starvation, and no place left free without reason."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.gateway.fair_queue import AGEING_PER_S, IDLE_S, FairQueue
from serve_app.gateway.fair_share import Ticket

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 4.0}
# An arrival is a tenant, a priority, and the expected and the true cost.
arrivals = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(-3, 3), st.integers(1, 50), st.integers(1, 50)),
    min_size=1,
    max_size=60,
)


def queue_of(weights: dict[str, float] | None = None) -> FairQueue[str]:
    return FairQueue((weights or WEIGHTS).__getitem__)


def started(queue: FairQueue[str], places: int, now: float = 0.0) -> list[Ticket[str]]:
    found = []
    while ticket := queue.start(places, places, now):
        found.append(ticket)
    return found


@given(arrivals, st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_request_runs_once_and_no_place_is_free_while_one_waits(
    requests: list[tuple[str, int, int, int]], places: int, draw: random.Random
) -> None:
    """With fewer than 8 slots none is kept."""
    queue, running, begun, now = queue_of(), list[tuple[Ticket[str], int]](), Counter[str](), 0.0
    costs = {str(number): cost for number, (*_, cost) in enumerate(requests)}
    waiting = [(str(number), *rest) for number, rest in enumerate(requests)]
    while waiting or running:
        now += draw.random()
        if waiting and draw.random() < 0.6:
            item, tenant, priority, expected, _ = waiting.pop()
            queue.add(item, tenant, priority, expected, now)
        elif running:
            ticket, cost = running.pop(draw.randrange(len(running)))
            queue.end(ticket, cost, now)
        for ticket in started(queue, places, now):
            begun[ticket.item] += 1
            running.append((ticket, costs[ticket.item]))
        assert queue.running == len(running) <= places
        assert not len(queue) or queue.running == places
    assert begun == Counter(costs.keys())
    assert (len(queue), queue.cost) == (0, 0.0)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.booleans())
def test_tenants_with_a_backlog_get_tokens_by_their_weights(seed: int, places: int, known: bool) -> None:
    """Whatever the costs, also if they are known only at the end, shares differ by at most the requests in progress.

    The bound is that of start-time fair queueing for a server with `places`: (places + 1) requests of a tenant.
    """
    draw, queue = random.Random(seed), queue_of()
    served, running = Counter[str](), list[tuple[Ticket[str], int]]()
    sizes = {"a": 40, "b": 10, "c": 100}

    def send(tenant: str) -> None:
        cost = draw.randint(1, sizes[tenant])
        queue.add(str(cost), tenant, 0, cost if known else 30, 0.0)

    for tenant in "abc" * (places + 2):
        send(tenant)
    for _ in range(400):
        for ticket in started(queue, places):
            running.append((ticket, int(ticket.item)))
            send(ticket.tenant)
        ticket, cost = running.pop(draw.randrange(len(running)))
        queue.end(ticket, cost, 0.0)
        served[ticket.tenant] += cost
    shares = [served[tenant] / weight for tenant, weight in WEIGHTS.items()]
    assert max(shares) - min(shares) <= (places + 1) * (max(sizes.values()) + 30)


def test_weights_of_1_2_and_4_give_tokens_in_this_proportion() -> None:
    draw, queue, served, running = random.Random(3), queue_of(), Counter[str](), list[Ticket[str]]()
    for tenant in "abc" * 40:
        queue.add(tenant, tenant, 0, 100, 0.0)
    for _ in range(20_000):
        for ticket in started(queue, 32):
            running.append(ticket)
            queue.add(ticket.tenant, ticket.tenant, 0, 100, 0.0)
        ticket, cost = running.pop(draw.randrange(len(running))), draw.randint(20, 180)
        queue.end(ticket, cost, 0.0)
        served[ticket.tenant] += cost
    assert served["b"] / served["a"] == pytest.approx(2, rel=0.02)
    assert served["c"] / served["a"] == pytest.approx(4, rel=0.02)


def test_tokens_are_charged_while_a_request_runs() -> None:
    queue = queue_of({"a": 1.0, "b": 1.0})
    for name in ("a1", "a2", "b1", "b2", "b3"):
        queue.add(name, name[0], 0, 10, 0.0)
    first = queue.start(1, 1, 0.0)
    assert first is not None
    queue.charge(first, 35)
    queue.charge(first, 20)  # less than before: it has no effect before the end
    order = [ticket.item for ticket in started(queue, 5)]
    assert order == ["b1", "b2", "b3", "a2"]
    queue = queue_of({"a": 1.0, "b": 1.0})
    for name in ("a1", "a2", "b1"):
        queue.add(name, name[0], 0, 10, 0.0)
    first = queue.start(1, 1, 0.0)
    assert first is not None
    queue.end(first, 0, 0.0)  # it has failed, so that it is not charged
    assert [ticket.item for ticket in started(queue, 2)] == ["a2", "b1"]


def test_an_idle_tenant_gains_no_credit() -> None:
    queue = queue_of({"a": 1.0, "b": 1.0})
    for _ in range(100):
        queue.add("a", "a", 0, 10, 0.0)
        queue.end(started(queue, 1)[0], 10, 0.0)
    for name in ("a", "b") * 6:
        queue.add(name, name, 0, 10, 1.0)
    assert Counter(ticket.item for ticket in started(queue, 6)) == {"a": 3, "b": 3}


def test_a_tenant_that_used_idle_slots_owes_nothing_for_them() -> None:
    queue = queue_of({"a": 1.0, "b": 1.0})
    queue.add("long", "b", 0, 10, 0.0)
    started(queue, 4)
    for _ in range(100):
        queue.add("a", "a", 0, 10, 0.0)
        queue.end(started(queue, 4)[0], 10, 0.0)
    for name in ("b", "a") * 6:
        queue.add(name, name, 0, 10, 1.0)
    assert Counter(ticket.item for ticket in started(queue, 7)) == {"a": 3, "b": 3}


def test_priority_decides_within_a_tenant_only_and_ages() -> None:
    step_s = 1 / AGEING_PER_S
    queue = queue_of({"a": 1.0, "b": 1.0})
    queue.add("patient", "a", 5, 10, 0.0)
    queue.add("soon", "a", 0, 10, 5 * step_s - 1)
    queue.add("late", "a", 0, 10, 5 * step_s + 1)
    queue.add("other", "b", 100, 10, 5 * step_s + 2)
    assert [ticket.item for ticket in started(queue, 4)] == ["soon", "other", "patient", "late"]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=50))
def test_nothing_starves_behind_a_stream_of_urgent_requests(priorities: list[int]) -> None:
    """A request of priority 5 waits at most (5 - p) / AGEING_PER_S seconds longer than newer ones of priority p."""
    queue, now = queue_of({"": 1.0}), 0.0
    queue.add("waits", "", 5, 1, now)
    while True:
        now += 1.0
        queue.add("urgent", "", priorities[int(now) % len(priorities)], 1, now)
        ticket = queue.start(1, 1, now)
        assert ticket is not None
        queue.end(ticket, 1, now)
        if ticket.item == "waits":
            break
        assert now <= 10 / AGEING_PER_S + 1


def test_a_slot_is_kept_for_a_tenant_that_pauses() -> None:
    queue = queue_of({"light": 1.0, "flood": 1.0})
    queue.add("light", "light", 0, 10, 0.0)
    queue.end(started(queue, 16)[0], 10, 0.0)
    for _ in range(40):
        queue.add("flood", "flood", 0, 10, 1.0)
    assert len(started(queue, 16, 1.0)) == 15
    queue.add("light", "light", 0, 10, 2.0)
    assert [ticket.item for ticket in started(queue, 16, 2.0)] == ["light"]
    assert queue.start(16, 18, 2.0) is None, "light uses its slot, and no place is taken ahead of its next request"
    queue.add("light", "light", 0, 10, 3.0)
    more = list(iter(lambda: queue.start(16, 18, 3.0), None))
    assert {ticket.item for ticket in more} == {"light", "flood"}, "light has a backlog itself"


def test_a_tenant_that_has_gone_keeps_no_slot() -> None:
    queue = queue_of({"light": 1.0, "flood": 1.0})
    queue.add("light", "light", 0, 10, 0.0)
    queue.end(started(queue, 16)[0], 10, 0.0)
    for _ in range(40):
        queue.add("flood", "flood", 0, 10, IDLE_S)
    assert len(started(queue, 16, IDLE_S)) == 15
    assert len(list(iter(lambda: queue.start(16, 18, IDLE_S + 0.1), None))) == 3


def test_with_one_tenant_no_slot_is_kept() -> None:
    queue = queue_of({"": 1.0})
    for _ in range(40):
        queue.add("", "", 0, 10, 0.0)
    assert len(list(iter(lambda: queue.start(16, 18, 0.0), None))) == 18


def test_memory_is_that_of_the_tenants_of_the_last_half_minute() -> None:
    queue: FairQueue[int] = FairQueue(lambda _: 1.0)
    for number in range(10_000):
        now = number / 100
        queue.add(number, str(number), 0, 10, now)
        ticket = queue.start(1, 1, now)
        assert ticket is not None
        queue.end(ticket, 10, now)
        assert queue.tenants() <= IDLE_S * 100 + 2
    queue.remove(queue.add(1, "last", 0, 10, 1000.0), 1000.0)
    assert queue.tenants() == 1


@given(arrivals)
def test_a_full_queue_drops_from_the_longest_line(requests: list[tuple[str, int, int, int]]) -> None:
    queue, most = queue_of(), 12
    for tenant, priority, cost, _ in requests:
        if len(queue) >= most:
            dropped = queue.to_drop(tenant)
            if dropped is None:
                continue
            assert dropped.tenant != tenant
            queue.remove(dropped, 0.0)
        queue.add(tenant, tenant, priority, cost, 0.0)
        assert len(queue) <= most
    if len(queue) == most:
        weight = sum(WEIGHTS.values())
        for tenant in WEIGHTS:
            if queue.to_drop(tenant) is None:  # it has the longest line: no less than its share, without rounding
                line = sum(ticket.tenant == tenant for ticket in started(queue, 100))
                assert line >= most * WEIGHTS[tenant] / weight - 1
                break


def test_the_work_ahead_is_one_s_own_line_and_the_share_of_the_others() -> None:
    queue = queue_of({"a": 1.0, "b": 2.0, "new": 1.0})
    queue.add("now", "a", 0, 10, 0.0)
    started(queue, 1)
    assert queue.ahead("new", 0.0) == 0
    for _ in range(3):
        queue.add("a", "a", 0, 10, 0.0)
        queue.add("b", "b", 0, 10, 0.0)
    assert queue.ahead("new", 0.0) == 0, "it starts at the virtual time"
    assert queue.ahead("b", 0.0) == 30 + 15, "a gets half as many tokens as b"
    assert queue.ahead("a", 0.0) == 30 + 30, "b has no more"
    assert queue.ahead("a", 0.0, priority=-1) == 20, "only those of b: a has had 10 tokens"
