"""The replicas of a simulated service: those that start, serve, drain or are lost."""

from __future__ import annotations

from collections.abc import Callable

from perf.simulate.cache import BlockCache
from perf.simulate.replica import Replica
from perf.simulate.settings import Profile
from serve_app.core.scaling import RecentRate, ReplicaSpeed, Throughput

# As in serve_app/deployments/replica.py.
_CACHE_SPAN_S = 300.0


class Speed:
    """What a replica reports of its speed, measured as the replicas of the product do."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._prompts, self._answers = Throughput(), Throughput()
        self._hits, self._cached = RecentRate(_CACHE_SPAN_S), 0.0
        self.reported = ReplicaSpeed(start_s=profile.start_s)

    def observe(self, replica: Replica, now: float) -> ReplicaSpeed:
        replica.advance(now)
        self._hits.add(replica.cached_tokens - self._cached, now)
        self._cached = replica.cached_tokens
        self.reported = ReplicaSpeed(
            self._prompts.observe(now, replica.computed_tokens),
            self._answers.observe(now, replica.generated_tokens),
            min(1.0, replica.held / self._profile.kv_tokens),
            self._profile.start_s,
            self._hits.value(now),
        )
        return self.reported


class Fleet:
    """Keeps `target` replicas. `starts` is called with a new one that will be ready after `start_s`.

    A replica is paid for from its start to its end; `paid_s` has the seconds of those that have ended.
    """

    def __init__(self, profile: Profile, starts: Callable[[Replica], None], cache: BlockCache | None = None) -> None:
        self.target = 0
        self.starting: dict[str, Replica] = {}
        self.ready: dict[str, Replica] = {}
        self.draining: dict[str, Replica] = {}
        self.names: list[str] = []  # those of `ready`
        self.speeds: dict[str, Speed] = {}
        self.paid_s = 0.0
        self._profile = profile
        self._starts = starts
        self._cache = cache
        self._count = 0

    def __len__(self) -> int:
        """All replicas that cost money."""
        return len(self.starting) + len(self.ready) + len(self.draining)

    def start(self, now: float) -> None:
        """Start replicas until there are `target`."""
        while len(self.starting) + len(self.ready) < self.target:
            replica = Replica(f"replica-{self._count}", self._profile, now, self._cache)
            self._count += 1
            self.starting[replica.name] = replica
            self._starts(replica)

    def started(self, replica: Replica) -> bool:
        """Whether the replica serves from now on; it does not if it was stopped or lost while it started."""
        if self.starting.pop(replica.name, None) is None:
            return False
        self.ready[replica.name] = replica
        self.names.append(replica.name)
        self.speeds[replica.name] = Speed(self._profile)
        return True

    def surplus(self, least_worth_first: bool) -> list[Replica]:
        """The replicas to stop: those that start, then the ones whose cache has saved least, or the newest ones."""
        count = len(self.starting) + len(self.ready) - self.target
        if count <= 0:
            return []
        order = list(self.starting.values())[::-1]
        serving = list(self.ready.values())[::-1]
        if least_worth_first:
            serving.sort(key=lambda replica: self.speeds[replica.name].reported.cache_hits)
        return (order + serving)[:count]

    def drain(self, replica: Replica, now: float) -> None:
        """The replica gets no further requests, and ends after its last one."""
        if self.starting.pop(replica.name, None) is not None:
            self.paid_s += now - replica.began
            return
        if self.ready.pop(replica.name, None) is not None:
            self.names.remove(replica.name)
            self.draining[replica.name] = replica
        self.end_if_idle(replica, now)

    def end_if_idle(self, replica: Replica, now: float) -> bool:
        if replica.name in self.draining and not replica.ongoing:
            self.remove(replica, now)
            return True
        return False

    def remove(self, replica: Replica, now: float) -> None:
        """The replica has ended or is lost."""
        for group in (self.starting, self.ready, self.draining):
            if group.pop(replica.name, None) is not None:
                self.paid_s += now - replica.began
                if group is self.ready:
                    self.names.remove(replica.name)
        self.speeds.pop(replica.name, None)

    def paid_until(self, now: float) -> float:
        """Replica-seconds up to now."""
        present = [*self.starting.values(), *self.ready.values(), *self.draining.values()]
        return self.paid_s + sum(now - replica.began for replica in present)
