"""Chooses the replica that should deliver a request's first token soonest, by the tokens that it has to compute."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from serve_app.core.routing import ReplicaLoad, RoutingKey, home_of_session
from serve_app.gateway.prefix_holders import PrefixHolders

# A running sequence delays a prompt as so many more tokens of the prompt would: it takes a row of each step, and it
# says how many answers the replica computes already.
RUNNING_TOKENS = 32.0
# Replicas that are compared whatever the prompt.
_OTHERS = 4
# A request of a session goes to the replica of the session unless it has so many tokens more to compute than another.
_SESSION_TOKENS = 1024.0
# A replica from which nothing was heard for this time gets requests only if no other replica is left.
SILENCE_S = 5.0
# A report that arrives so soon after the loss of its replica may have been sent before it.
LATE_REPORT_S = 3.0
_GONE_S = 120.0


@dataclass(slots=True)
class _Replica:
    """What is known of one replica. `sent` are the tokens of requests that it may not have reported yet."""

    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    sent: dict[object, float] = field(default_factory=dict)
    reported: set[object] = field(default_factory=set)
    digests: set[int] = field(default_factory=set)
    heard: float | None = None
    lost_at: float = -math.inf  # -inf: not lost; inf: it has sent its last report

    @property
    def cost(self) -> float:
        """The work before a new request, in tokens of a prompt."""
        return self.load.waiting_tokens + self.load.running * RUNNING_TOKENS + sum(self.sent.values())

    def silent(self, now: float, seconds: float) -> bool:
        return self.heard is not None and now - self.heard > seconds

    @property
    def lost(self) -> bool:
        return self.lost_at > -math.inf

    def lost_recently(self, now: float) -> bool:
        """Whether a report is not yet a sign that the replica is still there."""
        return now - self.lost_at < LATE_REPORT_S


_UNKNOWN = _Replica()  # only read


class RoutingTable:
    """The replicas of one model, by id, and what each of them has computed. All methods may be called on any thread.

    A request goes to the replica with the least work: the tokens of its prompt that are not in the replica's KV cache,
    and the work before it. A common beginning so spreads to another replica as soon as waiting for the first one would
    take longer than computing it again. Among replicas of which nothing is known, or that have the same work, the
    better one of two random ones is taken.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._lock = Lock()
        self._replicas: dict[str, _Replica] = {}
        self._assigned: dict[object, str] = {}  # "" until the request is sent
        self._random = random.Random(seed)
        self._holders = PrefixHolders(self._random)

    def report(self, replica: str, load: ReplicaLoad, now: float) -> None:
        """Take in a replica's report. A request that was sent before its last report is part of this one."""
        with self._lock:
            known = self._replicas.setdefault(replica, _Replica())
            known.load, known.heard = load, now
            if not known.lost_recently(now):
                known.lost_at = -math.inf
            for request in known.reported:
                known.sent.pop(request, None)
            known.reported = set(known.sent)
            if load.digests is not None:
                found = set(array("Q", load.digests))
                self._holders.drop(replica, known.digests - found)
                self._holders.hold(replica, found - known.digests)
                known.digests = found

    def left(self, replica: str, now: float) -> None:
        """Note the last report of a replica. It gets no more requests, although Ray may still know it."""
        with self._lock:
            self._holders.drop(replica, self._replicas.get(replica, _UNKNOWN).digests)
            self._replicas[replica] = _Replica(heard=now, lost_at=math.inf)

    def prune(self, now: float) -> None:
        """Forget the replicas that have not reported for so long that they are gone."""
        with self._lock:
            gone = [name for name, known in self._replicas.items() if known.silent(now, _GONE_S)]
            for replica in gone:
                self._holders.drop(replica, self._replicas.pop(replica).digests)

    def choose(self, replicas: Sequence[str], key: RoutingKey, now: float) -> list[str]:
        """The replicas among `replicas` that suit a request best, the best first; at most a few.

        Empty if all of them were lost a moment ago, which Ray has not noticed yet.
        """
        with self._lock:
            usable = self._usable(replicas, now)
            matched = self._holders.matched(key.digests, set(usable))
            block = key.tokens / max(1, len(key.digests))
            others = self._random.sample(usable, min(_OTHERS if matched else 2, len(usable)))
            preferred = home_of_session(key.session, usable) if key.session else None
            costs = {}
            for replica in {*matched, *others, *([preferred] if preferred else [])}:
                cost = self._replicas.get(replica, _UNKNOWN).cost
                work = cost + key.tokens - block * matched.get(replica, 0)
                costs[replica] = work - (_SESSION_TOKENS if replica == preferred else 0.0)
            return sorted(costs, key=lambda replica: (costs[replica], self._random.random()))

    def opened(self, request: object) -> None:
        """Note a request that will be sent, until `ended`."""
        with self._lock:
            self._assigned[request] = ""

    def sent(self, replica: str, request: object, key: RoutingKey) -> None:
        """Note where an open request was sent, so that the next ones know before the replica's next report."""
        with self._lock:
            if request not in self._assigned:
                return
            self._forget(request)
            self._assigned[request] = replica
            known = self._replicas.setdefault(replica, _Replica())
            matched = next((n for n, digest in enumerate(key.digests) if digest not in known.digests), len(key.digests))
            known.sent[request] = key.tokens * (1 - matched / max(1, len(key.digests))) + RUNNING_TOKENS
            new = {digest for digest in key.digests if digest not in known.digests}
            known.digests |= new
            self._holders.hold(replica, new)

    def lost(self, replica: str, now: float) -> None:
        """Note that a replica was lost. It gets no more requests until it reports again."""
        with self._lock:
            known = self._replicas.setdefault(replica, _Replica(heard=now))
            known.lost_at = max(known.lost_at, now)

    def avoid(self, replica: str, now: float) -> None:
        """Note that a replica refused a request. It gets requests only if no other is left, until its next report."""
        self.lost(replica, now - LATE_REPORT_S)

    def began(self, request: object) -> None:
        """Note that a request has its first token: its prompt is computed."""
        with self._lock:
            known = self._replicas.get(self._assigned.get(request, ""))
            if known is not None and request in known.sent:
                known.sent[request] = RUNNING_TOKENS

    def ended(self, request: object) -> None:
        """Note that a request has ended."""
        with self._lock:
            self._forget(request)

    def assigned(self, request: object) -> str:
        """The replica to which a request was sent; "" if it was not sent or has ended."""
        with self._lock:
            return self._assigned.get(request, "")

    def silent(self, replica: str, now: float, seconds: float) -> bool:
        """Whether a replica that has reported before has not done so for so long."""
        with self._lock:
            return self._replicas.get(replica, _UNKNOWN).silent(now, seconds)

    def avoided(self, replica: str, now: float) -> bool:
        """Whether a replica is lost or silent, so that it gets requests only if no other replica is left."""
        with self._lock:
            return self._is_avoided(replica, now)

    def _is_avoided(self, replica: str, now: float) -> bool:
        known = self._replicas.get(replica, _UNKNOWN)
        return known.lost or known.silent(now, SILENCE_S)

    def _usable(self, replicas: Sequence[str], now: float) -> list[str]:
        usable = [replica for replica in replicas if not self._is_avoided(replica, now)]
        return usable or [one for one in replicas if not self._replicas.get(one, _UNKNOWN).lost_recently(now)]

    def _forget(self, request: object) -> None:
        replica = self._assigned.pop(request, "")
        if known := self._replicas.get(replica):
            known.sent.pop(request, None)
