"""Weighted fair queueing of the requests of one model between tenants, by tokens. Pure: no clock, no event loop.

The counters are those of the Virtual Token Counter: Sheng et al., "Fairness in Serving Large Language Models", OSDI
2024. A tenant that begins to wait starts at the virtual time, as in start-time fair queueing: Goyal, Vin, Cheng,
IEEE/ACM Transactions on Networking, 1997. A full queue drops from the longest line: Suter et al., "Buffer management
schemes for supporting TCP in gigabit routers with per-flow queueing", IEEE Journal on Selected Areas in Communications,
1999.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Generic, TypeVar

from serve_app.gateway.fair_share import LowestShare, Share, Ticket

T = TypeVar("T")

# A waiting request gains one step of priority in 10 s.
AGEING_PER_S = 0.1
# A tenant without requests keeps its counter, and a free slot for its next request, for this time.
IDLE_S = 30.0
# One slot in 16 is kept for tenants that pause; none if there are fewer than 8 slots.
_SLOTS_PER_KEPT, _FEWEST_SLOTS = 16, 8


class FairQueue(Generic[T]):
    """Decides which request goes next, and which one is dropped.

    While tenants wait, each gets tokens in proportion to its `weight(name)`. A request is charged its expected cost
    when it starts, more when it exceeds it, and the true cost when it ends. The requests of one tenant go in the order
    of `priority - AGEING_PER_S * waited`, the lowest first, and then of their arrival. The order of two requests does
    not change while they wait, because both age alike.

    A tenant that had a request in the last IDLE_S seconds and has none now keeps one slot free, so that its next
    request starts at once although others have a backlog. At most one slot in 16 is kept; with one tenant none is.

    Times are in seconds of one clock. Memory is that of the tickets, and of the tenants that had one in the last IDLE_S
    seconds. An operation takes a time that grows with the logarithm of the tenants.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._shares: dict[str, Share[T]] = {}
        self._waiting: dict[str, Share[T]] = {}
        self._idle: OrderedDict[str, Share[T]] = OrderedDict()  # the longest idle first
        self._least_served: LowestShare[T] = LowestShare(_served)
        self._longest: LowestShare[T] = LowestShare(_shortness)
        self._weights = 0.0  # of the tenants that wait
        self._virtual = 0.0  # `served` of the tenant that started last, before it was charged
        self._numbers = count()
        self._length = 0
        self.running = 0
        self.cost = 0.0  # of all requests that wait

    def __len__(self) -> int:
        return self._length

    def tenants(self) -> int:
        """The number of tenants of which anything is known."""
        return len(self._shares)

    def add(self, item: T, tenant: str, priority: int, cost: float, now: float) -> Ticket[T]:
        """Let a request wait. A tenant that did not wait gets no credit for that time."""
        share = self._share(tenant)
        self._idle.pop(tenant, None)
        if not share.line:
            share.served = max(share.served, self._virtual)
            self._waiting[tenant] = share
            self._weights += share.weight
        ticket = Ticket(item, share, (priority + AGEING_PER_S * now, next(self._numbers)), cost)
        share.add(ticket)
        self._note(self._longest, share)
        if len(share.line) == 1:
            self._note(self._least_served, share)
        self._length += 1
        self.cost += cost
        return ticket

    def start(self, slots: int, places: int, now: float) -> Ticket[T] | None:
        """The request that goes next, if there is a free place for it: it runs from now on.

        `slots` requests are computed together. `places` is at least as many: the others are ready when a slot is free.
        """
        self._forget(now)
        share = self._least_served.first()
        if share is None or self.running >= self._limit(slots, places):
            return None
        ticket = share.line[0]
        self._leave(ticket)
        self._virtual = share.served
        share.running += 1
        self.running += 1
        self.charge(ticket, ticket.cost)
        return ticket

    def charge(self, ticket: Ticket[T], cost: float) -> None:
        """Note that a running request has cost so much so far."""
        if cost > ticket.charged:
            ticket.share.settle(ticket, cost)

    def end(self, ticket: Ticket[T], cost: float, now: float) -> None:
        """A running request has ended, with its true cost."""
        share = ticket.share
        share.settle(ticket, cost)
        share.running -= 1
        self.running -= 1
        if share.line:
            self._note(self._least_served, share)
        self._rest(share, now)

    def remove(self, ticket: Ticket[T], now: float) -> None:
        """A waiting request leaves."""
        self._leave(ticket)
        self._rest(ticket.share, now)

    def to_drop(self, tenant: str) -> Ticket[T] | None:
        """The waiting request that a request of `tenant` displaces from a full queue; None if it is refused itself.

        It is the last one of the tenant that has the most waiting requests for its weight.
        """
        longest = self._longest.first()
        share = self._shares.get(tenant)
        own = 0 if share is None else len(share.line)
        weight = self._weight(tenant) if share is None else share.weight
        if longest is None or longest is share or longest.length <= (own + 1) / weight:
            return None
        return longest.line[-1]

    def ahead(self, tenant: str, now: float, priority: int | None = None) -> float:
        """The largest cost of waiting requests that can go before a new one of `tenant`.

        Without a priority, the new one is the last of its tenant. While the tenant gets what its own requests cost, the
        others get no more than their weights allow, and no more than they need.
        """
        share = self._shares.get(tenant)
        own, weights, begins = 0.0, self._weights, self._virtual
        weight = self._weight(tenant) if share is None else share.weight
        if share is not None:
            own = share.cost if priority is None else share.cost_before(priority + AGEING_PER_S * now)
            begins = share.served if share.line else max(share.served, begins)
        if share is None or not share.line:
            weights += weight
        others = self.cost - (0.0 if share is None else share.cost)
        lag = max(0.0, begins - self._virtual) + own / weight  # in virtual time
        return own + min(others, lag * (weights - weight))

    def _share(self, tenant: str) -> Share[T]:
        share = self._shares.get(tenant)
        if share is None:
            share = self._shares[tenant] = Share(tenant, self._weight(tenant), self._virtual)
        elif not share.line:
            share.weight = self._weight(tenant)  # it may have been changed
        return share

    def _leave(self, ticket: Ticket[T]) -> None:
        """Take a ticket out of its line."""
        share, ticket.waits = ticket.share, False
        share.remove(ticket)
        self._length -= 1
        if not share.line:
            del self._waiting[share.name]
            self._weights -= share.weight
        self.cost -= ticket.cost
        if not self._waiting:
            self.cost = self._weights = 0.0  # without the rounding of the sums

    def _rest(self, share: Share[T], now: float) -> None:
        """Note that a tenant has no request any more, if so."""
        if not share.line and not share.running:
            share.idle_since = now
            self._idle[share.name] = share
            self._forget(now)

    def _forget(self, now: float) -> None:
        while self._idle and now - next(iter(self._idle.values())).idle_since > IDLE_S:
            del self._shares[self._idle.popitem(last=False)[0]]

    def _note(self, order: LowestShare[T], share: Share[T]) -> None:
        order.lowered(share, self._waiting.values(), len(self._waiting))

    def _limit(self, slots: int, places: int) -> int:
        """The number of running requests from which on no further one starts.

        While a tenant has no backlog, whether it pauses or runs, the others take no more places than there are slots.
        Otherwise its next request would wait until those that are ready have had a slot.
        """
        if slots < _FEWEST_SLOTS or len(self._shares) == len(self._waiting):
            return places
        return slots - min(len(self._idle), -(-slots // _SLOTS_PER_KEPT))


def _served(share: Share[T]) -> float:
    return share.served


def _shortness(share: Share[T]) -> float:
    return -share.length
