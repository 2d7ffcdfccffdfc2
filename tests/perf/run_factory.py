"""Builds runs in the format of perf.suite from given latencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from perf.metrics import PERCENTILES
from perf.results import Client, Distribution, Load, Machine, Run, Samples, Stage, Target, Verdict

Ms = Sequence[float | None]
CLOSED = Load(loop="closed", arrival="closed", concurrency=8)


def distribution(ms: Ms) -> Distribution | None:
    values = [value for value in ms if value is not None]
    if not values:
        return None
    percentiles = dict(zip(PERCENTILES, np.percentile(values, list(PERCENTILES.values())), strict=True))
    return Distribution(count=len(values), mean=float(np.mean(values)), min=min(values), max=max(values), **percentiles)


def stage(
    ttft_ms: Ms,
    *,
    repeats: int = 1,
    name: str = "8 streams",
    tpot_ms: Ms | None = None,
    e2e_ms: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    tokens_per_s: float = 100.0,
    errors: dict[str, int] | None = None,
    limited: Sequence[str] = (),
    **fields: Any,
) -> Stage:
    """A stage whose requests are split evenly into `repeats` repeats and are due every 0.1 s."""
    count = len(ttft_ms)
    tpot_ms = [None] * count if tpot_ms is None else tpot_ms
    e2e = [1000.0] * count if e2e_ms is None else list(e2e_ms)
    tokens = [10] * count if tokens is None else tokens
    per_repeat = -(-count // repeats)
    samples = Samples(
        repeat=[number // per_repeat for number in range(count)],
        due_s=[number % per_repeat * 0.1 for number in range(count)],
        ttft_ms=list(ttft_ms),
        tpot_ms=list(tpot_ms),
        e2e_ms=e2e,
        service_ms=e2e,
        longest_gap_ms=[None] * count,
        tokens=list(tokens),
    )
    failed = sum((errors or {}).values())
    defaults: dict[str, Any] = {
        "scenario": "concurrency",
        "name": name,
        "load": CLOSED,
        "repeats": repeats,
        "warmup_requests": 8,
        "steady": True,
        "window_s": 10.0,
        "requests": count + failed,
        "finished": count,
        "errors": errors or {},
        "tokens": sum(tokens),
        "prompt_tokens": count,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_by_repeat": rates(samples),
        "requests_per_s": 10.0,
        "ttft_ms": distribution(ttft_ms),
        "tpot_ms": distribution(tpot_ms),
        "e2e_ms": distribution(e2e),
        "client": Client(
            cpu=0.1, schedule_delay_p50_ms=0.1, schedule_delay_p99_ms=1, loop_lag_p99_ms=1, limited=list(limited)
        ),
        "samples": samples,
    }
    return Stage(**(defaults | fields))


def rates(samples: Samples) -> list[float]:
    """Throughput of each repeat: its tokens over the time until its last response ended."""
    rows = list(zip(samples.repeat, samples.due_s, samples.e2e_ms, samples.tokens, strict=True))
    found = []
    for number in sorted(set(samples.repeat)):
        own = [row for row in rows if row[0] == number]
        found.append(sum(row[3] for row in own) / max(row[1] + row[2] / 1e3 for row in own))
    return found


def run(*stages: Stage, **fields: Any) -> Run:
    defaults: dict[str, Any] = {
        "tool": "serve_app perf 1.0",
        "started_at": "2026-11-27T06:00:00Z",
        "seconds": 60.0,
        "command": ["python", "-m", "perf.suite"],
        "commit": "a" * 40,
        "settings": {"max_tokens": 64, "seed": 7},
        "target": target(),
        "machine": Machine(processor="Zen 5", cores=2, memory_gib=24, gpus=[], system="Linux", python="3.11"),
        "slo": None,
        "stages": list(stages),
        "verdict": Verdict(sentences=[], recommendations=[], exit_code=0),
    }
    return Run(**(defaults | fields))


def target(api: Literal["native", "openai", "tgi"] = "native", model: str = "smollm2-135m") -> Target:
    return Target(
        url="http://localhost:8000", api=api, model=model, server="serve_app", on_this_machine=True, fixed_length=True
    )
