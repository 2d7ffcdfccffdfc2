"""Compares the variants of an experiment with its control: the report, and the guards that stop an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf, isfinite

from serve_app.core.experiments import Difference, Estimate, ExperimentReport, VariantReport
from serve_app.experiment_config import Experiment, Variant
from serve_app.gateway.assignment import exposure
from serve_app.gateway.confidence import (
    MIN_CLUSTERS,
    Interval,
    design_effect,
    mean_difference,
    mean_interval,
    quantile,
    quantile_interval,
    rate_interval,
)
from serve_app.gateway.statistics import BOUNDS, METRICS, ExperimentStatistics, VariantStatistics

# All intervals of a report hold together at all times with probability 1 - ALPHA. So do those of all guards.
ALPHA = 0.05
TAIL = 0.95
TTFT_P95 = "ttft_p95"
REPORTED = (*METRICS, TTFT_P95)
NO_DIFFERENCE, NO_DATA = "no difference seen yet", "not enough data yet"
# The words for a value below and above that of the control. A shorter answer is neither better nor worse.
_WORDS = {"feedback": ("worse", "better"), "length": ("lower", "higher")}
_RATES = ("error_rate", "feedback")


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of a variant: its value, None without one, and its interval."""

    value: float | None
    interval: Interval
    count: int


def measure(statistics: VariantStatistics, metric: str, alpha: float) -> Measured:
    """`metric` is one of REPORTED."""
    sums = statistics.sums["ttft" if metric == TTFT_P95 else metric]
    count = int(sums.count)
    if metric == TTFT_P95:
        interval = Interval()
        if sums.effective_clusters >= MIN_CLUSTERS:
            effect = design_effect(sums, _variance(statistics.ttft_bins))
            interval = quantile_interval(statistics.ttft_bins, TAIL, effect, alpha)
        return Measured(quantile(statistics.ttft_bins, TAIL), interval, count)
    interval = (rate_interval if metric in _RATES else mean_interval)(sums, alpha)
    return Measured(sums.mean, interval, count)


def difference(
    variant: VariantStatistics, control: VariantStatistics, metric: str, alpha: float
) -> tuple[Measured, Measured, Interval]:
    """A metric of a variant and of the control, and the interval of the variant's value less that of the control.

    For rates and quantiles it follows from the intervals of the two, each with half of the error probability.
    """
    after, before = (measure(one, metric, alpha / 2) for one in (variant, control))
    if metric in _RATES or metric == TTFT_P95:
        known = after.value is not None and before.value is not None
        return after, before, after.interval.less(before.interval) if known else Interval()
    return after, before, mean_difference(variant.sums[metric], control.sums[metric], alpha)


def report(experiment: Experiment, statistics: ExperimentStatistics, stopped: str, now: datetime) -> ExperimentReport:
    """The report of an experiment, which a guard has `stopped` for this reason, or not ("")."""
    share = 0.0 if stopped else exposure(experiment, now)
    variants = tuple(_variant(experiment, variant, statistics, share) for variant in experiment.variants)
    return ExperimentReport(
        experiment.name,
        experiment.revision,
        experiment.unit,
        statistics.began,
        1 - ALPHA,
        stopped,
        _verdict(experiment, variants, stopped),
        variants,
    )


def _variant(experiment: Experiment, variant: Variant, statistics: ExperimentStatistics, share: float) -> VariantReport:
    alpha = ALPHA / (len(REPORTED) * (len(experiment.variants) - 1))
    own, control = (statistics.of(one.name) for one in (variant, experiment.control))
    compared = {metric: difference(own, control, metric, alpha) for metric in REPORTED}
    is_control = variant is experiment.control
    percent = share * variant.percent
    if is_control:
        percent = 100 - share * sum(one.percent for one in experiment.variants)
    return VariantReport(
        variant.name,
        variant.model if variant.adapter is None else variant.adapter,
        percent,
        dict(sorted(own.outcomes.items())),
        {metric: _estimate(after) for metric, (after, _, _) in compared.items()},
        {} if is_control else {metric: _difference(metric, *found) for metric, found in compared.items()},
    )


def worse_variant(experiment: Experiment, statistics: ExperimentStatistics) -> tuple[str, str] | None:
    """The name of a variant that is worse than a guard tolerates, and the reason; None if there is none."""
    guards = {name: limit for name, limit in experiment.guards.model_dump().items() if limit is not None}
    if not guards:
        return None
    alpha = ALPHA / (len(guards) * (len(experiment.variants) - 1))
    control = statistics.of(experiment.control.name)
    for variant in experiment.variants[1:]:
        for reason in _reasons(guards, control, statistics.of(variant.name), alpha):
            return variant.name, reason
    return None


def _reasons(
    guards: dict[str, float], control: VariantStatistics, variant: VariantStatistics, alpha: float
) -> Iterator[str]:
    for metric, limit in guards.items():
        before, after = (measure(one, metric, alpha / 2) for one in (control, variant))
        is_rate = metric in _RATES
        bound = before.interval.high + limit if is_rate else before.interval.high * limit
        if before.value is not None and after.interval.low > bound:
            tolerance = f"+{limit:g}" if is_rate else f"×{limit:g}"
            yield f"{metric} is {after.value:.3g}, that of the control {before.value:.3g}, the tolerance {tolerance}"


def _variance(bins: Sequence[int]) -> float:
    """The variance of the values in bins, each taken as the upper bound of its bin."""
    count = sum(bins)
    if not count:
        return 0.0
    pairs = list(zip(bins, (*BOUNDS, BOUNDS[-1]), strict=True))
    mean = sum(size * bound for size, bound in pairs) / count
    return sum(size * (bound - mean) ** 2 for size, bound in pairs) / count


def _estimate(one: Measured) -> Estimate:
    return Estimate(one.value, _finite(one.interval.low), _finite(one.interval.high), one.count)


def _difference(metric: str, variant: Measured, control: Measured, interval: Interval) -> Difference:
    if variant.value is None or control.value is None:
        return Difference(None, None, None, NO_DATA)
    below, above = _WORDS.get(metric, ("better", "worse"))
    verdict = below if interval.high < 0 else above if interval.low > 0 else NO_DIFFERENCE
    if interval.low == -inf and interval.high == inf:
        verdict = NO_DATA
    return Difference(variant.value - control.value, _finite(interval.low), _finite(interval.high), verdict)


def _verdict(experiment: Experiment, variants: Sequence[VariantReport], stopped: str) -> str:
    if stopped:
        return f"stopped by a guard: {stopped}; all requests go to {experiment.control.name}"
    found = [
        f"{variant.name}: {metric} is {difference.verdict}"
        for variant in variants
        for metric, difference in variant.differences.items()
        if difference.verdict not in (NO_DIFFERENCE, NO_DATA)
    ]
    if found:
        return "; ".join(found)
    known = any(one.verdict == NO_DIFFERENCE for variant in variants for one in variant.differences.values())
    return NO_DIFFERENCE if known else NO_DATA


def _finite(bound: float) -> float | None:
    return bound if isfinite(bound) else None
