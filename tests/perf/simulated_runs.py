"""Runs in the format of the suite from a simulated server, reproducible by their seed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from perf.aggregate import build_stage
from perf.phases import Measurement
from perf.records import Record
from perf.results import (
    BatchAdvice,
    Cost,
    FindMax,
    Load,
    Machine,
    Probe,
    Resources,
    Run,
    Scenario,
    Stage,
    Target,
    Tokens,
    Verdict,
)
from perf.slo import Slo

SLO = "ttft_p95<250ms,tpot_p95<40ms"
HOSTILE = (
    "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>'\"`|&]]>\x00\x1b[31m\u202e"
)
ERRORS = ("http 429", "timeout", "connection reset")


class Server:
    """TTFT and gaps grow with the number of requests in flight."""

    def __init__(self, seed: int, streaming: bool, tokens: int = 32, error_every: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.streaming = streaming
        self.tokens = tokens
        self.error_every = error_every
        self.served = 0

    def respond(self, record: Record, at: float, busy: float) -> None:
        self.served += 1
        record.sent = at
        first = at + float(self.random.gamma(9, (18 + 6 * busy) / 9)) / 1e3
        if self.error_every and self.served % self.error_every == 0:
            record.error, record.done = ERRORS[(self.served // self.error_every) % 4 % 3], at + 0.03
            return
        record.prompt_tokens = 24 * record.prompts
        record.tokens = (self.tokens - int(self.random.integers(0, 4))) * record.prompts
        gaps = self.random.gamma(25, (8 + 0.7 * busy * record.prompts**0.5) / 25 / 1e3, record.tokens // record.prompts)
        arrivals = first + np.concatenate([[0.0], np.cumsum(gaps[1:])])
        if self.streaming:
            record.chunks, record.events = array("d", arrivals), array("I", [1] * len(arrivals))
        record.done = float(arrivals[-1]) + 0.0004


def closed(server: Server, streams: int, requests: int, prompts: int = 1) -> list[Record]:
    """Each stream sends its next request after its response."""
    free = [0.0001 * number for number in range(streams)]
    records = []
    for _ in range(requests):
        stream = free.index(min(free))
        record = Record(due=free[stream], prompts=prompts)
        server.respond(record, record.due + 0.0002, streams)
        free[stream] = (record.done or record.due + 0.05) + 0.0003
        records.append(record)
    return records


def scheduled(server: Server, rate: float, requests: int) -> list[Record]:
    """Poisson arrivals; one request in fifty is sent late."""
    due = np.cumsum(server.random.exponential(1 / rate, requests))
    records = [Record(due=float(at)) for at in due]
    busy: list[float] = []
    for number, record in enumerate(records):
        sent = record.due + (0.006 if number % 50 == 49 else 0.0003)
        busy = [done for done in busy if done > sent]
        server.respond(record, sent, 1 + len(busy))
        busy.append(record.done or sent)
    return records


def stage(scenario: Scenario, name: str, load: Load, records: list[Record], slo: str | None) -> Stage:
    """Aggregated as by the suite."""
    window_s = max(record.done or 0.0 for record in records)
    repeat = Measurement(
        0.0, window_s, 0.21 * window_s, warmup_requests=4, records=records, all_records=records, lags=[(0.1, 0.0008)]
    )
    seen = Resources(cpu_percent=71.5, memory_mib=2411.0)
    return build_stage(scenario, name, load, [repeat], seen, Slo.parse(slo) if slo else None)


def with_efficiency(stages: Sequence[Stage]) -> list[Stage]:
    base = stages[0].tokens_per_s
    ratios = [(stage.load.concurrency or 1) / (stages[0].load.concurrency or 1) for stage in stages]
    return [
        stage.model_copy(update={"efficiency": stage.tokens_per_s / base / ratio})
        for stage, ratio in zip(stages, ratios, strict=True)
    ]


def run(
    seed: int = 7,
    *,
    requests: int = 60,
    scenarios: Sequence[str] = ("single", "batch", "streaming", "concurrency"),
    slo: str | None = SLO,
    errors: bool = False,
    client_limited: bool = False,
    streaming: bool = True,
    open_loop: bool = False,
    batch_profile: bool = False,
    find_max: bool = False,
    cost: bool = False,
    hostile: bool = False,
    bare: bool = False,
) -> Run:
    """`requests`: per stage. `bare` leaves out all optional values."""
    names = [*scenarios, *(["rate"] if open_loop else []), *(["batch-profile"] if batch_profile else [])]
    stages = [one for scenario in names for one in stages_of(scenario, seed, requests, slo, errors, streaming)]
    if client_limited:
        reasons = ["1 % of the requests were sent 48 ms late or more", "the client used 93% of a core"]
        stages[-1] = stages[-1].model_copy(update={"client": stages[-1].client.model_copy(update={"limited": reasons})})
    result = Run(
        tool="perf.suite 1.0.0",
        started_at="2026-03-14T09:26:53Z",
        seconds=sum(stage.window_s for stage in stages),
        command=["python", "-m", "perf.suite", "--url", "http://localhost:8000", "--seed", str(seed)],
        commit="3f2c9d1",
        settings={"seed": seed, "prompt": "The future of AI is", "max_tokens": 32, "repeats": 1},
        target=Target(
            url="http://localhost:8000",
            api="native",
            model="smollm2-135m",
            server="serve_app 0.9.0",
            on_this_machine=True,
            fixed_length=True,
        ),
        machine=Machine(
            processor="AMD EPYC 9R14", cores=2, memory_gib=7.6, gpus=[], system="Linux 6.12", python="3.11.7"
        ),
        slo=slo,
        stages=stages,
        tokens=[] if bare else _counted(stages),
        find_max=_search(slo) if find_max else None,
        batch_advice=_advice() if batch_profile else None,
        cost=_cost(stages[-1]) if cost else None,
        verdict=_verdict(stages, errors, client_limited),
    )
    result = _bare(result) if bare else result
    return _hostile(result) if hostile else result


@cache
def stages_of(scenario: str, seed: int, requests: int, slo: str | None, errors: bool, streaming: bool) -> list[Stage]:
    def server(step: int, stream: bool = streaming) -> Server:
        return Server(seed + step, stream, error_every=9 if errors and step else 0)

    def streams(count: int, stream: bool = streaming) -> Load:
        return Load(loop="closed", arrival="closed", concurrency=count, streaming=stream)

    match scenario:
        case "single":
            records = closed(server(0, False), 1, min(requests, 12))
            return [stage("single", "1 request", streams(1, False), records, None)]
        case "streaming":
            return [stage("streaming", "1 stream", streams(1), closed(server(0), 1, min(requests, 40)), slo)]
        case "batch" | "batch-profile":
            kind: Scenario = "batch" if scenario == "batch" else "batch-profile"
            loads = [
                Load(loop="closed", arrival="closed", concurrency=1, batch_size=n, streaming=False)
                for n in (1, 4, 8, 16)
            ]
            rows = [
                stage(kind, f"{n} prompts" if n > 1 else "1 prompt", load, closed(server(n, False), 1, 6, n), None)
                for n, load in zip((1, 4, 8, 16), loads, strict=True)
            ]
            return [row.model_copy(update={"efficiency": row.tokens_per_s / rows[0].tokens_per_s}) for row in rows]
        case "concurrency":
            levels = (1, 2, 4, 8, 16, 32)
            rows = [
                stage(
                    "concurrency",
                    f"{n} streams" if n > 1 else "1 stream",
                    streams(n),
                    closed(server(n), n, requests),
                    slo,
                )
                for n in levels
            ]
            return with_efficiency(rows)
        case _:
            rates = (2.0, 4.0, 8.0, 16.0)
            loads = [Load(loop="open", arrival="poisson", rate=rate, streaming=streaming) for rate in rates]
            return [
                stage("rate", f"{rate:g}/s poisson", load, scheduled(server(int(rate)), rate, requests), slo)
                for rate, load in zip(rates, loads, strict=True)
            ]


def _counted(stages: Sequence[Stage]) -> list[Tokens]:
    """In the last scenario the server counted seven more tokens."""
    found = []
    scenarios = list(dict.fromkeys(stage.scenario for stage in stages))
    for scenario in scenarios:
        rows = [stage for stage in stages if stage.scenario == scenario]
        tokens, requests = sum(stage.tokens for stage in rows), sum(stage.requests for stage in rows)
        found.append(
            Tokens(
                scenario=scenario,
                client=tokens,
                server=tokens + (7 if scenario == scenarios[-1] and len(scenarios) > 1 else 0),
                client_requests=requests,
                server_requests=requests,
                server_metrics={"serve_app_batch_rows_mean": 6.4, "serve_app_preemptions_total": 0.0},
            )
        )
    return found


def _search(slo: str | None) -> FindMax:
    loads = [
        (4.0, True),
        (8.0, True),
        (16.0, True),
        (32.0, False),
        (24.0, False),
        (20.0, True),
        (22.0, False),
        (21.0, True),
    ]
    probes = [
        Probe(
            at=at,
            met=met,
            why="all bounds are met" if met else f"ttft_p95 is {at * 13:.4g} ms, not below 250 ms",
            measured={"ttft_p95_ms": at * 11.4, "tpot_p95_ms": 12 + at, "tokens_per_s": at * 30},
        )
        for at, met in loads
    ]
    return FindMax(of="rate", slo=slo or SLO, best=21.0, broke_at=22.0, limit="queue", probes=probes)


def _advice() -> BatchAdvice:
    return BatchAdvice(recommended=8, reason="Throughput rises by 6 % from 8 to 16 prompts, and latency by 71 %.")


def _cost(stage: Stage) -> Cost:
    return Cost(
        instance_type="c7a.large",
        provider="aws",
        usd_per_hour=0.10264,
        as_of="2026-02-01",
        tokens_per_s=stage.tokens_per_s,
        stage=f"{stage.scenario}, {stage.name}",
        usd_per_million_output_tokens=0.10264 / stage.tokens_per_s / 3600 * 1e6,
        usd_per_thousand_requests=0.10264 / stage.requests_per_s / 3600 * 1e3,
    )


def _verdict(stages: Sequence[Stage], errors: bool, client_limited: bool) -> Verdict:
    best = max(stages, key=lambda stage: stage.tokens_per_s)
    sentences = [
        f"16 concurrent streams meet the objective; at 32 the first token takes too long. "
        f"The highest throughput is {best.tokens_per_s:.0f} tokens/s, at {best.name}.",
        "The queue is the limit: prompts wait for earlier ones.",
    ]
    advice = ["Use two replicas for twice the streams.", "Try prefix caching: it skips the prefill of shared prefixes."]
    if client_limited:
        reasons = [f"{stages[-1].scenario}, {stages[-1].name}: the client was the bottleneck"]
        return Verdict(sentences=sentences, recommendations=advice, exit_code=4, reasons=reasons)
    if errors:
        failed = sum(sum(stage.errors.values()) for stage in stages)
        return Verdict(sentences=sentences, recommendations=advice, exit_code=1, reasons=[f"{failed} requests failed"])
    return Verdict(sentences=sentences, recommendations=advice, exit_code=0)


def _bare(result: Run) -> Run:
    stripped: dict[str, Any] = {
        "timeline": [],
        "resources": None,
        "goodput": None,
        "missed": [],
        "efficiency": None,
        "itl_ms": None,
        "itl_quantiles_ms": [],
        "tokens_per_chunk": None,
    }
    verdict = Verdict(sentences=["All requests finished."], recommendations=[], exit_code=0)
    stages = [stage.model_copy(update=stripped) for stage in result.stages]
    return result.model_copy(update={"stages": stages, "verdict": verdict, "commit": None, "slo": None})


def _hostile(result: Run) -> Run:
    """All texts that come from outside contain markup and control characters."""
    stages = [
        stage.model_copy(
            update={
                "name": f"{stage.name} {HOSTILE}",
                "errors": {HOSTILE: 2, f"=1+1 {HOSTILE}": 1},
                "client": stage.client.model_copy(update={"limited": [HOSTILE]}),
            }
        )
        for stage in result.stages
    ]
    target = result.target.model_copy(update={"url": HOSTILE, "model": HOSTILE, "server": HOSTILE})
    machine = result.machine.model_copy(update={"processor": HOSTILE, "gpus": [HOSTILE], "system": HOSTILE})
    verdict = {"sentences": [HOSTILE], "recommendations": [HOSTILE], "reasons": [HOSTILE], "exit_code": 1}
    return result.model_copy(
        update={
            "stages": stages,
            "target": target,
            "machine": machine,
            "verdict": result.verdict.model_copy(update=verdict),
            "command": ["python", "-m", "perf.suite", "--prompt", HOSTILE],
            "commit": HOSTILE,
            "settings": {HOSTILE: HOSTILE, "nested": {"prompt": HOSTILE}},
            "tokens": [row.model_copy(update={"server_metrics": {HOSTILE: 1.0}}) for row in result.tokens],
            "tool": HOSTILE,
            "started_at": HOSTILE,
        }
    )
