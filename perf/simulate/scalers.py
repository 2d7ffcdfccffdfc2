"""Decides the number of replicas: the policy of the product, that of Ray Serve, and one that knows the future."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from perf.simulate.cache import BlockCache
from perf.simulate.settings import Job, Profile
from perf.simulate.traffic import Floats, Trace
from serve_app.core.scaling import Demand, Objective, RecentHighest, ReplicaSpeed, typical, wanted_replicas

# Ray Serve records the number of requests every 0.2 * look_back_period_s, and sends the records of that period every
# 10 s: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S in ray/serve/_private/constants.py of Ray 2.60.
_LOOK_BACK_S, _RECORD_S, _PUSH_S = 30.0, 6.0, 10.0
# Share of their time for which the replicas of the oracle compute, over the seconds that follow.
_ORACLE_BUSY, _ORACLE_WINDOW_S = 0.8, 15


@dataclass(frozen=True, slots=True)
class View:
    """What a scaler may know. `ready` replicas get requests; `target` is the present decision."""

    ready: int
    target: int
    most: int
    open_requests: int
    demand: Callable[[], Demand]
    speeds: Sequence[ReplicaSpeed]


class Scaler(Protocol):
    def wanted(self, view: View, now: float) -> int: ...


class Work:
    """The policy of the product, called as serve_app/deployments/autoscaling.py calls it."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._highest = RecentHighest()

    def wanted(self, view: View, now: float) -> int:
        current = max(view.ready, view.target)
        speed = typical(view.speeds, current)
        wanted = wanted_replicas(view.demand(), speed, self._objective, current, view.most)
        return self._highest.limit(wanted, view.target, now)


class RayByRequests:
    """`replica_queue_length_autoscaling_policy` of ray/serve/autoscaling_policy.py, Ray 2.60.

    It wants the mean number of open requests, running and waiting, divided by `target_ongoing_requests`. The mean is
    weighted by time, as in `get_total_num_requests` of ray/serve/_private/autoscaling_state.py: each recorded number
    counts until the next one, and the last one until now.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self._records: deque[tuple[float, float]] = deque()
        self._sent: list[tuple[float, float]] = []
        self._next_record, self._next_push = 0.0, 0.0

    def wanted(self, view: View, now: float) -> int:
        self._observe(view.open_requests, now)
        if not view.ready:
            return max(1, view.target) if view.open_requests else view.target
        # Ray's own order of operations, because it rounds up.
        desired = view.ready * (self.mean(now) / (self._target * view.ready))
        return math.ceil(view.ready + (desired - view.ready))

    def mean(self, now: float) -> float:
        """The mean of what was last sent."""
        if not self._sent:
            return 0.0
        ends = [at for at, _ in self._sent[1:]] + [max(now, self._sent[-1][0] + 1e-3)]
        total = sum(value * (end - at) for (at, value), end in zip(self._sent, ends, strict=True))
        return total / (ends[-1] - self._sent[0][0])

    def _observe(self, requests: float, now: float) -> None:
        if now >= self._next_record:
            self._records.append((now, requests))
            self._next_record = now + _RECORD_S
        if now >= self._next_push:
            while self._records[0][0] < now - _LOOK_BACK_S:
                self._records.popleft()
            self._sent = list(self._records)
            self._next_push = now + _PUSH_S


class Oracle:
    """Starts replicas so early that they are ready when the work comes, and knows which work that is.

    Of the prompts it counts the tokens that no earlier request has had, as if all replicas had one cache.
    """

    def __init__(self, work_s: Floats, start_s: float) -> None:
        """`work_s` are the seconds of one replica that the requests of each second need."""
        self._start_s = math.ceil(start_s)
        padded = np.concatenate([work_s, np.repeat(work_s[-1:], _ORACLE_WINDOW_S)])
        means = np.convolve(padded, np.ones(_ORACLE_WINDOW_S) / _ORACLE_WINDOW_S, mode="valid")
        self._needed = np.ceil(means / _ORACLE_BUSY).astype(int)

    def wanted(self, view: View, now: float) -> int:
        """The most that is needed from now until a replica that would be started now is ready."""
        first = min(int(now), len(self._needed) - 1)
        return max(1, int(self._needed[first : first + self._start_s + 1].max()))


class Delay:
    """`_apply_delay_logic` of ray/serve/autoscaling_policy.py, Ray 2.60, around every policy.

    A change is made once it was wanted for the whole delay. `downscale_to_zero_delay_s` is left out, because the
    simulated services keep one replica.
    """

    def __init__(self, upscale_s: float, downscale_s: float) -> None:
        self._delay_s = {1: upscale_s, -1: downscale_s}
        self._direction = 0
        self._since = 0.0

    def apply(self, wanted: int, target: int, now: float) -> int:
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        if not direction or now - self._since + 1e-6 < self._delay_s[direction]:
            return target
        self._direction = 0
        return wanted if direction > 0 else max(1, wanted)


def seconds_of(trace: Trace, computed: Sequence[float], profile: Profile) -> Floats:
    """The seconds of one replica that the requests of each second of a trace need; `computed` are prompt tokens."""
    work = np.asarray(computed) / profile.prompt_rate + trace.answer / profile.answer_rate
    seconds = max(1, math.ceil(trace.seconds))
    needed: Floats = np.bincount(trace.at.astype(int), weights=work, minlength=seconds).astype(np.float64)
    return needed


def computed_once(trace: Trace, block: int) -> list[float]:
    """The tokens of each prompt that no earlier prompt or answer has had."""
    cache, computed = BlockCache(math.inf), []
    for number in range(len(trace)):
        prompt = int(trace.prompt[number])
        digests = trace.digests(number, prompt + int(trace.answer[number]), block)
        known = cache.matched(digests[: prompt // block]) * block
        computed.append(float(max(1, prompt - known)))
        cache.add(digests)
    return computed


def make_scaler(job: Job, trace: Trace) -> Scaler:
    strategy, profile = job.strategy, job.profile
    match strategy.scaler:
        case "work":
            return Work(Objective(job.fleet.target_ttft_s, min(profile.slots, profile.max_ongoing)))
        case "ray":
            return RayByRequests(strategy.target)
        case "oracle":
            work = seconds_of(trace, computed_once(trace, profile.block_tokens), profile)
            return Oracle(work, profile.start_s)
