"""Chooses the replica of a request: the routing table of the product, and what it is compared with."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

from perf.simulate.replica import Replica, Request
from perf.simulate.settings import Router
from serve_app.core.routing import PrefixRecord, ReplicaLoad, RoutingKey
from serve_app.core.scaling import ReplicaSpeed
from serve_app.gateway.routing_table import RoutingTable

# As in serve_app/deployments/replica.py.
_FULL_REPORT = 15


class RequestRouter(Protocol):
    """`seconds` has the processor time of each decision on this machine."""

    seconds: array[float]

    def choose(self, replicas: Sequence[str], request: Request, now: float) -> list[str]:
        """Replicas for a request, the best first; at least one."""

    def sent(self, replica: str, request: Request) -> None: ...
    def began(self, request: Request) -> None: ...
    def ended(self, request: Request) -> None: ...
    def report(self, replica: Replica, speed: ReplicaSpeed, now: float) -> None:
        """A replica reports its load, once per second."""

    def removed(self, replica: str, now: float) -> None: ...


class Plain:
    """A router that needs no reports."""

    def __init__(self, loads: Mapping[str, Replica]) -> None:
        self.seconds = array("d")
        self._loads = loads

    def sent(self, replica: str, request: Request) -> None: ...
    def began(self, request: Request) -> None: ...
    def ended(self, request: Request) -> None: ...
    def report(self, replica: Replica, speed: ReplicaSpeed, now: float) -> None: ...
    def removed(self, replica: str, now: float) -> None: ...


class RoundRobin(Plain):
    """One replica after the other."""

    _turn = -1

    def choose(self, replicas: Sequence[str], request: Request, now: float) -> list[str]:
        self._turn += 1
        return [replicas[self._turn % len(replicas)]]


class PowerOfTwo(Plain):
    """The better of two random replicas by their requests, as Ray Serve's default router.

    Ray's router may know an older number of requests; this one always knows the newest.
    """

    def __init__(self, loads: Mapping[str, Replica], seed: int) -> None:
        super().__init__(loads)
        self._random = random.Random(seed)

    def choose(self, replicas: Sequence[str], request: Request, now: float) -> list[str]:
        two = self._random.sample(replicas, min(2, len(replicas)))
        return sorted(two, key=lambda name: self._loads[name].ongoing)


class LeastWork(Plain):
    """The replica with the fewest tokens before a request, known exactly: part of the oracle."""

    def choose(self, replicas: Sequence[str], request: Request, now: float) -> list[str]:
        return [min(replicas, key=lambda name: self._work(self._loads[name]))]

    @staticmethod
    def _work(replica: Replica) -> tuple[int, int]:
        return replica.waiting_tokens, replica.ongoing


class Table:
    """The RoutingTable of the product, with reports as its replicas send them."""

    def __init__(self, seed: int, kv_tokens: int) -> None:
        self.seconds = array("d")
        self._table = RoutingTable(seed)
        self._kv_tokens = kv_tokens
        self._records: dict[str, PrefixRecord] = {}
        self._reported: dict[str, tuple[int, int]] = {}  # version of the digests, and number of reports

    def choose(self, replicas: Sequence[str], request: Request, now: float) -> list[str]:
        key = self._key(request)
        began = time.thread_time()
        chosen = self._table.choose(replicas, key, now)
        self.seconds.append(time.thread_time() - began)
        return chosen

    def sent(self, replica: str, request: Request) -> None:
        self._table.opened(request.number)
        self._table.sent(replica, request.number, self._key(request))

    def began(self, request: Request) -> None:
        self._table.began(request.number)

    def ended(self, request: Request) -> None:
        self._table.ended(request.number)
        if request.began is not None and request.replica in self._records:
            self._records[request.replica].add(request.digests, request.prompt)

    def report(self, replica: Replica, speed: ReplicaSpeed, now: float) -> None:
        record = self._records.get(replica.name)
        if record is None:
            record = self._records[replica.name] = PrefixRecord(self._kv_tokens)
        version, number = self._reported.get(replica.name, (0, 0))
        changed = record.version != version or number % _FULL_REPORT == 0
        self._reported[replica.name] = record.version, number + 1
        running = replica.ongoing - len(replica.waiting) - len(replica.prefill)
        digests = record.digests() if changed else None
        self._table.report(replica.name, ReplicaLoad(running, replica.waiting_tokens, digests, speed), now)

    def removed(self, replica: str, now: float) -> None:
        self._table.left(replica, now)
        self._records.pop(replica, None)
        self._reported.pop(replica, None)

    @staticmethod
    def _key(request: Request) -> RoutingKey:
        return RoutingKey(request.digests, request.to_compute, request.session)


def make_router(kind: Router, loads: Mapping[str, Replica], seed: int, kv_tokens: int) -> RequestRouter:
    match kind:
        case "table":
            return Table(seed, kv_tokens)
        case "round-robin":
            return RoundRobin(loads)
        case "power-of-two":
            return PowerOfTwo(loads, seed)
        case "oracle":
            return LeastWork(loads)
