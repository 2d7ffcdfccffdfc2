"""A stage's figures from its repeats."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from perf import metrics
from perf.gate import Measured
from perf.results import Client, Goodput, Load, Resources, Scenario, Stage
from perf.slo import Slo

# From which on the figures are the client's own and not the server's.
DELAY_LIMIT_S = 0.010
RATE_LIMIT = 0.98
CPU_LIMIT = 0.85


def stage(
    scenario: Scenario,
    name: str,
    load: Load,
    repeats: Sequence[Measured],
    resources: Resources | None = None,
    slo: Slo | None = None,
) -> Stage:
    """Its efficiency is left to whoever knows the other stages."""
    if slo is not None and not load.streaming:
        slo = slo.of_whole_answers()
    records = [record for repeat in repeats for record in repeat.records]
    good = [record for record in records if record.ok]
    window_s = sum(repeat.window_s for repeat in repeats)
    arrived = sum(map(arrived_in, repeats))
    finished = sum(m.opened <= (r.done or 0) < m.closed for m in repeats for r in m.everybody if r.ok)
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
        tokens_per_s=arrived / window_s if window_s else 0.0,
        tokens_per_s_by_repeat=[arrived_in(repeat) / repeat.window_s for repeat in repeats if repeat.window_s],
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
        client=client(load, repeats),
        resources=resources,
        timeline=metrics.timeline(repeats[0].everybody, repeats[0].opened, repeats[0].closed),
        samples=metrics.samples([(repeat.opened, repeat.records) for repeat in repeats]),
    )


def client(load: Load, repeats: Sequence[Measured]) -> Client:
    """Whether it kept up."""
    window_s = sum(repeat.window_s for repeat in repeats)
    cpu = sum(repeat.cpu_s for repeat in repeats) / window_s if window_s else 0.0
    delays = [r.sent - r.due for repeat in repeats for r in repeat.records if r.sent is not None] or [0.0]
    lags = [lag for m in repeats for at, lag in m.lags if m.opened <= at < m.closed] or [0.0]
    median, late = (float(value) for value in np.percentile(delays, [50, 99]))
    achieved = min(map(_achieved, repeats)) if load.loop == "open" else None
    limited = []
    if load.loop == "open" and late > DELAY_LIMIT_S:
        limited.append(f"1 % of the requests were sent {late * 1e3:.0f} ms late or more")
    if achieved is not None and achieved < RATE_LIMIT:
        limited.append(f"it sent at {achieved:.1%} of the rate that was asked for")
    if cpu > CPU_LIMIT:
        limited.append(f"its process used {cpu:.0%} of a core")
    return Client(
        cpu=cpu,
        schedule_delay_p50_ms=median * 1e3,
        schedule_delay_p99_ms=late * 1e3,
        loop_lag_p99_ms=float(np.percentile(lags, 99)) * 1e3,
        achieved_rate=achieved,
        limited=limited,
    )


def _achieved(repeat: Measured) -> float:
    """In how much time the requests were due over that in which they were sent."""
    sent = [record.sent for record in repeat.records if record.sent is not None]
    due = [record.due for record in repeat.records]
    if not due:
        return 1.0
    everybody = len(sent) / len(due)
    # All at once is no rate; how late they were says the delay.
    if len(sent) < 2 or max(due) == min(due):
        return everybody
    return min(1.0, (max(due) - min(due)) / (max(sent) - min(sent))) * everybody


def arrived_in(repeat: Measured) -> float:
    """Tokens of anybody, within the window."""
    return sum(record.tokens_within(repeat.opened, repeat.closed) for record in repeat.everybody)


def _steady(repeats: Sequence[Measured]) -> bool | None:
    known = [repeat.steady for repeat in repeats if repeat.steady is not None]
    return all(known) if known else None


def _goodput(slo: Slo, repeats: Sequence[Measured], window_s: float) -> Goodput:
    """A rate of everybody who finished in the window, as requests_per_s is; a share of those who were due in it."""
    records = [record for repeat in repeats for record in repeat.records]
    finished = [r for m in repeats for r in m.everybody if r.done is not None and m.opened <= r.done < m.closed]
    return Goodput(
        slo=str(slo),
        requests_per_s=sum(map(slo.met_by, finished)) / window_s if window_s else 0.0,
        share=sum(map(slo.met_by, records)) / len(records) if records else 0.0,
    )
