"""Compares two runs statistically: one row per stage and metric, and a conclusion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

import numpy as np
from pydantic import Field

from perf import stats
from perf.exits import Exit
from perf.results import ResultModel, Run, Stage

Metric: TypeAlias = Literal["ttft", "tpot", "e2e", "tokens_per_s", "errors"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# Two runs of the same code on the same idle machine differ by a few percent. With many requests such a difference is
# significant, but it is not a regression.
FAIL_ON = 0.05
ALPHA = 0.05
SEED = 7
MIN_SAMPLES = 10
MIN_REPEATS = 3  # for a metric with one value per repeat

# Settings that do not affect the measurement, or that the comparison reports elsewhere.
NOT_CONDITIONS = {"baseline", "fail_on", "instance_type", "json", "output", "salt"}
# If one of these differs, the runs measured different things.
DECISIVE_CONDITIONS = (
    *("api", "model", "server", "fixed length", "processor", "cores", "gpus", "on this machine", "loop"),
    *("max_tokens", "prompt", "prompt_words"),
)


class ComparisonError(ValueError):
    """The runs have no stage in common; the message says what to do."""


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "no difference found"
    TOO_FEW = "too few samples"


class Row(ResultModel):
    """One metric of one stage."""

    scenario: str
    stage: str
    metric: Metric
    baseline: float = Field(description="Median in ms; tokens per second; failed requests in percent.")
    candidate: float
    samples: tuple[int, int] = Field(description="Requests; repeats for a metric with one value per repeat.")
    shift: float | None = Field(
        default=None, description="Relative change: 0.1 is 10 % more; null: the baseline value is zero."
    )
    low: float | None = Field(default=None, description="Confidence interval of the shift.")
    high: float | None = None
    p: float | None = Field(default=None, description="Adjusted for all tests of the comparison (Holm).")
    verdict: Verdict = Verdict.TOO_FEW
    regression: bool = Field(default=False, description="Worse by at least the threshold of --fail-on.")

    @property
    def where(self) -> str:
        return f"{self.scenario}, {self.stage}"


class Condition(ResultModel):
    """A condition that differs between the runs."""

    what: str
    baseline: str
    candidate: str


class Comparison(ResultModel):
    fail_on: float
    alpha: float
    rows: list[Row]
    conditions: list[Condition]
    client_limited: list[str] = Field(description="Stages in which the client was the bottleneck, with the reason.")
    cautions: list[str]
    conclusion: str
    exit_code: int

    @property
    def regressions(self) -> list[Row]:
        return [row for row in self.rows if row.regression]


Pair: TypeAlias = tuple[Stage, Stage]


def compare(
    baseline: Run,
    candidate: Run,
    *,
    fail_on: float = FAIL_ON,
    alpha: float = ALPHA,
    metrics: Sequence[Metric] = METRICS,
    seed: int = SEED,
    resamples: int = stats.RESAMPLES,
) -> Comparison:
    """`resamples`: bootstrap draws per interval. Raises ComparisonError if the runs have no stage in common."""
    pairs = _pairs(baseline, candidate)
    confidence = 1 - alpha
    tested = [row for pair in pairs for metric in metrics for row in _rows(pair, metric, confidence, seed, resamples)]
    rows = _with_verdicts(tested, alpha, fail_on)
    conditions = [*_conditions(baseline, candidate), *_load_conditions(pairs)]
    limited = [*_limited("baseline", [pair[0] for pair in pairs]), *_limited("candidate", [pair[1] for pair in pairs])]
    regressed = any(row.regression for row in rows)
    return Comparison(
        fail_on=fail_on,
        alpha=alpha,
        rows=rows,
        conditions=conditions,
        client_limited=limited,
        cautions=list(_cautions(baseline, candidate, pairs, conditions)),
        conclusion=_conclusion(rows, limited, fail_on),
        exit_code=Exit.CLIENT_LIMITED if limited else Exit.FAILED if regressed else Exit.OK,
    )


def _pairs(baseline: Run, candidate: Run) -> list[Pair]:
    # A probe of a search stops when its result is certain: its samples are not representative.
    compared = [stage for stage in baseline.stages if stage.scenario != "find-max"]
    pairs = [(stage, other) for stage in compared if (other := candidate.stage(stage.scenario, stage.name))]
    if not pairs:
        names = ["; ".join(f"{stage.scenario}, {stage.name}" for stage in run.stages) for run in (baseline, candidate)]
        raise ComparisonError(
            f"no stage is in both runs: the baseline has {names[0] or 'none'}, the candidate {names[1] or 'none'}; "
            "run both with the same scenarios and load levels"
        )
    return pairs


def _rows(pair: Pair, metric: Metric, confidence: float, seed: int, resamples: int) -> Iterator[Row]:
    """At most one row; none if neither run has the metric. `p` is not adjusted yet."""
    match metric:
        case "tokens_per_s":
            yield _throughput(pair, confidence)
        case "errors":
            if any(stage.errors for stage in pair):
                yield _failures(pair)
        case _:
            yield from _latency(pair, metric, confidence, seed, resamples)


def _latency(pair: Pair, metric: Metric, confidence: float, seed: int, resamples: int) -> Iterator[Row]:
    samples = [getattr(stage.samples, f"{metric}_ms") for stage in pair]
    present = [[value for value in values if value is not None] for values in samples]
    if not all(present):
        return
    row = _row(pair, metric, [float(np.median(values)) for values in present], [len(values) for values in present])
    if min(row.samples) < MIN_SAMPLES:
        yield row.model_copy(update={"shift": row.candidate / row.baseline - 1 if row.baseline else None})
        return
    sides = [stats.Sample.of(ms, stage.samples.repeat) for ms, stage in zip(samples, pair, strict=True)]
    yield _with_difference(row, stats.latency_difference(sides[0], sides[1], confidence, seed, resamples))


def _throughput(pair: Pair, confidence: float) -> Row:
    """Throughput has one value per repeat; below three repeats per run its variance is not known."""
    rates = [[rate for rate in stage.tokens_per_s_by_repeat if rate > 0] for stage in pair]
    row = _row(pair, "tokens_per_s", [stage.tokens_per_s for stage in pair], [len(values) for values in rates])
    if min(row.samples) < MIN_REPEATS:
        return row.model_copy(update={"shift": row.candidate / row.baseline - 1 if row.baseline else None})
    return _with_difference(row, stats.rate_difference(rates[0], rates[1], confidence))


def _failures(pair: Pair) -> Row:
    counts = [(stage.failed, stage.requests) for stage in pair]
    failed_percent = [100 * failed / total if total else 0.0 for failed, total in counts]
    row = _row(pair, "errors", failed_percent, [total for _, total in counts])
    return row.model_copy(update={"p": stats.failures_p(counts[0], counts[1])})


def _row(pair: Pair, metric: Metric, values: Sequence[float], samples: Sequence[int]) -> Row:
    return Row(
        scenario=pair[0].scenario,
        stage=pair[0].name,
        metric=metric,
        baseline=values[0],
        candidate=values[1],
        samples=(samples[0], samples[1]),
    )


def _with_difference(row: Row, difference: stats.Difference) -> Row:
    return row.model_copy(
        update={"shift": difference.shift, "low": difference.low, "high": difference.high, "p": difference.p}
    )


def _with_verdicts(rows: Sequence[Row], alpha: float, fail_on: float) -> list[Row]:
    tested = [index for index, row in enumerate(rows) if row.p is not None]
    adjusted = dict(zip(tested, stats.holm([rows[index].p or 0.0 for index in tested]), strict=True))
    return [_with_verdict(row, adjusted.get(index), alpha, fail_on) for index, row in enumerate(rows)]


def _with_verdict(row: Row, p: float | None, alpha: float, fail_on: float) -> Row:
    if p is None:
        return row
    significant = p < alpha and (row.low is None or row.high is None or not row.low <= 0 <= row.high)
    if not significant:
        return row.model_copy(update={"p": p, "verdict": Verdict.SAME})
    increased = row.candidate > row.baseline if row.shift is None else row.shift > 0
    worse = increased != (row.metric == "tokens_per_s")
    # Failed requests have no shift: any significant increase is a regression.
    large = row.shift is None or abs(row.shift) >= fail_on
    verdict = Verdict.WORSE if worse else Verdict.BETTER
    return row.model_copy(update={"p": p, "verdict": verdict, "regression": worse and large})


def _conditions(baseline: Run, candidate: Run) -> list[Condition]:
    before, after = _described(baseline), _described(candidate)
    return [
        Condition(what=what, baseline=before.get(what, "-"), candidate=after.get(what, "-"))
        for what in dict.fromkeys([*before, *after])
        if before.get(what) != after.get(what)
    ]


def _described(run: Run) -> dict[str, str]:
    """The conditions of a run as texts by name."""
    values: dict[str, object] = {"commit": run.commit, "tool": run.tool, "slo": run.slo}
    for part in (run.target, run.machine):
        values |= {name.replace("_", " "): value for name, value in part}
    values |= {name: value for name, value in run.settings.items() if name not in NOT_CONDITIONS | values.keys()}
    return {
        what: ", ".join(map(str, value)) if isinstance(value, list) else _text(value) for what, value in values.items()
    }


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _load_conditions(pairs: Sequence[Pair]) -> Iterator[Condition]:
    """Load settings that differ between stages of the same name."""
    for baseline, candidate in pairs:
        before, after = dict(baseline.load), dict(candidate.load)
        for what in before:
            if before[what] != after[what]:
                where = f"{baseline.scenario}, {baseline.name}"
                name = "loop" if what == "loop" else f"{what.replace('_', ' ')} of {where}"
                yield Condition(what=name, baseline=_text(before[what]), candidate=_text(after[what]))


def _limited(which: str, stages: Sequence[Stage]) -> list[str]:
    return [
        f"{which}: {stage.scenario}, {stage.name}: {'; '.join(stage.client.limited)}"
        for stage in stages
        if stage.client.limited
    ]


def _cautions(baseline: Run, candidate: Run, pairs: Sequence[Pair], conditions: Sequence[Condition]) -> Iterator[str]:
    if decisive := [condition.what for condition in conditions if condition.what in DECISIVE_CONDITIONS]:
        yield (
            f"The runs differ in {', '.join(dict.fromkeys(decisive))}. How much of a change this causes is not known."
        )
    if any(stage.repeats < 2 for pair in pairs for stage in pair):
        yield (
            "With one repeat, a slower machine looks like slower code. Before you act on a change, "
            "run both again, alternating, with --repeats 5."
        )
    if unsteady := [
        f"{before.scenario}, {before.name}" for before, after in pairs if False in (before.steady, after.steady)
    ]:
        yield f"Latency was not steady at the start of the window: {'; '.join(unsteady)}."
    names = [{(stage.scenario, stage.name) for stage in run.stages} for run in (baseline, candidate)]
    if unpaired := sorted(names[0] ^ names[1]):
        yield f"Only one run has these stages, so they were not compared: {'; '.join(map(', '.join, unpaired))}."


def _conclusion(rows: Sequence[Row], limited: Sequence[str], fail_on: float) -> str:
    if limited:
        return (
            f"Not reliable: {len(limited)} stage{'s' * (len(limited) > 1)} measured the client, not the server. "
            "Run again with less load, or run the client on separate cores."
        )
    tested = [row for row in rows if row.p is not None]
    if not tested:
        return "No conclusion: no metric has enough samples. Run both for longer, or with --repeats 5."
    if regressions := sorted((row for row in rows if row.regression), key=_severity, reverse=True):
        others = f" and {len(regressions) - 1} more" if len(regressions) > 1 else ""
        return (
            f"Worse: {_change_sentence(regressions[0])}{others}, in {len(tested)} comparisons. "
            "Find the cause before you release this."
        )
    better = [row for row in tested if row.verdict is Verdict.BETTER and abs(row.shift or 0) >= fail_on]
    improvement = f"Better: {_change_sentence(max(better, key=_severity))}. " if better else ""
    return improvement + _no_regression(tested, fail_on)


def _no_regression(tested: Sequence[Row], fail_on: float) -> str:
    """That no regression was found, and the largest one that the data do not exclude."""
    bounds = [(bound, row) for row in tested if (bound := _worst_case(row)) is not None]
    worst, row = max(bounds, key=lambda pair: pair[0], default=(0.0, tested[0]))
    sentence = f"No regression of {percent(fail_on)} or more found in {len(tested)} comparisons."
    if worst <= max(fail_on, 0.0):
        return sentence
    return (
        f"{sentence} The least certain metric is {row.metric} ({row.where}): it may be up to {percent(worst)} worse; "
        "more requests or repeats narrow this range."
    )


def _worst_case(row: Row) -> float | None:
    if row.low is None or row.high is None:
        return None
    return -row.low if row.metric == "tokens_per_s" else row.high


def _severity(row: Row) -> float:
    return abs(row.shift) if row.shift is not None else float("inf")


def _change_sentence(row: Row) -> str:
    if row.shift is None:
        return f"{row.candidate:.1f} % of requests failed, {row.baseline:.1f} % before ({row.where})"
    return f"{row.metric} {change(row)} ({interval(row)}; {row.where})"


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def change(row: Row) -> str:
    return "" if row.shift is None else f"{_signed(row.shift, _decimals(row.shift))} %"


def interval(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    decimals = min(_decimals(row.low), _decimals(row.high))
    return f"{_signed(row.low, decimals)} to {_signed(row.high, decimals)} %"


def _signed(share: float, decimals: int) -> str:
    return f"{round(share * 100, decimals) + 0.0:+.{decimals}f}"  # + 0.0 turns -0.0 into 0.0


def _decimals(share: float) -> int:
    return 1 if abs(share) < 1 else 0
