"""Decides how many replicas a model needs, from the work that waits and the speed that its replicas have shown.

Pure functions of numbers: the autoscaler of the service and the simulation call the same code.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

# Share of their time for which replicas should compute when requests arrive at an even rate, and the share at which
# one replica fewer would still do. The distance between the two keeps the number from changing to and fro.
_BUSY, _BUSY_WITH_FEWER = 0.8, 0.6
_FULL_KV_CACHE, _GOOD_KV_CACHE = 0.9, 0.75
# Seconds over which a speed is measured, and after which a measured speed counts half.
_WINDOW_S = 3.0
_HALF_LIFE_S = 600.0
# A lower speed, in tokens per second, is none.
_SLOWEST = 0.1


@dataclass(frozen=True, slots=True)
class Demand:
    """What callers want of a model at this moment.

    `running` requests have their first token, `waiting` requests do not. `prompt_tokens` are those of the waiting
    requests that must be computed, `answer_tokens` those that all requests are expected to generate yet. The rates are
    the tokens per second of prompts and of expected answers that arrived in the last half minute.
    """

    running: int = 0
    waiting: int = 0
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    prompt_rate: float = 0.0
    answer_rate: float = 0.0

    @property
    def requests(self) -> int:
        return self.running + self.waiting

    def __add__(self, other: Demand) -> Demand:
        return Demand(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Demand)))


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """What a replica has shown: tokens per second of prompts and of answers, at least 0.1, or 0 if it has shown none.

    `kv_usage` is the share of its KV cache that running sequences hold, `start_s` the seconds of its start.
    `cache_hits` are the prompt tokens per second that its prefix cache has saved lately.
    """

    prompt_rate: float = 0.0
    answer_rate: float = 0.0
    kv_usage: float = 0.0
    start_s: float = 0.0
    cache_hits: float = 0.0


NO_SPEED = ReplicaSpeed()


def typical(speeds: Sequence[ReplicaSpeed], replicas: int) -> ReplicaSpeed:
    """The mean of several of the `replicas`; a speed counts only those that have shown one.

    The KV caches of those that have not reported yet are empty: they start. If they were left out, full caches would
    ask for more replicas again at each decision until the new ones are ready.
    """

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return ReplicaSpeed(
        mean([speed.prompt_rate for speed in speeds if speed.prompt_rate]),
        mean([speed.answer_rate for speed in speeds if speed.answer_rate]),
        sum(speed.kv_usage for speed in speeds) / max(1, replicas, len(speeds)),
        max((speed.start_s for speed in speeds), default=0.0),
        mean([speed.cache_hits for speed in speeds]),
    )


@dataclass(frozen=True, slots=True)
class Objective:
    """The first token of a request should come within `target_ttft_s`.

    A replica computes `slots` requests together. `min_idle` replicas more than the requests need are kept ready.
    """

    target_ttft_s: float
    slots: int
    min_idle: int = 0


def wanted_replicas(demand: Demand, speed: ReplicaSpeed, objective: Objective, current: int, most: int) -> int:
    """The number of replicas, at most `most`, that a model with `current` replicas should have.

    More are wanted at once for the whole backlog, and for the rate at which work arrives; fewer only if the work would
    fit well into fewer. Without a known speed the slots decide alone.
    """
    up = max(
        _for_backlog(demand, speed, objective, current, most),
        _for_rate(demand, speed, objective.slots, _BUSY),
        _for_kv_cache(speed, current, _FULL_KV_CACHE),
    )
    if up < current:
        slots = max(1, math.floor(objective.slots * _GOOD_KV_CACHE))
        down = max(
            up,
            math.ceil(demand.requests / slots),
            _for_rate(demand, speed, objective.slots, _BUSY_WITH_FEWER),
            _for_kv_cache(speed, current, 0.0),
        )
        up = min(current, down)
    if objective.min_idle:
        up = max(up, math.ceil(demand.requests / objective.slots) + objective.min_idle)
    return min(up, most)


def predicted_ttft_s(demand: Demand, speed: ReplicaSpeed, objective: Objective, current: int, replicas: int) -> float:
    """Seconds until the last of the waiting requests has its first token, if there are `replicas` soon.

    The work before it is all waiting prompts, and the answers that must end before it has a slot. Replicas beyond the
    `current` ones help after `start_s`.
    """
    excess = max(0, demand.requests - replicas * objective.slots)
    work = _seconds(demand.prompt_tokens, speed.prompt_rate)
    work += _seconds(excess * demand.answer_tokens / max(1, demand.requests), speed.answer_rate)
    if replicas <= current:
        return work / replicas if replicas else math.inf
    rest = work - current * speed.start_s
    return work / current if rest <= 0 and current else speed.start_s + max(0.0, rest) / replicas


def _for_backlog(demand: Demand, speed: ReplicaSpeed, objective: Objective, current: int, most: int) -> int:
    """The fewest replicas with which the backlog meets the objective.

    If the present replicas miss it, and a start takes longer than the objective, no number can meet it. Then the
    backlog should be gone as long after the start as the start took: more replicas would hardly be worth their cost.
    """
    if not demand.waiting:
        return min(1, demand.requests)
    if not (speed.prompt_rate and speed.answer_rate):
        return min(most, math.ceil(demand.requests / objective.slots))
    if current and predicted_ttft_s(demand, speed, objective, current, current) <= objective.target_ttft_s:
        return 1
    limit = speed.start_s + max(objective.target_ttft_s, speed.start_s)
    for replicas in range(max(1, current), most):
        if predicted_ttft_s(demand, speed, objective, current, replicas) <= limit:
            return replicas
    return most


def _for_rate(demand: Demand, speed: ReplicaSpeed, slots: int, busy: float) -> int:
    """The fewest replicas that compute what arrives in the share `busy` of their time.

    A replica that was never busy has shown less than its speed, so that the rates alone give too many: the more
    replicas there are, the less each of them shows. Therefore the open requests bound the work. No more replicas
    compute prompts than requests wait for their first token, of which the first needs no further replica, and running
    requests fill no more than their slots.
    """
    prompts = min(_seconds(demand.prompt_rate, speed.prompt_rate), max(0, demand.waiting - 1))
    answers = min(_seconds(demand.answer_rate, speed.answer_rate), demand.running / slots)
    work = prompts + answers
    return math.ceil(work / busy) if demand.requests else math.floor(work / busy)


def _for_kv_cache(speed: ReplicaSpeed, current: int, limit: float) -> int:
    """The fewest replicas with which the KV caches are filled to a share of _GOOD_KV_CACHE, if they exceed `limit`."""
    return math.ceil(current * speed.kv_usage / _GOOD_KV_CACHE) if speed.kv_usage > limit else 0


def _seconds(tokens: float, rate: float) -> float:
    return tokens / rate if rate else 0.0


class Throughput:
    """The highest speed, in tokens per second, that a counter of tokens has shown; an old one counts less."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()
        self._highest = 0.0
        self._at = 0.0

    def observe(self, now: float, total: float) -> float:
        """Take in the counter at the instant `now` in seconds. Returns the speed."""
        self._samples.append((now, total))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_S:
            self._samples.popleft()
        began, before = self._samples[0]
        decayed = self._highest * 0.5 ** ((now - self._at) / _HALF_LIFE_S)
        measured = (total - before) / (now - began) if now - began >= _WINDOW_S else 0.0
        self._highest, self._at = max(decayed, measured), now
        return self._highest if self._highest >= _SLOWEST else 0.0


class RecentRate:
    """Amounts per second, as an exponentially weighted mean over the last `span_s` seconds."""

    def __init__(self, span_s: float = 30.0) -> None:
        self._span_s = span_s
        self._sum = 0.0
        self._at = 0.0

    def add(self, amount: float, now: float) -> None:
        self._sum = self._decayed(now) + amount
        self._at = now

    def value(self, now: float) -> float:
        return self._decayed(now) / self._span_s

    def _decayed(self, now: float) -> float:
        return self._sum * math.exp(-max(0.0, now - self._at) / self._span_s)


class RecentHighest:
    """Stops no more replicas than what was wanted at any moment of the last `span_s` seconds allows.

    Ray stops replicas if fewer were wanted for its whole delay, and as many as the last moment says. A calm last moment
    would stop replicas that are needed again a minute later. The stabilization window of Kubernetes'
    HorizontalPodAutoscaler does the same.
    """

    def __init__(self, span_s: float = 60.0) -> None:
        self._span_s = span_s
        self._wanted: deque[tuple[float, int]] = deque()  # falling numbers, in the order of their times

    def limit(self, wanted: int, target: int, now: float) -> int:
        """The number of replicas to ask for, if `wanted` are wanted now and `target` is the present number."""
        while self._wanted and self._wanted[-1][1] <= wanted:
            self._wanted.pop()
        self._wanted.append((now, wanted))
        while len(self._wanted) > 1 and self._wanted[0][0] <= now - self._span_s:
            self._wanted.popleft()
        # It stays below `target`, so that Ray's delay counts from the first moment at which fewer were wanted.
        return max(wanted, min(self._wanted[0][1], target - 1))
