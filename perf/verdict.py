"""Turns the stages of a run into sentences, recommendations and an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from perf.exits import Exit
from perf.results import BatchAdvice, FindMax, Stage, Tokens, Verdict
from perf.stages import errors

# A limit is reached if throughput grows by less than this share per doubling of the streams.
_GROWTH = 0.10
# The queue is the limit if the increase of TTFT is more than this share of it.
_QUEUE_SHARE = 0.5
_LAG_MS = 10.0
# Prompts are the limit if they are more than this share of the rows that the engine computed. A row is one token of a
# prompt or one decoded token, and costs the same computation.
_PREFILL_SHARE = 0.5


class Tuning(NamedTuple):
    """What recommendations may name: options of serve_app, and the present quantization; None is unknown."""

    is_serve_app: bool = True
    quantization: str | None = None


def verdict(
    stages: Sequence[Stage],
    tokens: Sequence[Tokens],
    find_max: FindMax | None,
    batch_advice: BatchAdvice | None,
    tuning: Tuning = Tuning(),  # noqa: B008 - immutable
) -> Verdict:
    loads = [stage for stage in stages if stage.scenario != "find-max"]
    streams = [stage for stage in loads if stage.scenario == "concurrency"]
    limited = [f"{_name(stage)}: {why}" for stage in loads for why in stage.client.limited]
    failed = [f"{_name(stage)}: {missed}" for stage in loads for missed in stage.missed] + _errors(loads)
    failed += [f"{_name(stage)}: no request was due in its window" for stage in loads if not stage.requests]
    if find_max is not None:
        if find_max.limit == "client":
            limited.append("find-max: the client reached its limit before the server")
        elif find_max.best is None:
            failed.append(f"find-max: no load met {find_max.slo}")
    sentences = [
        *_one_stream(loads),
        *_highest_throughput(streams),
        *_slo(streams),
        *_slo([stage for stage in loads if stage.scenario == "rate"]),
        *_rates(loads),
        *_highest_load(find_max),
        *_batches(loads),
        *_token_counts(tokens),
    ]
    advice, limit = _limit(streams, tokens, tuning)
    recommendations = [*advice, *_batch_size(batch_advice), *_unsteady(loads), *_loop_lag(loads)]
    if limited:
        sentences.insert(0, "CLIENT-LIMITED: some metrics describe the client, not the server.")
        recommendations.insert(
            0, "Run the client on another machine or with less load; see `python -m perf.calibrate`."
        )
    elif limit:
        sentences.append(limit)
    code = Exit.CLIENT_LIMITED if limited else Exit.FAILED if failed else Exit.OK
    return Verdict(sentences=sentences, recommendations=recommendations, exit_code=code, reasons=limited + failed)


def _name(stage: Stage) -> str:
    return f"{stage.scenario}, {stage.name}"


def _errors(stages: Sequence[Stage]) -> list[str]:
    kinds = errors(stages)
    if not kinds:
        return []
    counts = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    return [f"{sum(kinds.values())} of {sum(stage.requests for stage in stages)} requests failed: {counts}"]


def _one_stream(stages: Sequence[Stage]) -> list[str]:
    for stage in stages:
        if stage.scenario == "streaming" and stage.ttft_ms is not None and stage.tpot_ms is not None:
            return [
                f"One stream alone: TTFT {stage.ttft_ms.p50:.0f} ms (p95 {stage.ttft_ms.p95:.0f} ms), then "
                f"{1e3 / stage.tpot_ms.p50:.0f} tokens per second."
            ]
    return []


def _highest_throughput(streams: Sequence[Stage]) -> list[str]:
    good = [stage for stage in streams if stage.finished]
    if len(good) < 2:
        return []
    best = max(good, key=lambda stage: stage.tokens_per_s)
    each = f", {1e3 / best.tpot_ms.p50:.0f} per stream" if best.tpot_ms is not None else ""
    ttft = f", TTFT {best.ttft_ms.p50:.0f} ms (p95 {best.ttft_ms.p95:.0f} ms)" if best.ttft_ms is not None else ""
    return [f"Highest throughput: {best.tokens_per_s:.0f} tokens per second with {best.name}{each}{ttft}."]


def _slo(stages: Sequence[Stage]) -> list[str]:
    """Up to which load the SLO is met, and which bound is missed first."""
    evaluated = [stage for stage in stages if stage.goodput is not None]
    if not evaluated or evaluated[0].goodput is None:
        return []
    slo = evaluated[0].goodput.slo
    first = next((stage for stage in evaluated if stage.missed), None)
    if first is None:
        return [f"{slo} is met at every load up to {evaluated[-1].name}."]
    met = evaluated[: evaluated.index(first)]
    until = f"is met up to {met[-1].name} and missed" if met else "is missed"
    share = f"{first.goodput.share:.0%} of the requests met it" if first.goodput is not None else ""
    return [f"{slo} {until} at {first.name}: {first.missed[0]}; {share}."]


def _rates(stages: Sequence[Stage]) -> list[str]:
    return [
        f"{stage.name}: the server finished {stage.requests_per_s:.2f} requests per second; TTFT from the due time was "
        f"{stage.ttft_ms.p50:.0f} ms (p95 {stage.ttft_ms.p95:.0f} ms, p99 {stage.ttft_ms.p99:.0f} ms)."
        for stage in stages
        if stage.scenario == "rate" and stage.ttft_ms is not None
    ]


def _highest_load(found: FindMax | None) -> list[str]:
    if found is None or found.best is None:
        return []
    unit = "requests per second" if found.of == "rate" else "concurrent streams"
    broke = next((probe for probe in reversed(found.probes) if probe.at == found.broke_at), None)
    beyond = f"; at {found.broke_at:.4g}, {broke.why}" if broke is not None else ", the upper end of the search"
    return [f"The highest load that meets {found.slo} is {found.best:.4g} {unit}{beyond}."]


def _batches(stages: Sequence[Stage]) -> list[str]:
    batches = [
        s for s in stages if s.scenario in ("batch", "batch-profile") and s.finished and s.efficiency is not None
    ]
    if len(batches) < 2:
        return []
    best = max(batches, key=lambda stage: stage.efficiency or 0)
    return [f"A call with {best.name} has {best.efficiency:.1f} times the throughput of one with {batches[0].name}."]


def _token_counts(tokens: Sequence[Tokens]) -> list[str]:
    known = [count for count in tokens if count.difference is not None]
    if not known:
        reason = "The server has no known token counter or was restarted: only the client's token count is available."
        return [reason] if tokens else []
    client, difference = sum(count.client for count in known), sum(count.difference or 0 for count in known)
    if difference == 0:
        return [f"Client and server counted the same {client} tokens."]
    return [
        f"The server counted {abs(difference)} tokens {'more' if difference > 0 else 'fewer'} than the client's "
        f"{client}: other clients used the server, or responses were cut short."
    ]


def _limit(streams: Sequence[Stage], tokens: Sequence[Tokens], tuning: Tuning) -> tuple[list[str], str]:
    """Recommendations, and a sentence on the limit: memory, queue, prompts, compute, or none yet."""
    good = [stage for stage in streams if stage.finished]
    if len(good) < 2:
        return [], ""
    last, before = good[-1], good[-2]
    counted = next((count.server_metrics for count in tokens if count.scenario == "concurrency"), {})
    if counted.get("preemptions"):
        return (
            [
                "Raise engine.kv_memory_fraction, lower engine.max_running or max_context, or add memory."
                if tuning.is_serve_app
                else "Give the KV cache more memory, or run fewer sequences at a time."
            ],
            f"Memory was the limit: {counted['preemptions']:.0f} sequences were preempted for lack of KV cache memory.",
        )
    wider = (last.load.concurrency or 1) / (before.load.concurrency or 1)
    growth = last.tokens_per_s / before.tokens_per_s - 1 if before.tokens_per_s else 0.0
    if growth > _GROWTH * (wider - 1):
        more = (last.load.concurrency or 1) * 2
        return [f"More streams still raise the throughput: try --concurrency {more} {more * 2}."], (
            f"No limit was reached: {last.name} made {growth:.0%} more tokens per second than {before.name}."
        )
    if _is_queued(last, before):
        return (
            [
                "Raise engine.max_running if memory allows, or add replicas."
                if tuning.is_serve_app
                else "Let the server run more sequences at a time if memory allows, or add replicas."
            ],
            f"The queue was the limit: with {last.name}, requests waited for a slot while TPOT stayed the same.",
        )
    slower = f"{last.name} made {growth:+.0%} tokens per second compared with {before.name}"
    prefill = _prefill_share(counted)
    if prefill > _PREFILL_SHARE:
        return (
            [
                "More streams do not help. Send shorter prompts, or let prompts begin alike so that the prefix cache "
                f"is used. {_faster(tuning)}"
            ],
            f"The computation of prompts was the limit: {slower}, and {prefill:.0%} of what the engine computed were "
            "tokens of prompts.",
        )
    return [_faster(tuning)], f"Compute was the limit: {slower}."


def _prefill_share(counted: dict[str, float]) -> float:
    """The share of prompt tokens in the computed rows; 0 if the server does not count rows."""
    rows = counted.get("rows", 0.0)
    computed = counted.get("prompt_tokens", 0.0) - counted.get("cached_prompt_tokens", 0.0)
    return min(1.0, computed / rows) if rows else 0.0


def _faster(tuning: Tuning) -> str:
    """How the same work takes less time, without what the server does already."""
    others = "faster hardware or more replicas"
    if tuning.quantization in (None, "none", "", "auto"):
        return f"Try {'quantization: int8' if tuning.is_serve_app else 'quantization'}, {others}."
    return f"The weights are {tuning.quantization} already: try {others}."


def _is_queued(last: Stage, before: Stage) -> bool:
    """Whether TTFT grew while TPOT stayed nearly the same."""
    if last.ttft_ms is None or before.ttft_ms is None or last.tpot_ms is None or before.tpot_ms is None:
        return False
    ttft_increase = last.ttft_ms.p50 - before.ttft_ms.p50
    tpot_increase = last.tpot_ms.p50 / before.tpot_ms.p50 - 1
    return ttft_increase > _QUEUE_SHARE * last.ttft_ms.p50 and tpot_increase < _GROWTH * 2


def _batch_size(advice: BatchAdvice | None) -> list[str]:
    return [] if advice is None else [f"max_batch_size: {advice.recommended}. {advice.reason}."]


def _unsteady(stages: Sequence[Stage]) -> list[str]:
    names = [_name(stage) for stage in stages if stage.steady is False]
    advice = "Give --warmup a larger number of requests, or run without --quick."
    return [f"Latency was not steady at the start of these windows: {'; '.join(names)}. {advice}"] if names else []


def _loop_lag(stages: Sequence[Stage]) -> list[str]:
    lag = max((stage.client.loop_lag_p99_ms for stage in stages), default=0)
    if lag <= _LAG_MS or any(stage.client.limited for stage in stages):
        return []
    return [
        f"Timers of the client were up to {lag:.0f} ms late (p99) because other processes used its cores: run it on "
        "another machine to measure latencies below that."
    ]
