"""Requests go where the least has to be computed for them."""

from __future__ import annotations

import random
import time
from array import array
from collections import Counter

import pytest

from serve_app.core.routing import ReplicaLoad, RoutingKey
from serve_app.gateway.routing_table import LATE_REPORT_S, RUNNING_TOKENS, SILENCE_S, RoutingTable

REPLICAS = ["a", "b", "c", "d"]


def key(*digests: int, tokens: float | None = None, session: str = "") -> RoutingKey:
    return RoutingKey(array("Q", digests), 64.0 * len(digests) if tokens is None else tokens, session)


def table(now: float = 0.0, **loads: ReplicaLoad) -> RoutingTable:
    made = RoutingTable(seed=1)
    for name in REPLICAS:
        made.report(name, loads.get(name, ReplicaLoad()), now)
    return made


def load(running: int = 0, waiting: int = 0, *digests: int) -> ReplicaLoad:
    return ReplicaLoad(running, waiting, array("Q", digests).tobytes())


def send(routes: RoutingTable, replica: str, request: int, prompt: RoutingKey) -> None:
    routes.opened(request)
    routes.sent(replica, request, prompt)


def test_a_request_goes_to_the_replica_with_the_longest_part_of_its_prompt() -> None:
    routes = table(b=load(0, 0, 1, 2), c=load(0, 0, 1, 2, 3), d=load(0, 0, 1))
    assert routes.choose(REPLICAS, key(1, 2, 3, 4), 0.0)[:3] == ["c", "b", "d"]


def test_a_busy_replica_gets_a_prompt_only_while_waiting_is_shorter_than_computing() -> None:
    prompt = key(*range(1, 11))
    even = round(prompt.tokens / RUNNING_TOKENS)
    idle, busy = load(even - 1, 0, *range(1, 11)), load(even + 1, 0, *range(1, 11))
    assert table(a=idle).choose(REPLICAS, prompt, 0.0)[0] == "a"
    assert table(a=busy).choose(REPLICAS, prompt, 0.0)[0] != "a"
    waiting = load(0, round(prompt.tokens) + 1, *range(1, 11))
    assert table(a=waiting).choose(REPLICAS, prompt, 0.0)[0] != "a"


def test_a_common_beginning_spreads_over_all_replicas_under_load() -> None:
    routes, prompt = table(), key(*range(1, 9))
    counts: Counter[str] = Counter()
    for number in range(400):
        (best, *_) = routes.choose(REPLICAS, prompt, 0.0)
        send(routes, best, number, prompt)
        counts[best] += 1
    assert set(counts) == set(REPLICAS)
    assert max(counts.values()) <= 1.2 * min(counts.values())


def test_requests_without_a_known_beginning_go_to_the_less_busy_of_two() -> None:
    routes = table(a=load(5), b=load(1), c=load(3), d=load(2))
    best = Counter(routes.choose(REPLICAS, key(), 0.0)[0] for _ in range(300))
    assert best["a"] == 0, "the busiest is the worse one of every two"
    assert best["b"] > best["d"] > best["c"] > 0


def test_unknown_replicas_share_the_requests() -> None:
    routes = RoutingTable(seed=1)
    best = Counter(routes.choose(REPLICAS, key(), 0.0)[0] for _ in range(400))
    assert min(best.values()) > 50


def test_what_was_sent_counts_until_the_replica_reports_it_or_the_request_ends() -> None:
    routes = table()
    send(routes, "a", 1, key(5))
    assert routes.assigned(1) == "a"
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "b"
    routes.report("a", ReplicaLoad(running=0), 0.0)
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "b", "it may have reported before it received the request"
    routes.report("a", ReplicaLoad(running=0), 0.0)
    assert {routes.choose(["a", "b"], key(), 0.0)[0] for _ in range(40)} == {"a", "b"}
    send(routes, "b", 2, key(5))
    routes.ended(2)
    assert not routes.assigned(2)
    routes.sent("b", 2, key(5))
    assert not routes.assigned(2), "it has ended"
    assert {routes.choose(["a", "b"], key(), 0.0)[0] for _ in range(40)} == {"a", "b"}


def test_a_request_with_its_first_token_counts_as_one_that_runs() -> None:
    routes = table()
    send(routes, "a", 1, key(5, 6))
    send(routes, "b", 2, key(tokens=64))
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "b"
    routes.began(1)
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "a"


def test_what_is_known_of_a_request_does_not_count_as_work() -> None:
    routes = table(a=load(0, 0, 5, 6))
    send(routes, "a", 1, key(5, 6))
    send(routes, "b", 2, key(tokens=64))
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "a"


def test_a_request_that_another_replica_accepted_counts_there() -> None:
    routes = table()
    send(routes, "a", 1, key(5))
    routes.sent("b", 1, key(5))
    assert routes.assigned(1) == "b"
    assert routes.choose(["a", "b"], key(), 0.0)[0] == "a"


def test_a_report_replaces_the_known_beginnings_and_one_without_them_keeps_them() -> None:
    routes = table(b=load(0, 0, 1, 2, 3))
    routes.report("b", ReplicaLoad(), 0.0)
    assert routes.choose(REPLICAS, key(1, 2, 3), 0.0)[0] == "b"
    routes.report("b", load(0, 0, 9), 0.0)
    routes.report("c", load(0, 0, 1), 0.0)
    assert routes.choose(REPLICAS, key(1, 2, 3), 0.0)[0] == "c"
    routes.left("c", 0.0)
    assert not routes._holders.matched([1], REPLICAS)


def test_a_session_stays_at_its_replica_until_that_is_much_busier() -> None:
    routes = table()
    homes = {name: routes.choose(REPLICAS, key(session=name), 0.0)[0] for name in map(str, range(200))}
    assert {routes.choose(REPLICAS, key(session="7"), 0.0)[0] for _ in range(20)} == {homes["7"]}
    assert min(Counter(homes.values()).values()) > 20
    rest = [name for name in REPLICAS if name != homes["7"]]
    moved = [name for name, home in homes.items() if home != homes["7"]]
    assert all(routes.choose(rest, key(session=name), 0.0)[0] == homes[name] for name in moved)
    routes.report(homes["7"], load(running=40), 0.0)
    assert routes.choose(REPLICAS, key(session="7"), 0.0)[0] != homes["7"]


def chosen(routes: RoutingTable, replicas: list[str], now: float) -> set[str]:
    return {replica for _ in range(50) for replica in routes.choose(replicas, key(), now)}


def test_a_silent_or_refusing_replica_is_avoided_until_it_reports_again() -> None:
    routes = table(now=0.0)
    late = SILENCE_S + 1
    for name in "bcd":
        routes.report(name, ReplicaLoad(), late)
    assert routes.silent("a", late, SILENCE_S)
    assert routes.avoided("a", late)
    assert "a" not in chosen(routes, REPLICAS, late)
    assert routes.choose(["a"], key(), late) == ["a"], "it is the only one left"
    routes.report("a", ReplicaLoad(), late)
    routes.avoid("a", late)
    routes.prune(late)
    assert routes.avoided("a", late), "its refusal is still known"
    assert not routes.silent("a", late, SILENCE_S), "the other requests that it serves are not ended"
    assert "a" not in chosen(routes, REPLICAS, late)
    assert routes.choose(["a"], key(), late) == ["a"]
    routes.report("a", ReplicaLoad(), late)
    assert not routes.avoided("a", late)
    routes.prune(late + 1000)
    assert not routes._replicas


@pytest.mark.parametrize("known", [True, False])
def test_a_lost_replica_gets_no_request_until_it_reports_again(known: bool) -> None:
    """Ray does not know yet that it has died, and a report from before its death may still arrive."""
    routes = table() if known else RoutingTable()
    routes.lost("a", 10.0)
    routes.report("a", ReplicaLoad(), 10.5)
    assert "a" not in chosen(routes, REPLICAS, 11.0)
    assert routes.choose(["a"], key(), 11.0) == []
    assert routes.choose(["a"], key(), 10.0 + LATE_REPORT_S) == ["a"], "nothing reports while the hub is away"
    routes.report("a", ReplicaLoad(), 10.0 + LATE_REPORT_S)
    assert "a" in chosen(routes, REPLICAS, 10.0 + LATE_REPORT_S)


def test_a_replica_that_has_left_gets_no_request() -> None:
    """Without the record it would seem idle, so that the requests of a lost replica would go there again."""
    routes = table(a=load(3, 0, 1), b=load(20), c=load(20), d=load(20))
    routes.left("a", 1.0)
    routes.avoid("a", 1.0)
    assert "a" not in chosen(routes, REPLICAS, 1.0)
    assert routes.choose(["a"], key(), 60.0) == []
    routes.prune(500.0)
    assert not routes._replicas


@pytest.mark.parametrize("hot", [False, True])
def test_a_decision_among_1000_replicas_takes_less_than_a_millisecond(hot: bool) -> None:
    """The fastest of ten rounds: other programs run on the machine of a test."""
    rng, routes = random.Random(1), RoutingTable(seed=1)
    names = [f"replica-{number}" for number in range(1000)]
    common = tuple(range(1, 17)) if hot else ()
    families = [(*common, *(rng.getrandbits(63) for _ in range(32))) for _ in range(2000)]
    for name in names:
        held = [digest for family in rng.sample(families, 4) for digest in family]
        routes.report(name, load(rng.randrange(20), rng.randrange(2000), *held), 0.0)
    keys = [key(*rng.choice(families)) for _ in range(50)]
    rounds = []
    for _ in range(10):
        began = time.perf_counter()
        for one in keys:
            routes.choose(names, one, 0.0)
        rounds.append((time.perf_counter() - began) / len(keys))
    print(f"{min(rounds) * 1e6:.0f} µs")
    assert min(rounds) < 1e-3
