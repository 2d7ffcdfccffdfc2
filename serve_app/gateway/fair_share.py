"""The requests of one tenant in the fair queue of a model."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
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
    def order(self) -> tuple[float, float]:
        """The tenant with the lowest value goes next."""
        return self.served, self.running / self.weight

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


def _rank(ticket: Ticket[T]) -> tuple[float, int]:
    return ticket.rank


def _urgency(ticket: Ticket[T]) -> float:
    return ticket.rank[0]
