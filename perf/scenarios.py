"""The scenarios: which levels of load each puts on the server, and what is learnt from them together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from random import Random
from typing import Protocol

from perf import figures, load, machine, server
from perf.client import Client
from perf.gate import Gate, Measured, Window
from perf.records import Record
from perf.results import BatchAdvice, FindMax, Load, Probe, Scenario, Stage, Tokens
from perf.search import Hope, Limit, find_max
from perf.settings import Settings
from perf.slo import Slo
from perf.workload import Ask, Workload

# More than the most tok/s by this share is not worth a larger batch.
_WORTH = 0.9
_PROBE_S = 10.0
# A queue that grows takes time to be seen.
_RATE_S = 10.0
_HIGHEST_RATE = 2000.0


class Progress(Protocol):
    """Is shown every load while it runs, and every stage when it is done."""

    def running(self, name: str, gate: Gate) -> None: ...

    def ended(self, stage: Stage) -> None: ...


@dataclass(frozen=True)
class Level:
    name: str
    load: Load
    window: Window
    together: int  # requests under way at a time, about


@dataclass
class Bench:
    """Runs scenarios one after the other and keeps what they found."""

    client: Client
    settings: Settings
    progress: Progress
    stages: list[Stage] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    find_max: FindMax | None = None
    batch_advice: BatchAdvice | None = None

    async def run(self) -> None:
        for scenario in self.settings.scenarios:
            await self._scenario(scenario)

    async def _scenario(self, scenario: Scenario) -> None:
        async with self._reconciled(scenario):
            match scenario:
                case "single":
                    one = Load(loop="closed", arrival="closed", concurrency=1, streaming=False)
                    await self._levels(scenario, [Level("one at a time", one, self.settings.window(1), 1)])
                case "streaming":
                    one = Load(loop="closed", arrival="closed", concurrency=1)
                    await self._levels(scenario, [Level("one at a time", one, self.settings.window(1), 1)])
                case "concurrency":
                    await self._levels(scenario, [self._streams(count) for count in self.settings.concurrency])
                    self._scale(scenario, lambda stage: stage.load.concurrency or 1)
                case "rate":
                    await self._levels(scenario, self._rates())
                case "batch":
                    await self._levels(scenario, [self._batch(size, 2) for size in self.settings.batch_sizes])
                    self._scale(scenario, lambda stage: 1)
                case "batch-profile":
                    await self._levels(scenario, [self._batch(size, 1) for size in self.settings.profile_sizes])
                    self._scale(scenario, lambda stage: 1)
                    self.batch_advice = advice([s for s in self.stages if s.scenario == scenario])
                case "find-max":
                    await self._search()

    def _streams(self, count: int) -> Level:
        asked = Load(loop="closed", arrival="closed", concurrency=count)
        return Level(f"{count} stream{'s' * (count > 1)}", asked, self.settings.window(count), count)

    def _batch(self, size: int, share: int) -> Level:
        asked = Load(loop="closed", arrival="closed", concurrency=1, batch_size=size, streaming=False)
        window = self.settings.window(1, max(3, self.settings.num_requests // share))
        return Level(f"{size} prompt{'s' * (size > 1)}", asked, window, 1)

    def _rates(self) -> list[Level]:
        settings = self.settings
        if settings.arrival == "trace":
            span_s = settings.trace[-1].at_s
            mean = len(settings.trace) / span_s if span_s else None
            whole = Window(requests=len(settings.trace), warmup=0, hold=False)
            return [Level("trace", Load(loop="open", arrival="trace", rate=mean), whole, 1)]
        return [self._rate(rate) for rate in settings.rates]

    def _rate(self, rate: float) -> Level:
        asked = Load(loop="open", arrival=self.settings.arrival, rate=rate)
        together = min(64, max(2, round(rate)))
        window = self.settings.window(together, max(self.settings.num_requests, round(rate * _RATE_S)))
        if asked.arrival == "ramp":  # its beginning is part of it
            window = Window(None, self.settings.duration_s or 60.0, warmup=0)
        return Level(f"{rate:.4g}/s {asked.arrival}", asked, window, together)

    async def _levels(self, scenario: Scenario, levels: Sequence[Level]) -> None:
        """All of them, and all again for every repeat: a machine that changes its pace does so for every level."""
        found: dict[str, list[Measured]] = {level.name: [] for level in levels}
        watches = {level.name: machine.Watch() for level in levels}
        for repeat in range(self.settings.repeats):
            for level in levels:
                async with watches[level.name]:
                    found[level.name].append(await self._measure(scenario, level, repeat))
        for level in levels:
            seen = watches[level.name].resources()
            stage = figures.stage(scenario, level.name, level.load, found[level.name], seen, self.settings.slo)
            self._keep(stage)

    async def _measure(
        self, scenario: Scenario, level: Level, repeat: int, watch: Callable[[Gate, Record], None] | None = None
    ) -> Measured:
        name = f"{scenario}: {level.name}" + (f", repeat {repeat + 1}" if self.settings.repeats > 1 else "")
        gate = Gate(level.window, level.together, watch=watch)
        self.progress.running(name, gate)
        asks = self._asks(f"{scenario} {level.name} {repeat}", level.load)
        if level.load.loop == "closed":
            measured = await load.closed(self.client, gate, asks, level.load.concurrency or 1)
        else:
            schedule = self.settings.schedule(level.load, f"{level.name} {repeat}")
            measured = await load.opened(self.client, gate, asks, schedule)
        self._everybody.append(measured)
        return measured

    def _asks(self, part: str, asked: Load) -> Iterator[Ask]:
        settings = self.settings
        workload = Workload(settings.prompt_words, settings.max_tokens, settings.seed, settings.prompt, settings.salt)
        if asked.arrival != "trace":
            return workload.asks(part, asked.batch_size, asked.streaming)
        rng = Random(f"{settings.seed} {part}")
        traced = (Ask((workload.prompt(rng, one.prompt_words),), one.max_tokens) for one in settings.trace)
        return chain(traced, workload.asks(part))

    def _keep(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.progress.ended(stage)

    def _scale(self, scenario: Scenario, width: Callable[[Stage], int]) -> None:
        """Tokens a second over those of the scenario's smallest level, for so many times its width."""
        first = next(stage for stage in self.stages if stage.scenario == scenario)
        for index, stage in enumerate(self.stages):
            if stage.scenario == scenario and first.tokens_per_s:
                ratio = stage.tokens_per_s / first.tokens_per_s * width(first) / width(stage)
                self.stages[index] = stage.model_copy(update={"efficiency": ratio})

    @asynccontextmanager
    async def _reconciled(self, scenario: Scenario) -> AsyncIterator[None]:
        """What both sides counted meanwhile."""
        self._everybody: list[Measured] = []
        before = await server.read(self.client)
        yield
        records = [record for measured in self._everybody for record in measured.everybody]
        tokens = sum(record.tokens if record.ok else sum(record.events) for record in records)
        requests = sum(record.prompts for record in records if record.sent is not None)
        after = await server.read_after(self.client, before, tokens) if before is not None else None
        counted = after.since(before) if after is not None and before is not None else None
        if counted is not None and min(counted.values()) < 0:  # it was restarted, or a part of it is gone
            counted = None
        self.tokens.append(
            Tokens(
                scenario=scenario,
                client=tokens,
                server=round(counted["tokens"]) if counted is not None else None,
                client_requests=requests,
                server_requests=round(counted["requests"]) if counted is not None and "requests" in counted else None,
                server_metrics=_server_metrics(counted) if counted is not None else {},
            )
        )

    async def _search(self) -> None:
        settings = self.settings
        assert settings.slo is not None
        if settings.arrival == "closed":
            self.find_max = await find_max("concurrency", settings.slo, 1, load.MAX_IN_FLIGHT, self._probe_streams)
        else:
            start = await self._estimate()
            self.find_max = await find_max("rate", settings.slo, start, _HIGHEST_RATE, self._probe_rate)

    async def _estimate(self) -> float:
        """Requests a second that a few streams get, near which the search begins."""
        level = self._streams(8)
        level = Level("estimate", level.load, Window(requests=16, warmup_limit_s=3), 8)
        measured = await self._measure("find-max", level, 0)
        return max(figures.stage("find-max", "estimate", level.load, [measured]).requests_per_s, 0.1)

    async def _probe_streams(self, at: float) -> tuple[Probe, Limit]:
        level = self._streams(round(at))
        requests = max(self.settings.num_requests, 3 * level.together)
        return await self._probe(
            at, Level(level.name, level.load, self._probe_window(requests), level.together), requests
        )

    async def _probe_rate(self, at: float) -> tuple[Probe, Limit]:
        level = self._rate(at)
        duration_s = self.settings.duration_s or max(_PROBE_S, self.settings.num_requests / at)
        requests = max(1, round(at * duration_s))
        return await self._probe(
            at, Level(level.name, level.load, self._probe_window(requests), level.together), requests
        )

    def _probe_window(self, requests: int) -> Window:
        return Window(requests=requests, warmup=self.settings.warmup, warmup_limit_s=3)

    async def _probe(self, at: float, level: Level, planned: int) -> tuple[Probe, Limit]:
        """Ends as soon as the SLO cannot be met any more."""
        slo = self.settings.slo
        assert slo is not None
        hope = Hope(slo, planned, asyncio.get_running_loop().time)
        measured = await self._measure("find-max", level, 0, hope.ended)
        stage = figures.stage("find-max", level.name, level.load, [measured], None, slo)
        self._keep(stage)
        return judged(at, stage, measured, slo)


def judged(at: float, stage: Stage, measured: Measured, slo: Slo) -> tuple[Probe, Limit]:
    """Whether a load was carried within the SLO by a server that was asked as it should be; and if not, what broke.

    A server that misses it even from when it was asked is the one that broke, however late the client was.
    """
    missed = stage.missed
    limit: Limit = "none"
    if stage.client.limited and not slo.missed(measured.records, service=True):
        limit = "client"
    elif stage.errors:
        limit = "errors"
    elif missed:
        limit = "queue" if all(sentence.startswith("ttft") for sentence in missed) else "latency"
    why = "; ".join(
        (stage.client.limited if limit == "client" else missed) or ([f"errors: {stage.errors}"] if stage.errors else [])
    )
    told = {
        f"{bound.quantity}_p{bound.percentile:g}_ms": value * 1e3
        for bound in slo.bounds
        if (value := bound.measured(measured.records)) is not None and value != float("inf")
    }
    return Probe(
        at=at, met=limit == "none", why=why or "met", measured={**told, "tokens_per_s": stage.tokens_per_s}
    ), limit


def advice(stages: Sequence[Stage]) -> BatchAdvice | None:
    """The smallest batch that has nearly all of the tokens a second there are to have within the SLO."""
    usable = [stage for stage in stages if stage.finished]
    usable = [stage for stage in usable if not stage.missed] or usable[:1]
    if not usable:
        return None
    most = max(usable, key=lambda stage: stage.tokens_per_s)
    chosen = next(stage for stage in usable if stage.tokens_per_s >= _WORTH * most.tokens_per_s)
    size = chosen.load.batch_size
    share = chosen.tokens_per_s / most.tokens_per_s
    reason = f"{chosen.name} a call make {chosen.tokens_per_s:.0f} tok/s"
    if chosen is not most:
        reason += f", {share:.0%} of what {most.name} make"
    if chosen is most and most is usable[-1] and len(usable) > 1:
        reason += ", the most of all sizes tried: a larger one may make more"
    if chosen.e2e_ms is not None and most.e2e_ms is not None and chosen is not most:
        reason += f", and a call takes {chosen.e2e_ms.p50 / 1e3:.2f} s instead of {most.e2e_ms.p50 / 1e3:.2f} s"
    return BatchAdvice(recommended=size, reason=reason)


def _server_metrics(counted: dict[str, float]) -> dict[str, float]:
    """The differences, and the means that they make."""
    told = dict(counted)
    ratios = (("mean_batch", "rows", "steps"), ("step_ms", "busy_s", "steps"), ("queue_ms", "queue_s", "queued"))
    for name, above, below in ratios:
        if counted.get(below):
            told[name] = counted[above] / counted[below] * (1e3 if name.endswith("_ms") else 1)
    if counted.get("prompt_tokens") and "cached_prompt_tokens" in counted:
        told["cached_share"] = counted["cached_prompt_tokens"] / counted["prompt_tokens"]
    return {name: round(value, 4) for name, value in told.items()}
