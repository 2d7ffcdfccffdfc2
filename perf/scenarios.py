"""Runs the scenarios: the load levels of each, and the results that need several levels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from random import Random
from typing import Protocol

from perf import load, machine, server
from perf.aggregate import build_stage
from perf.client import Client
from perf.phases import Measurement, PhaseController, Window
from perf.records import Record
from perf.results import BatchAdvice, FindMax, Load, Probe, Scenario, Stage, Tokens
from perf.search import EarlyStop, Limit, find_max
from perf.settings import Settings
from perf.slo import Slo
from perf.workload import Request, Workload

# The advice is the smallest batch that has at least this share of the highest throughput.
_SUFFICIENT_THROUGHPUT = 0.9
_PROBE_S = 10.0
# Minimum length of a rate level: a growing queue needs time to show.
_RATE_S = 10.0
_HIGHEST_RATE = 2000.0


class Progress(Protocol):
    """Receives each load when it starts and each stage when it is complete."""

    def running(self, name: str, controller: PhaseController) -> None: ...

    def ended(self, stage: Stage) -> None: ...


@dataclass(frozen=True)
class Level:
    name: str
    load: Load
    window: Window
    concurrency: int  # approximate number of requests in flight


@dataclass
class ScenarioRunner:
    """Runs the scenarios of the settings in order and collects their results."""

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
        async with self._compare_token_counts(scenario):
            match scenario:
                case "single":
                    one = Load(loop="closed", arrival="closed", concurrency=1, streaming=False)
                    await self._levels(scenario, [Level("one at a time", one, self.settings.window(1), 1)])
                case "streaming":
                    one = Load(loop="closed", arrival="closed", concurrency=1)
                    await self._levels(scenario, [Level("one at a time", one, self.settings.window(1), 1)])
                case "concurrency":
                    await self._levels(scenario, [self._streams(count) for count in self.settings.concurrency])
                    self._set_efficiency(scenario, lambda stage: stage.load.concurrency or 1)
                case "rate":
                    await self._levels(scenario, self._rates())
                case "batch":
                    await self._levels(scenario, [self._batch(size, 2) for size in self.settings.batch_sizes])
                    self._set_efficiency(scenario, lambda stage: 1)
                case "batch-profile":
                    await self._levels(scenario, [self._batch(size, 1) for size in self.settings.profile_sizes])
                    self._set_efficiency(scenario, lambda stage: 1)
                    self.batch_advice = advice([s for s in self.stages if s.scenario == scenario])
                case "find-max":
                    await self._search()

    def _streams(self, count: int) -> Level:
        closed = Load(loop="closed", arrival="closed", concurrency=count)
        return Level(f"{count} stream{'s' * (count > 1)}", closed, self.settings.window(count), count)

    def _batch(self, size: int, divisor: int) -> Level:
        closed = Load(loop="closed", arrival="closed", concurrency=1, batch_size=size, streaming=False)
        window = self.settings.window(1, max(3, self.settings.num_requests // divisor))
        return Level(f"{size} prompt{'s' * (size > 1)}", closed, window, 1)

    def _rates(self) -> list[Level]:
        settings = self.settings
        if settings.arrival == "trace":
            span_s = settings.trace[-1].at_s
            mean = len(settings.trace) / span_s if span_s else None
            window = Window(requests=len(settings.trace), warmup=0, cooldown=False)
            return [Level("trace", Load(loop="open", arrival="trace", rate=mean), window, 1)]
        return [self._rate(rate) for rate in settings.rates]

    def _rate(self, rate: float) -> Level:
        open_load = Load(loop="open", arrival=self.settings.arrival, rate=rate)
        concurrency = min(64, max(2, round(rate)))
        window = self.settings.window(concurrency, max(self.settings.num_requests, round(rate * _RATE_S)))
        if open_load.arrival == "ramp":  # the start of the ramp is part of the measurement
            window = Window(None, self.settings.duration_s or 60.0, warmup=0)
        return Level(f"{rate:.4g}/s {open_load.arrival}", open_load, window, concurrency)

    async def _levels(self, scenario: Scenario, levels: Sequence[Level]) -> None:
        """Runs all levels once per repeat, so that drift of the machine's speed affects all levels alike."""
        measurements: dict[str, list[Measurement]] = {level.name: [] for level in levels}
        monitors = {level.name: machine.ResourceMonitor() for level in levels}
        for repeat in range(self.settings.repeats):
            for level in levels:
                async with monitors[level.name]:
                    measurements[level.name].append(await self._measure(scenario, level, repeat))
        for level in levels:
            resources = monitors[level.name].resources()
            repeats = measurements[level.name]
            self._add(build_stage(scenario, level.name, level.load, repeats, resources, self.settings.slo))

    async def _measure(
        self,
        scenario: Scenario,
        level: Level,
        repeat: int,
        on_finish: Callable[[PhaseController, Record], None] | None = None,
    ) -> Measurement:
        name = f"{scenario}: {level.name}" + (f", repeat {repeat + 1}" if self.settings.repeats > 1 else "")
        clock = asyncio.get_running_loop().time
        controller = PhaseController(level.window, level.concurrency, clock, on_finish)
        self.progress.running(name, controller)
        requests = self._requests(f"{scenario} {level.name} {repeat}", level.load)
        if level.load.loop == "closed":
            measurement = await load.closed_loop(self.client, controller, requests, level.load.concurrency or 1)
        else:
            schedule = self.settings.schedule(level.load, f"{level.name} {repeat}")
            measurement = await load.open_loop(self.client, controller, requests, schedule)
        self._scenario_measurements.append(measurement)
        return measurement

    def _requests(self, part: str, level_load: Load) -> Iterator[Request]:
        settings = self.settings
        workload = Workload(settings.prompt_words, settings.max_tokens, settings.seed, settings.prompt, settings.salt)
        if level_load.arrival != "trace":
            return workload.requests(part, level_load.batch_size, level_load.streaming)
        rng = Random(f"{settings.seed} {part}")
        traced = (Request((workload.prompt(rng, entry.prompt_words),), entry.max_tokens) for entry in settings.trace)
        return chain(traced, workload.requests(part))

    def _add(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.progress.ended(stage)

    def _set_efficiency(self, scenario: Scenario, width: Callable[[Stage], int]) -> None:
        """Throughput relative to the scenario's smallest level, divided by the ratio of their widths."""
        first = next(stage for stage in self.stages if stage.scenario == scenario)
        for index, stage in enumerate(self.stages):
            if stage.scenario == scenario and first.tokens_per_s:
                ratio = stage.tokens_per_s / first.tokens_per_s * width(first) / width(stage)
                self.stages[index] = stage.model_copy(update={"efficiency": ratio})

    @asynccontextmanager
    async def _compare_token_counts(self, scenario: Scenario) -> AsyncIterator[None]:
        """Adds the tokens that client and server counted inside this context."""
        self._scenario_measurements: list[Measurement] = []
        before = await server.read(self.client)
        yield
        records = [record for measurement in self._scenario_measurements for record in measurement.all_records]
        tokens = sum(record.tokens if record.ok else sum(record.events) for record in records)
        requests = sum(record.prompts for record in records if record.sent is not None)
        after = await server.read_after(self.client, before, tokens) if before is not None else None
        counted = after.since(before) if after is not None and before is not None else None
        if counted is not None and min(counted.values()) < 0:  # the server or one of its replicas was restarted
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
        """Requests per second that 8 streams complete; the search starts there."""
        level = self._streams(8)
        level = Level("estimate", level.load, Window(requests=16, warmup_limit_s=3), 8)
        measurement = await self._measure("find-max", level, 0)
        return max(build_stage("find-max", "estimate", level.load, [measurement]).requests_per_s, 0.1)

    async def _probe_streams(self, streams: float) -> tuple[Probe, Limit]:
        level = self._streams(round(streams))
        return await self._probe(streams, level, max(self.settings.num_requests, 3 * level.concurrency))

    async def _probe_rate(self, rate: float) -> tuple[Probe, Limit]:
        duration_s = self.settings.duration_s or max(_PROBE_S, self.settings.num_requests / rate)
        return await self._probe(rate, self._rate(rate), max(1, round(rate * duration_s)))

    async def _probe(self, at: float, level: Level, requests: int) -> tuple[Probe, Limit]:
        """Stops as soon as the SLO cannot be met any more."""
        slo = self.settings.slo
        assert slo is not None
        window = Window(requests=requests, warmup=self.settings.warmup, warmup_limit_s=3)
        level = Level(level.name, level.load, window, level.concurrency)
        early_stop = EarlyStop(slo, requests, asyncio.get_running_loop().time)
        measurement = await self._measure("find-max", level, 0, early_stop.on_finish)
        stage = build_stage("find-max", level.name, level.load, [measurement], None, slo)
        self._add(stage)
        return evaluate_probe(at, stage, measurement, slo)


def evaluate_probe(at: float, stage: Stage, measurement: Measurement, slo: Slo) -> tuple[Probe, Limit]:
    """Whether the load met the SLO, and if not, the limiting factor.

    The client is the limit only if the server meets the SLO on times that count from sending.
    """
    missed = stage.missed
    limit: Limit = "none"
    if stage.client.limited and not slo.missed(measurement.records, service=True):
        limit = "client"
    elif stage.errors:
        limit = "errors"
    elif missed:
        limit = "queue" if all(sentence.startswith("ttft") for sentence in missed) else "latency"
    reasons = (stage.client.limited if limit == "client" else missed) or (
        [f"errors: {stage.errors}"] if stage.errors else []
    )
    measured = {
        f"{bound.metric}_p{bound.percentile:g}_ms": value * 1e3
        for bound in slo.bounds
        if (value := bound.measured(measurement.records)) is not None and value != float("inf")
    }
    measured["tokens_per_s"] = stage.tokens_per_s
    return Probe(at=at, met=limit == "none", why="; ".join(reasons) or "met", measured=measured), limit


def advice(stages: Sequence[Stage]) -> BatchAdvice | None:
    """The smallest batch with nearly the highest throughput, among the sizes that meet the SLO."""
    usable = [stage for stage in stages if stage.finished]
    usable = [stage for stage in usable if not stage.missed] or usable[:1]
    if not usable:
        return None
    fastest = max(usable, key=lambda stage: stage.tokens_per_s)
    chosen = next(stage for stage in usable if stage.tokens_per_s >= _SUFFICIENT_THROUGHPUT * fastest.tokens_per_s)
    reason = f"{chosen.name} per call: {chosen.tokens_per_s:.0f} tok/s"
    if chosen is not fastest:
        reason += f", {chosen.tokens_per_s / fastest.tokens_per_s:.0%} of the throughput of {fastest.name}"
    if chosen is fastest and fastest is usable[-1] and len(usable) > 1:
        reason += ", the highest of all sizes tried: a larger size may make more"
    if chosen.e2e_ms is not None and fastest.e2e_ms is not None and chosen is not fastest:
        reason += (
            f", and a call takes {chosen.e2e_ms.p50 / 1e3:.2f} s instead of {fastest.e2e_ms.p50 / 1e3:.2f} s (p50)"
        )
    return BatchAdvice(recommended=chosen.load.batch_size, reason=reason)


def _server_metrics(counted: dict[str, float]) -> dict[str, float]:
    """The counter differences and the means computed from them."""
    metrics = dict(counted)
    ratios = (("mean_batch", "rows", "steps"), ("step_ms", "busy_s", "steps"), ("queue_ms", "queue_s", "queued"))
    for name, numerator, denominator in ratios:
        if counted.get(denominator):
            metrics[name] = counted[numerator] / counted[denominator] * (1e3 if name.endswith("_ms") else 1)
    if counted.get("prompt_tokens") and "cached_prompt_tokens" in counted:
        metrics["cached_share"] = counted["cached_prompt_tokens"] / counted["prompt_tokens"]
    return {name: round(value, 4) for name, value in metrics.items()}
