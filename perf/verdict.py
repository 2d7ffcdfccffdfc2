"""What a person is to know of a run, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence

from perf.exits import Exit
from perf.results import BatchAdvice, FindMax, Stage, Tokens, Verdict
from perf.stages import errors

# Twice the streams for less than this share more of tok/s is a limit that was reached.
_GROWTH = 0.10
# A queue that makes up so much of the time to the first token is what a caller waits for.
_QUEUE_SHARE = 0.5
_LAG_MS = 10.0


def verdict(
    stages: Sequence[Stage],
    tokens: Sequence[Tokens],
    find_max: FindMax | None,
    batch_advice: BatchAdvice | None,
    ours: bool = True,
) -> Verdict:
    """`ours`: it is serve_app, whose options can be named."""
    loads = [stage for stage in stages if stage.scenario != "find-max"]
    streams = [stage for stage in loads if stage.scenario == "concurrency"]
    limited = [f"{_name(stage)}: {why}" for stage in loads for why in stage.client.limited]
    failed = [f"{_name(stage)}: {missed}" for stage in loads for missed in stage.missed] + _errors(loads)
    failed += [f"{_name(stage)}: no request was due in its window" for stage in loads if not stage.requests]
    if find_max is not None:
        if find_max.limit == "client":
            limited.append("find-max: the client broke before the server did")
        elif find_max.best is None:
            failed.append(f"find-max: no load met {find_max.slo}")
    sentences = [
        *_alone(loads),
        *_streams(streams),
        *_slo(streams),
        *_slo([stage for stage in loads if stage.scenario == "rate"]),
        *_rates(loads),
        *_found(find_max),
        *_batches(loads),
        *_counted(tokens),
    ]
    advice, limit = _limit(streams, tokens, ours)
    recommendations = [*advice, *_batch_size(batch_advice), *_unsteady(loads), *_late(loads)]
    if limited:
        sentences.insert(0, "CLIENT-LIMITED: some figures are this client's and not the server's.")
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
    told = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    return [f"{sum(kinds.values())} of {sum(stage.requests for stage in stages)} requests failed: {told}"]


def _alone(stages: Sequence[Stage]) -> list[str]:
    for stage in stages:
        if stage.scenario == "streaming" and stage.ttft_ms is not None and stage.tpot_ms is not None:
            return [
                f"Alone, a caller has the first token after {stage.ttft_ms.p50:.0f} ms (p95 {stage.ttft_ms.p95:.0f}), "
                f"then {1e3 / stage.tpot_ms.p50:.0f} tokens a second."
            ]
    return []


def _streams(streams: Sequence[Stage]) -> list[str]:
    good = [stage for stage in streams if stage.finished]
    if len(good) < 2:
        return []
    most = max(good, key=lambda stage: stage.tokens_per_s)
    each = f", {1e3 / most.tpot_ms.p50:.0f} for each" if most.tpot_ms is not None else ""
    wait = (
        f", the first after {most.ttft_ms.p50:.0f} ms (p95 {most.ttft_ms.p95:.0f})" if most.ttft_ms is not None else ""
    )
    return [f"Most: {most.tokens_per_s:.0f} tokens a second with {most.name}{each}{wait}."]


def _slo(stages: Sequence[Stage]) -> list[str]:
    """Up to where it holds, and what breaks there."""
    judged = [stage for stage in stages if stage.goodput is not None]
    if not judged or judged[0].goodput is None:
        return []
    slo, broken = judged[0].goodput.slo, [stage for stage in judged if stage.missed]
    if not broken:
        return [f"{slo} holds at every load that was tried, up to {judged[-1].name}."]
    first = broken[0]
    held = judged[: judged.index(first)]
    upto = f"holds up to {held[-1].name} and" if held else "holds nowhere:"
    share = f"{first.goodput.share:.0%} of the requests met it" if first.goodput is not None else ""
    return [f"{slo} {upto} is missed at {first.name}: {first.missed[0]}; {share}."]


def _rates(stages: Sequence[Stage]) -> list[str]:
    return [
        f"At {stage.name} it finished {stage.requests_per_s:.2f} requests a second; the first token came after "
        f"{stage.ttft_ms.p50:.0f} ms (p95 {stage.ttft_ms.p95:.0f}, p99 {stage.ttft_ms.p99:.0f}) from when it was due."
        for stage in stages
        if stage.scenario == "rate" and stage.ttft_ms is not None
    ]


def _found(found: FindMax | None) -> list[str]:
    if found is None or found.best is None:
        return []
    unit = "requests a second" if found.of == "rate" else "streams at a time"
    broke = next((probe for probe in reversed(found.probes) if probe.at == found.broke_at), None)
    beyond = f"; at {found.broke_at:.4g}, {broke.why}" if broke is not None else ", where the search ends"
    return [f"It carries {found.best:.4g} {unit} within {found.slo}{beyond}."]


def _batches(stages: Sequence[Stage]) -> list[str]:
    batches = [
        s for s in stages if s.scenario in ("batch", "batch-profile") and s.finished and s.efficiency is not None
    ]
    if len(batches) < 2:
        return []
    best = max(batches, key=lambda stage: stage.efficiency or 0)
    return [f"{best.name} in one call make {best.efficiency:.1f} times the tokens a second of {batches[0].name}."]


def _counted(tokens: Sequence[Tokens]) -> list[str]:
    known = [one for one in tokens if one.difference is not None]
    if not known:
        why = "The server has no token counter that is known here, or was restarted: only the client counted."
        return [why] if tokens else []
    client, difference = sum(one.client for one in known), sum(one.difference or 0 for one in known)
    if difference == 0:
        return [f"Client and server counted the same {client} tokens."]
    return [
        f"The server counted {abs(difference)} tokens {'more' if difference > 0 else 'fewer'} than the client's "
        f"{client}: somebody else used it, or answers were cut."
    ]


def _limit(streams: Sequence[Stage], tokens: Sequence[Tokens], ours: bool) -> tuple[list[str], str]:
    """What to try, and which limit was hit: memory, queue, compute, or none yet."""
    good = [stage for stage in streams if stage.finished]
    if len(good) < 2:
        return [], ""
    last, before = good[-1], good[-2]
    counted = next((one.server_metrics for one in tokens if one.scenario == "concurrency"), {})
    if counted.get("preemptions"):
        return (
            [
                "Raise engine.kv_memory_fraction, or lower engine.max_running or max_context; or give it more memory."
                if ours
                else "Give its KV cache more memory, or fewer sequences at a time."
            ],
            f"Memory was the limit: {counted['preemptions']:.0f} sequences were put off for want of KV memory.",
        )
    wider = (last.load.concurrency or 1) / (before.load.concurrency or 1)
    grew = last.tokens_per_s / before.tokens_per_s - 1 if before.tokens_per_s else 0.0
    if grew > _GROWTH * (wider - 1):
        more = (last.load.concurrency or 1) * 2
        return [f"More streams still pay: try --concurrency {more} {more * 2}."], (
            f"No limit was reached: {last.name} made {grew:.0%} more than {before.name}."
        )
    if _waits(last, before):
        return (
            [
                "Raise engine.max_running if memory allows, or add replicas."
                if ours
                else "Let it run more sequences at a time if memory allows, or add replicas."
            ],
            f"The queue was the limit: with {last.name} callers waited for a place; tokens came as fast as before.",
        )
    return (
        [f"Try {'quantization: int8' if ours else 'quantisation'}, a faster processor or a GPU, or more replicas."],
        f"Compute was the limit: {last.name} made {grew:+.0%} tokens a second against {before.name}.",
    )


def _waits(last: Stage, before: Stage) -> bool:
    """Whether the first token came later, and the others at nearly the same pace."""
    if last.ttft_ms is None or before.ttft_ms is None or last.tpot_ms is None or before.tpot_ms is None:
        return False
    later = last.ttft_ms.p50 - before.ttft_ms.p50
    slower = last.tpot_ms.p50 / before.tpot_ms.p50 - 1
    return later > _QUEUE_SHARE * last.ttft_ms.p50 and slower < _GROWTH * 2


def _batch_size(advice: BatchAdvice | None) -> list[str]:
    return [] if advice is None else [f"max_batch_size: {advice.recommended}. {advice.reason}."]


def _unsteady(stages: Sequence[Stage]) -> list[str]:
    names = [_name(stage) for stage in stages if stage.steady is False]
    advice = "Give more requests to --warmup, or leave out --quick."
    return [f"Latency had not settled when these began: {'; '.join(names)}. {advice}"] if names else []


def _late(stages: Sequence[Stage]) -> list[str]:
    late = max((stage.client.loop_lag_p99_ms for stage in stages), default=0)
    if late <= _LAG_MS or any(stage.client.limited for stage in stages):
        return []
    return [
        f"This client was late by up to {late:.0f} ms (p99) because others used its cores: run it on another machine "
        "for latencies finer than that."
    ]
