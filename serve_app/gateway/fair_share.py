"""The requests of one tenant in the fair queue of a model, and an order of tenants."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A request that waits or runs. `cost` is the expected one, in tokens, and `charged` what its tenant has paid.

    The tickets of a tenant go in the order of `rank`: the urgency, which is lower for a more urgent request, and the
    number of the ticket.
    """

    item: T
    share: Share[T]
    rank: tuple[float, int]
    cost: float
    charged: float = 0.0
    waits: bool = True

    @property
    def tenant(self) -> str:
        return self.share.name


@dataclass(slots=True, eq=False)
class Share(Generic[T]):
    """A tenant that has requests, or had one lately. `served` is its tokens so far, divided by its weight.

    `line` are its waiting requests in their order, and `cost` the sum of their costs.
    """

    name: str
    weight: float
    served: float = 0.0
    line: list[Ticket[T]] = field(default_factory=list)
    cost: float = 0.0
    running: int = 0
    idle_since: float = 0.0

    @property
    def length(self) -> float:
        """The number of waiting requests for its weight."""
        return len(self.line) / self.weight

    def add(self, ticket: Ticket[T]) -> None:
        insort(self.line, ticket, key=_rank)
        self.cost += ticket.cost

    def remove(self, ticket: Ticket[T]) -> None:
        del self.line[bisect_left(self.line, ticket.rank, key=_rank)]
        self.cost = self.cost - ticket.cost if self.line else 0.0  # without the rounding of the sums

    def settle(self, ticket: Ticket[T], cost: float) -> None:
        """Charge what the ticket costs more than was charged before, or give back what it costs less."""
        self.served += (cost - ticket.charged) / self.weight
        ticket.charged = cost

    def cost_before(self, urgency: float) -> float:
        """The cost of the waiting requests that go before a new one of this urgency."""
        if not self.line or self.line[-1].rank[0] <= urgency:
            return self.cost
        end = bisect_right(self.line, urgency, key=_urgency)
        return sum(ticket.cost for ticket in self.line[:end])


class LowestShare(Generic[T]):
    """Finds the tenant with the lowest `key` among those that wait, in logarithmic time.

    A key that has become lower is noted by `lowered`. One that has become higher is noticed when it is the lowest.
    """

    def __init__(self, key: Callable[[Share[T]], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, Share[T]]] = []
        self._numbers = count()

    def lowered(self, share: Share[T], waiting: Iterable[Share[T]], most: int) -> None:
        """Note a lower key, or a tenant that begins to wait. `waiting` are all that wait, at most `most`."""
        heappush(self._heap, (self._key(share), next(self._numbers), share))
        if len(self._heap) > 2 * most + 32:
            self._heap = [(self._key(one), next(self._numbers), one) for one in waiting]
            heapify(self._heap)

    def first(self) -> Share[T] | None:
        while self._heap:
            noted, _, share = self._heap[0]
            key = self._key(share)
            if not share.line or key < noted:  # a later entry has the lower key
                heappop(self._heap)
            elif key > noted:
                heapreplace(self._heap, (key, next(self._numbers), share))
            else:
                return share
        return None


def _rank(ticket: Ticket[T]) -> tuple[float, int]:
    return ticket.rank


def _urgency(ticket: Ticket[T]) -> float:
    return ticket.rank[0]
