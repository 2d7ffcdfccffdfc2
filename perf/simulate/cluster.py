"""Simulates one service, event by event: arrivals, admission, routing, computation, losses and scaling."""

from __future__ import annotations

import heapq
import math
import random
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from perf.simulate.cache import BlockCache
from perf.simulate.fleet import Fleet
from perf.simulate.outcome import Outcome, Sample
from perf.simulate.replica import Replica, Request
from perf.simulate.routers import make_router
from perf.simulate.scalers import Delay, View, make_scaler
from perf.simulate.settings import Job
from perf.simulate.traffic import Trace
from perf.simulate.workload import Workload
from serve_app.core.scaling import Demand
from serve_app.gateway.room import places_of_replica

# As in the product: two decisions a second, and one report of each replica.
DECISION_S, HEARTBEAT_S = 0.5, 1.0
# The service begins with the replicas that the requests of the first minute need at this share of their time.
_FIRST_S, _FIRST_BUSY = 60.0, 0.8
# As in serve_app/gateway/failover.py: the pauses before a request is sent to a further replica.
_PAUSES_S = (0.0, 0.2, 1.0)
# A request that finds all replicas full is sent again after this time.
_FULL_PAUSE_S = 0.5
_SAMPLE_S = 5.0
_NO_DIGESTS = array("Q")

Event = Callable[[Any, float], None]


class Cluster:
    """Runs a trace once. `progress` is called with the simulated second now and then."""

    def __init__(self, job: Job, trace: Trace, progress: Callable[[float], None] = lambda _: None) -> None:
        self._job, self._trace, self._progress = job, trace, progress
        self._random = random.Random(job.seed)
        self._events: list[tuple[float, int, Event, Any]] = []
        self._count = 0
        shared = BlockCache(math.inf) if job.strategy.router == "oracle" else None
        self._start_s = 0.0
        self.fleet = Fleet(job.profile, self._on_start, shared)
        self._router = make_router(job.strategy.router, self.fleet.ready, job.seed, job.profile.kv_tokens)
        self._scaler = make_scaler(job, trace)
        self._delay = Delay(job.strategy.upscale_delay_s, job.strategy.downscale_delay_s)
        self._workload = Workload()
        self._admitted = 0
        self._queue: deque[Request] = deque()
        self._held: list[Request] = []  # admitted, while no replica is ready
        self.outcome = Outcome()

    def run(self) -> Outcome:
        began = time.process_time()
        self.fleet.target = self.outcome.first_target = self._first_target()
        self.fleet.start(0.0)
        self._start_s = self._job.profile.start_s
        self._at(0.0, self._decide, None)
        self._at(0.0, self._sample, None)
        self._at(self._trace.seconds, self._count_cost, None)
        if len(self._trace):
            self._at(float(self._trace.at[0]), self._arrive, 0)
        while self._events:
            now, _, event, argument = heapq.heappop(self._events)
            event(argument, now)
        self.outcome.routing_s = self._router.seconds
        self.outcome.cpu_s = time.process_time() - began
        return self.outcome

    def _at(self, when: float, event: Event, argument: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event, argument))

    def _over(self, now: float) -> bool:
        return now >= self._trace.seconds and not self._workload

    def _first_target(self) -> int:
        trace, profile = self._trace, self._job.profile
        first = trace.at < _FIRST_S
        work = float(trace.prompt[first].sum() / profile.prompt_rate + trace.answer[first].sum() / profile.answer_rate)
        return min(self._job.fleet.most, max(1, math.ceil(work / min(_FIRST_S, trace.seconds) / _FIRST_BUSY)))

    # Requests

    def _arrive(self, number: int, now: float) -> None:
        trace, profile = self._trace, self._job.profile
        block = profile.block_tokens
        prompt, answer = int(trace.prompt[number]), int(trace.answer[number])
        session = f"session-{trace.session[number]}" if trace.named[number] else ""
        digests = trace.digests(number, prompt, block)
        after = trace.digests(number, prompt + answer, block)
        request = Request(number, now, prompt, answer, digests, after, session)
        self.outcome.requests.append(request)
        self._workload.arrived(request, now)
        if number + 1 < len(trace):
            self._at(float(trace.at[number + 1]), self._arrive, number + 1)
        if not self._queue and self._admitted < self._places:
            self._admitted += 1
            self._send(request, now)
        elif len(self._queue) < self._job.fleet.max_queued + self._replicas * profile.max_ongoing - self._places:
            self._queue.append(request)
        else:
            self._fail(request, "refused", now)

    @property
    def _places(self) -> int:
        """As `room_of` of the product: the ready replicas have so many places."""
        profile, ongoing = self._job.profile, self._job.profile.max_ongoing
        by_work = self._job.strategy.scaler == "work"
        return self._replicas * (places_of_replica(min(profile.slots, ongoing), ongoing) if by_work else ongoing)

    @property
    def _replicas(self) -> int:
        return max(1, len(self.fleet.ready))

    def _admit(self, now: float) -> None:
        """Let waiting requests through, as Admission does for one tenant: the first that arrived goes first."""
        while self._queue and self._admitted < self._places:
            request = self._queue.popleft()
            if now - request.arrived >= self._job.fleet.timeout_s:
                self._fail(request, "deadline", now)
                continue
            self._admitted += 1
            self._send(request, now)

    def _send(self, request: Request, now: float) -> None:
        names, ready, most = self.fleet.names, self.fleet.ready, self._job.profile.max_ongoing
        if not names:
            self._held.append(request)
            return
        chosen = self._router.choose(names, request, now)
        name = next((name for name in chosen if ready[name].ongoing < most), None)
        if name is None:  # Ray's router asks other replicas
            others = self._random.sample(names, min(16, len(names)))
            name = next((name for name in others if ready[name].ongoing < most), None)
        if name is None:
            self._at(now + _FULL_PAUSE_S, self._send, request)
            return
        replica, request.replica = ready[name], name
        self._router.sent(name, request)
        replica.submit(request, now)
        self.outcome.most_running = max(self.outcome.most_running, replica.running)
        self._touch(replica)

    def _touch(self, replica: Replica) -> None:
        """Note the next event of a replica; an earlier note is void."""
        replica.version += 1
        at = replica.next_at()
        if at < math.inf:
            self._at(at, self._step, (replica, replica.version))

    def _step(self, what: tuple[Replica, int], now: float) -> None:
        replica, version = what
        if version != replica.version:
            return
        first, ended = replica.step(now)
        self.outcome.most_running = max(self.outcome.most_running, replica.running)
        for request in first:
            self._workload.began(request)
            self._router.began(request)
        for request in ended:
            self._router.ended(request)
            self._workload.ended(request)
            self._admitted -= 1
            request.digests = request.after = _NO_DIGESTS  # a long simulation has millions of them
        self._touch(replica)
        if ended:
            self._admit(now)
            if self.fleet.end_if_idle(replica, now):
                self._router.removed(replica.name, now)

    def _fail(self, request: Request, error: str, now: float) -> None:
        request.error, request.ended = error, now
        self._workload.ended(request)

    # Replicas

    def _on_start(self, replica: Replica) -> None:
        self._at(replica.began + self._start_s, self._on_ready, replica)

    def _on_ready(self, replica: Replica, now: float) -> None:
        if not self.fleet.started(replica):
            return
        self._at(now + self._random.random() * HEARTBEAT_S, self._heartbeat, replica)
        if self._job.losses.per_hour:
            life_s = self._random.expovariate(self._job.losses.per_hour / 3600)
            self._at(now + life_s, self._on_loss, (replica, self._random.random() < self._job.losses.noticed))
        held, self._held = self._held, []
        for request in held:
            self._send(request, now)
        self._admit(now)

    def _heartbeat(self, replica: Replica, now: float) -> None:
        speed = self.fleet.speeds.get(replica.name)
        if speed is None or replica.lost or self._over(now):
            return
        self._router.report(replica, speed.observe(replica, now), now)
        self._at(now + HEARTBEAT_S, self._heartbeat, replica)

    def _on_loss(self, what: tuple[Replica, bool], now: float) -> None:
        replica, noticed = what
        if replica.name not in self.fleet.speeds or self._over(now):
            return
        self.outcome.lost_replicas += 1
        losses = self._job.losses
        if noticed:
            self._drain(replica, now)
            self.fleet.start(now)
            self._at(now + losses.notice_s, self._on_lost, replica)
        else:
            replica.lose(now)
            self._at(now + losses.detection_s, self._on_lost, replica)

    def _on_lost(self, replica: Replica, now: float) -> None:
        """The loss is known: the requests of the replica go on elsewhere, and another replica is started."""
        if replica.name not in self.fleet.speeds:
            return
        replica.lose(now)
        self.fleet.remove(replica, now)
        for request in replica.abandon():
            self._router.ended(request)
            if self._job.strategy.resumes and request.attempts < len(_PAUSES_S):
                self.outcome.resumed += 1
                self._at(now + _PAUSES_S[request.attempts], self._send, request)
                request.attempts += 1
            else:
                self._admitted -= 1
                self._fail(request, "lost", now)
        self._router.removed(replica.name, now)
        self.fleet.start(now)
        self._admit(now)

    def _drain(self, replica: Replica, now: float) -> None:
        self.fleet.drain(replica, now)
        if replica.name not in self.fleet.speeds:
            self._router.removed(replica.name, now)

    # Scaling

    def _decide(self, _: None, now: float) -> None:
        fleet, most = self.fleet, self._job.fleet.most
        speeds = [speed.reported for speed in fleet.speeds.values()]
        view = View(len(fleet.ready), fleet.target, most, len(self._workload), lambda: self._demand(now), speeds)
        began = time.thread_time()
        wanted = self._scaler.wanted(view, now)
        self.outcome.decision_s.append(time.thread_time() - began)
        target = min(most, max(1, self._delay.apply(wanted, fleet.target, now)))
        if target != fleet.target:
            self.outcome.decisions.append((now, target))
            fleet.target = target
            fleet.start(now)
            for replica in fleet.surplus(self._job.strategy.scaler == "work"):
                self._drain(replica, now)
        if not self._over(now):
            self._at(now + DECISION_S, self._decide, None)

    def _demand(self, now: float) -> Demand:
        return self._workload.demand([*self.fleet.ready.values(), *self.fleet.draining.values()], now)

    def _sample(self, _: None, now: float) -> None:
        fleet, demand = self.fleet, self._workload
        self.outcome.samples.append(
            Sample(now, len(fleet.ready), len(fleet), fleet.target, demand.waiting, len(demand))
        )
        self._progress(now)
        if now + _SAMPLE_S <= self._trace.seconds:
            self._at(now + _SAMPLE_S, self._sample, None)

    def _count_cost(self, _: None, now: float) -> None:
        self.outcome.replica_s = self.fleet.paid_until(now)
