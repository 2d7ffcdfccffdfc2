"""Simulations as a text table of 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from perf.formatting import format_number
from perf.simulate.results import Percentiles, Simulation

_HEAD = (
    f"{'':<20} {'queue time s':>18} {'TTFT s':>18} {'cached':>6} {'replica':>8} {'':>8} {'deci-':>6} {'':>5} {'':>6}\n"
    f"{'':<20} {'p50   p95   p99':>18} {'p50   p95   p99':>18} {'%':>6} {'hours':>8} {'USD':>8} {'sions':>6} "
    f"{'flaps':>5} {'failed':>6}"
)


def table(simulations: Sequence[Simulation]) -> str:
    lines, start_s = [_HEAD], -1.0
    for one in simulations:
        if one.start_s != start_s:
            start_s = one.start_s
            lines.append(f"a replica starts in {start_s:g} s; {one.requests:,} requests")
        lines.append(
            f"  {one.strategy:<18} {_three(one.queue_s):>18} {_three(one.ttft_s):>18} {one.cached_share * 100:>6.1f} "
            f"{format_number(one.replica_hours):>8} {format_number(one.usd):>8} {one.decisions:>6} {one.flaps:>5} "
            f"{one.failures:>6}"
        )
    return "\n".join(lines)


def _three(times: Percentiles) -> str:
    return " ".join(f"{value:5.2f}" if value < 99.5 else f"{value:5.0f}" for value in (times.p50, times.p95, times.p99))
