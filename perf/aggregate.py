"""Aggregates the repeats of a load level into one `Stage` of the results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from perf import metrics
from perf.phases import Measurement
from perf.results import Client, Goodput, Load, Resources, Scenario, Stage
from perf.slo import Slo

# Beyond these limits a stage is client-limited: it describes the load generator, not the server.
DELAY_LIMIT_S = 0.010
RATE_LIMIT = 0.98
CPU_LIMIT = 0.85


def build_stage(
    scenario: Scenario,
    name: str,
    load: Load,
    repeats: Sequence[Measurement],
    resources: Resources | None = None,
    slo: Slo | None = None,
) -> Stage:
    """`efficiency` stays None: it needs the other stages of the scenario."""
    if slo is not None and not load.streaming:
        slo = slo.without_streaming()
    records = [record for repeat in repeats for record in repeat.records]
    good = [record for record in records if record.ok]
    window_s = sum(repeat.window_s for repeat in repeats)
    tokens_in_window = sum(map(_tokens_in_window, repeats))
    finished = sum(m.opened <= (r.done or 0) < m.closed for m in repeats for r in m.all_records if r.ok)
    chunks = sum(len(record.chunks) for record in good)
    return Stage(
        scenario=scenario,
        name=name,
        load=load,
        repeats=len(repeats),
        warmup_requests=sum(repeat.warmup_requests for repeat in repeats),
        steady=_steady(repeats),
        window_s=window_s,
        requests=len(records),
        finished=len(good),
        errors=metrics.errors(records),
        tokens=sum(record.tokens for record in good),
        prompt_tokens=sum(record.prompt_tokens for record in good),
        tokens_per_s=tokens_in_window / window_s if window_s else 0.0,
        tokens_per_s_by_repeat=[_tokens_in_window(repeat) / repeat.window_s for repeat in repeats if repeat.window_s],
        requests_per_s=finished / window_s if window_s else 0.0,
        tokens_per_chunk=sum(record.tokens for record in good if record.chunks) / chunks if chunks else None,
        ttft_ms=metrics.distribution(record.ttft for record in good),
        ttft_service_ms=metrics.distribution(record.ttft_service for record in good),
        tpot_ms=metrics.distribution(record.tpot for record in good),
        itl_ms=metrics.distribution(chain.from_iterable(record.gaps for record in good)),
        itl_quantiles_ms=metrics.gap_quantiles(good),
        e2e_ms=metrics.distribution(record.e2e for record in good),
        e2e_service_ms=metrics.distribution(record.service for record in good),
        goodput=_goodput(slo, repeats, window_s) if slo is not None and slo.bounds else None,
        missed=slo.missed(records) if slo is not None else [],
        client=_client(load, repeats),
        resources=resources,
        timeline=metrics.timeline(repeats[0].all_records, repeats[0].opened, repeats[0].closed),
        samples=metrics.samples([(repeat.opened, repeat.records) for repeat in repeats]),
    )


def _client(load: Load, repeats: Sequence[Measurement]) -> Client:
    """Whether the load generator kept up with the load."""
    window_s = sum(repeat.window_s for repeat in repeats)
    cpu = sum(repeat.cpu_s for repeat in repeats) / window_s if window_s else 0.0
    delays = [r.sent - r.due for repeat in repeats for r in repeat.records if r.sent is not None] or [0.0]
    lags = [lag for m in repeats for at, lag in m.lags if m.opened <= at < m.closed] or [0.0]
    delay_p50, delay_p99 = (float(value) for value in np.percentile(delays, [50, 99]))
    achieved = min(map(_achieved_rate, repeats)) if load.loop == "open" else None
    limited = []
    if load.loop == "open" and delay_p99 > DELAY_LIMIT_S:
        limited.append(f"1 % of the requests were sent {delay_p99 * 1e3:.0f} ms late or more")
    if achieved is not None and achieved < RATE_LIMIT:
        limited.append(f"the client sent at {achieved:.1%} of the requested rate")
    if cpu > CPU_LIMIT:
        limited.append(f"the client used {cpu:.0%} of a core")
    return Client(
        cpu=cpu,
        schedule_delay_p50_ms=delay_p50 * 1e3,
        schedule_delay_p99_ms=delay_p99 * 1e3,
        loop_lag_p99_ms=float(np.percentile(lags, 99)) * 1e3,
        achieved_rate=achieved,
        limited=limited,
    )


def _achieved_rate(repeat: Measurement) -> float:
    """The time span in which the requests were due, divided by the span in which they were sent."""
    sent = [record.sent for record in repeat.records if record.sent is not None]
    due = [record.due for record in repeat.records]
    if not due:
        return 1.0
    sent_share = len(sent) / len(due)
    # Requests that are due at the same instant have no rate; their schedule delay shows whether the client was late.
    if len(sent) < 2 or max(due) == min(due):
        return sent_share
    return min(1.0, (max(due) - min(due)) / (max(sent) - min(sent))) * sent_share


def _tokens_in_window(repeat: Measurement) -> float:
    """Tokens of all requests that arrived within the window."""
    return sum(record.tokens_within(repeat.opened, repeat.closed) for record in repeat.all_records)


def _steady(repeats: Sequence[Measurement]) -> bool | None:
    known = [repeat.steady for repeat in repeats if repeat.steady is not None]
    return all(known) if known else None


def _goodput(slo: Slo, repeats: Sequence[Measurement], window_s: float) -> Goodput:
    """The rate covers all requests that finished in the window, as requests_per_s does; the share those due in it."""
    records = [record for repeat in repeats for record in repeat.records]
    finished = [r for m in repeats for r in m.all_records if r.done is not None and m.opened <= r.done < m.closed]
    return Goodput(
        slo=str(slo),
        requests_per_s=sum(map(slo.met_by, finished)) / window_s if window_s else 0.0,
        share=sum(map(slo.met_by, records)) / len(records) if records else 0.0,
    )
