"""The file `engines.json`: all runs of a comparison of engines, and the medians of their rounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from perf.results import Machine, ResultModel, Run, Stage


class Start(ResultModel):
    """Seconds from the start of a server to its first answer."""

    server: str
    round: int
    seconds: float


class TurnResult(ResultModel):
    """The run of one server in one round; with servers that are kept running, at one number of streams."""

    round: int
    server: str
    run: Run


@dataclass(frozen=True)
class Values:
    """Medians over the rounds; latencies in ms. None: not measured."""

    streams: int
    server: str
    tokens_per_s: float | None
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p50: float | None
    tpot_p50: float | None


@dataclass(frozen=True)
class Spread:
    """A value of each round: the median, the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """The first server against `server`: ratio of tok/s, ratio and difference in ms of the TTFT p50."""

    streams: int
    server: str
    throughput: Spread
    ttft_ratio: Spread
    ttft: Spread


class EngineComparison(ResultModel):
    """`versions` are those of the environment. `idle_cpu` is in cores, for servers that are kept running."""

    schema_version: Literal[1] = 1
    started_at: str
    command: list[str]
    commit: str | None
    settings: dict[str, Any]
    machine: Machine
    versions: dict[str, str]
    starts: list[Start]
    idle_cpu: dict[str, float]
    turns: list[TurnResult]

    @property
    def servers(self) -> list[str]:
        return list(dict.fromkeys(turn.server for turn in self.turns))

    @property
    def streams(self) -> list[int]:
        return sorted({stage.load.concurrency or 1 for turn in self.turns for stage in turn.run.stages})

    def stages(self, server: str, streams: int) -> dict[int, Stage]:
        """The measured stage of each round."""
        return {
            turn.round: stage
            for turn in self.turns
            for stage in turn.run.stages
            if turn.server == server and stage.load.concurrency == streams
        }

    def values(self) -> list[Values]:
        return [
            _values(streams, server, list(self.stages(server, streams).values()))
            for streams in self.streams
            for server in self.servers
        ]

    def gaps(self) -> list[Gap]:
        """Of the first server to each other one, for each number of streams that both finished in the same round."""
        first, *others = self.servers
        pairs = [(streams, other) for streams in self.streams for other in others]
        return [gap for streams, other in pairs if (gap := self._gap(first, other, streams))]

    def _gap(self, first: str, other: str, streams: int) -> Gap | None:
        ours, theirs = self.stages(first, streams), self.stages(other, streams)
        both = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in both if b.tokens_per_s]
        ttfts = [(a.ttft_ms.p50, b.ttft_ms.p50) for a, b in both if a.ttft_ms and b.ttft_ms]
        if not ratios or not ttfts:
            return None
        quotients, differences = [a / b for a, b in ttfts], [a - b for a, b in ttfts]
        return Gap(streams, other, _spread(ratios), _spread(quotients), _spread(differences))

    def cautions(self) -> list[str]:
        """Sentences on windows that do not describe the server, each with its rounds."""
        rounds: dict[str, list[int]] = {}
        for turn in self.turns:
            for stage in turn.run.stages:
                for fault in _faults(stage):
                    rounds.setdefault(f"{turn.server}, {stage.name}: {fault}", []).append(turn.round)
        return [f"{sentence} (round {', '.join(map(str, numbers))})" for sentence, numbers in rounds.items()]


def _faults(stage: Stage) -> list[str]:
    """Failed requests, a client that was the bottleneck, and a window that began too early."""
    found = [f"client-limited: {why}" for why in stage.client.limited]
    if stage.failed or not stage.requests:
        kinds = ", ".join(stage.errors) or "none was due"
        found.append(f"{stage.failed} of {stage.requests} requests failed: {kinds}")
    if stage.steady is False:
        found.append("the latency was not steady at the end of the warm-up")
    return found


def _values(streams: int, server: str, stages: list[Stage]) -> Values:
    ttft = [stage.ttft_ms for stage in stages if stage.ttft_ms is not None]
    return Values(
        streams=streams,
        server=server,
        tokens_per_s=_median(stage.tokens_per_s for stage in stages),
        ttft_p50=_median(one.p50 for one in ttft),
        ttft_p95=_median(one.p95 for one in ttft),
        itl_p50=_median(stage.itl_ms.p50 for stage in stages if stage.itl_ms is not None),
        tpot_p50=_median(stage.tpot_ms.p50 for stage in stages if stage.tpot_ms is not None),
    )


def _median(values: Iterable[float]) -> float | None:
    """None without a value."""
    known = list(values)
    return median(known) if known else None


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
