"""A run as a text table of 80 columns."""

from __future__ import annotations

from perf.results import Distribution, Run, Stage

_HEAD = (
    f"{'':<23} {'n':>5} {'err':>4} {'TTFT ms':>11} {'TPOT ms':>11} {'e2e s':>11} {'tok/s':>7} {'eff':>4}\n"
    f"{'':<34} {'p50   p95':>11} {'p50   p95':>11} {'p50   p95':>11}"
)


def table(run: Run) -> str:
    lines, scenario = [_HEAD], ""
    for stage in run.stages:
        if stage.scenario != scenario:
            scenario = stage.scenario
            lines.append(f"{scenario} ({stage.load.loop} loop)")
        lines.append(_row(stage))
    if any(stage.client.limited for stage in run.stages):
        lines.append("! client-limited")
    return "\n".join(lines)


def _row(stage: Stage) -> str:
    latencies = (_p50_p95(stage.ttft_ms, 1), _p50_p95(stage.tpot_ms, 1), _p50_p95(stage.e2e_ms, 1e-3))
    efficiency = "" if stage.efficiency is None else f"{stage.efficiency:.2f}"
    limited = " !" if stage.client.limited else ""
    return (
        f"  {stage.name[:21]:<21} {stage.requests:>5} {stage.failed or '':>4} "
        + " ".join(f"{pair:>11}" for pair in latencies)
        + f" {stage.tokens_per_s:>7.0f} {efficiency:>4}{limited}"
    ).rstrip()


def _p50_p95(times: Distribution | None, scale: float) -> str:
    if times is None:
        return f"{'-':>5} {'-':>5}"
    return f"{_three_digits(times.p50 * scale):>5} {_three_digits(times.p95 * scale):>5}"


def _three_digits(value: float) -> str:
    """Three significant digits in at most five characters."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
