"""Two runs, and what can be told of their difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Literal, TypeAlias, get_args

import numpy as np
from pydantic import Field

from perf import stats
from perf.exits import Exit
from perf.results import Run, Stage, Tree

Metric: TypeAlias = Literal["ttft", "tpot", "e2e", "tokens_per_s", "errors"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# Two runs of the same code on the same quiet machine differ by some percent. With many requests even that is
# significant, and nobody is to be stopped by it.
FAIL_ON = 0.05
ALPHA = 0.05
SEED = 7
LEAST_SAMPLES = 10
LEAST_REPEATS = 3  # for a number that each repeat has once

# What a comparison says about a run rather than about the server, or says elsewhere.
NOT_CONDITIONS = {"baseline", "fail_on", "instance_type", "json", "output", "salt"}
# With these another thing was measured than before.
WEIGHTY = (
    *("api", "model", "server", "fixed length", "processor", "cores", "gpus", "on this machine", "loop"),
    *("max_tokens", "prompt", "prompt_words"),
)


class ComparisonError(ValueError):
    """Nothing of the two runs can be compared; the sentence says why and what would."""


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "no difference seen"
    FEW = "too few samples"


class Row(Tree):
    """One metric of one stage."""

    scenario: str
    stage: str
    metric: Metric
    baseline: float = Field(description="Median in ms; tokens a second; failed requests in percent.")
    candidate: float
    samples: tuple[int, int] = Field(description="Requests, or repeats where each has one number.")
    shift: float | None = Field(default=None, description="Relative: 0.1 is a tenth more; null: no base to relate to.")
    low: float | None = Field(default=None, description="Confidence interval of the shift.")
    high: float | None = None
    p: float | None = Field(default=None, description="Adjusted for all tests of the comparison (Holm).")
    verdict: Verdict = Verdict.FEW
    regression: bool = Field(default=False, description="Worse, and by at least what the comparison fails on.")

    @property
    def where(self) -> str:
        return f"{self.scenario}, {self.stage}"


class Condition(Tree):
    """What was not the same in both runs."""

    what: str
    baseline: str
    candidate: str


class Comparison(Tree):
    fail_on: float
    alpha: float
    rows: list[Row]
    conditions: list[Condition]
    client_limited: list[str] = Field(description="Stages whose figures are their client's, and why.")
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
) -> Comparison:
    """Raises ComparisonError where no stage is in both."""
    pairs = _pairs(baseline, candidate)
    tested = [row for pair in pairs for metric in metrics for row in _row(pair, metric, 1 - alpha, seed)]
    rows = _judged(tested, alpha, fail_on)
    conditions = [*_conditions(baseline, candidate), *_loads(pairs)]
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
    # A probe ends when its verdict is certain: its figures are no sample of anything.
    compared = [stage for stage in baseline.stages if stage.scenario != "find-max"]
    pairs = [(ours, theirs) for ours in compared if (theirs := candidate.stage(ours.scenario, ours.name))]
    if not pairs:
        names = ["; ".join(f"{stage.scenario}, {stage.name}" for stage in run.stages) for run in (baseline, candidate)]
        raise ComparisonError(
            f"no stage is in both runs: the baseline has {names[0] or 'none'}, the candidate {names[1] or 'none'}; "
            "run both with the same scenarios and load levels"
        )
    return pairs


def _row(pair: Pair, metric: Metric, confidence: float, seed: int) -> Iterator[Row]:
    """None where neither run has the metric; `p` is of this test alone so far."""
    match metric:
        case "tokens_per_s":
            yield _throughput(pair, confidence)
        case "errors":
            if any(stage.errors for stage in pair):
                yield _failures(pair)
        case _:
            yield from _latency(pair, metric, confidence, seed)


def _latency(pair: Pair, metric: Metric, confidence: float, seed: int) -> Iterator[Row]:
    measured = [getattr(stage.samples, f"{metric}_ms") for stage in pair]
    there = [[value for value in values if value is not None] for values in measured]
    if not all(there):
        return
    row = _blank(pair, metric, [float(np.median(values)) for values in there], [len(values) for values in there])
    if min(row.samples) < LEAST_SAMPLES:
        yield row.model_copy(update={"shift": row.candidate / row.baseline - 1 if row.baseline else None})
        return
    sides = [stats.Sample.of(ms, stage.samples.repeat) for ms, stage in zip(measured, pair, strict=True)]
    yield _measured(row, stats.latency_difference(sides[0], sides[1], confidence, seed))


def _throughput(pair: Pair, confidence: float) -> Row:
    """Tokens a second are one number a repeat: below three repeats a side nobody knows how much they vary."""
    rates = [[rate for rate in stage.tokens_per_s_by_repeat if rate > 0] for stage in pair]
    row = _blank(pair, "tokens_per_s", [stage.tokens_per_s for stage in pair], [len(each) for each in rates])
    if min(row.samples) < LEAST_REPEATS:
        return row.model_copy(update={"shift": row.candidate / row.baseline - 1 if row.baseline else None})
    return _measured(row, stats.rate_difference(rates[0], rates[1], confidence))


def _failures(pair: Pair) -> Row:
    counts = [(stage.failed, stage.requests) for stage in pair]
    failed_percent = [100 * failed / total if total else 0.0 for failed, total in counts]
    row = _blank(pair, "errors", failed_percent, [total for _, total in counts])
    return row.model_copy(update={"p": stats.failures_p(counts[0], counts[1])})


def _blank(pair: Pair, metric: Metric, told: Sequence[float], samples: Sequence[int]) -> Row:
    return Row(
        scenario=pair[0].scenario,
        stage=pair[0].name,
        metric=metric,
        baseline=told[0],
        candidate=told[1],
        samples=(samples[0], samples[1]),
    )


def _measured(row: Row, difference: stats.Difference) -> Row:
    return row.model_copy(
        update={"shift": difference.shift, "low": difference.low, "high": difference.high, "p": difference.p}
    )


def _judged(rows: Sequence[Row], alpha: float, fail_on: float) -> list[Row]:
    tested = [index for index, row in enumerate(rows) if row.p is not None]
    adjusted = dict(zip(tested, stats.holm([rows[index].p or 0.0 for index in tested]), strict=True))
    return [_verdict(row, adjusted.get(index), alpha, fail_on) for index, row in enumerate(rows)]


def _verdict(row: Row, p: float | None, alpha: float, fail_on: float) -> Row:
    if p is None:
        return row
    certain = p < alpha and (row.low is None or row.high is None or not row.low <= 0 <= row.high)
    if not certain:
        return row.model_copy(update={"p": p, "verdict": Verdict.SAME})
    grew = row.candidate > row.baseline if row.shift is None else row.shift > 0
    worse = grew != (row.metric == "tokens_per_s")
    # Failed requests have no shift: that more of them fail than chance explains is bad enough.
    matters = row.shift is None or abs(row.shift) >= fail_on
    verdict = Verdict.WORSE if worse else Verdict.BETTER
    return row.model_copy(update={"p": p, "verdict": verdict, "regression": worse and matters})


def _conditions(baseline: Run, candidate: Run) -> list[Condition]:
    ours, theirs = _told(baseline), _told(candidate)
    return [
        Condition(what=what, baseline=ours.get(what, "-"), candidate=theirs.get(what, "-"))
        for what in dict.fromkeys([*ours, *theirs])
        if ours.get(what) != theirs.get(what)
    ]


def _told(run: Run) -> dict[str, str]:
    told: dict[str, object] = {"commit": run.commit, "tool": run.tool, "slo": run.slo}
    for part in (run.target, run.machine):
        told |= {name.replace("_", " "): value for name, value in part}
    told |= {name: value for name, value in run.settings.items() if name not in NOT_CONDITIONS | told.keys()}
    return {
        what: ", ".join(map(str, value)) if isinstance(value, list) else _word(value) for what, value in told.items()
    }


def _word(value: object) -> str:
    return "-" if value is None else str(value)


def _loads(pairs: Sequence[Pair]) -> Iterator[Condition]:
    """Stages of the same name whose load was another one."""
    for ours, theirs in pairs:
        before, after = dict(ours.load), dict(theirs.load)
        for what in before:
            if before[what] != after[what]:
                name = "loop" if what == "loop" else f"{what.replace('_', ' ')} of {ours.scenario}, {ours.name}"
                yield Condition(what=name, baseline=_word(before[what]), candidate=_word(after[what]))


def _limited(which: str, stages: Sequence[Stage]) -> list[str]:
    return [
        f"{which}: {stage.scenario}, {stage.name}: {'; '.join(stage.client.limited)}"
        for stage in stages
        if stage.client.limited
    ]


def _cautions(baseline: Run, candidate: Run, pairs: Sequence[Pair], conditions: Sequence[Condition]) -> Iterator[str]:
    if weighty := [condition.what for condition in conditions if condition.what in WEIGHTY]:
        yield f"Not the same was measured: {', '.join(dict.fromkeys(weighty))}. Their share of a change is not known."
    if any(stage.repeats < 2 for pair in pairs for stage in pair):
        yield (
            "With one repeat a slower machine looks like slower code. Before anybody acts on a change, "
            "run both again, in turn, with --repeats 5."
        )
    if unsteady := [f"{ours.scenario}, {ours.name}" for ours, theirs in pairs if False in (ours.steady, theirs.steady)]:
        yield f"Not warm yet when it was measured: {'; '.join(unsteady)}."
    names = [{(stage.scenario, stage.name) for stage in run.stages} for run in (baseline, candidate)]
    if lonely := sorted(names[0] ^ names[1]):
        yield f"In one run only, and not compared: {'; '.join(', '.join(name) for name in lonely)}."


def _conclusion(rows: Sequence[Row], limited: Sequence[str], fail_on: float) -> str:
    if limited:
        return (
            f"Not to be trusted: {len(limited)} stage{'s' * (len(limited) > 1)} measured the client, not the server. "
            "Run again with less load, or with a client that has cores of its own."
        )
    tested = [row for row in rows if row.p is not None]
    if not tested:
        return "Nothing can be told: too few samples everywhere. Run both for longer, or with --repeats 5."
    if worse := sorted((row for row in rows if row.regression), key=_badness, reverse=True):
        others = f", and {len(worse) - 1} more" if len(worse) > 1 else ""
        told = f"{_sentence(worse[0])}{others}, of {len(tested)} comparisons"
        return f"Worse: {told}. Do not ship this before it is understood."
    better = [row for row in tested if row.verdict is Verdict.BETTER and abs(row.shift or 0) >= fail_on]
    good = f"Better: {_sentence(max(better, key=_badness))}. " if better else ""
    return good + _reassurance(tested, fail_on)


def _reassurance(tested: Sequence[Row], fail_on: float) -> str:
    """What was not seen, and what could have been missed."""
    bounds = [(bound, row) for row in tested if (bound := _worst_case(row)) is not None]
    worst, row = max(bounds, key=lambda pair: pair[0], default=(0.0, tested[0]))
    told = f"Nothing got worse by {percent(fail_on)} or more, as far as {len(tested)} comparisons can tell."
    if worst <= max(fail_on, 0.0):
        return told
    return (
        f"{told} Least is known of {row.metric} ({row.where}): it may be {percent(worst)} worse; "
        "more requests or repeats would tell."
    )


def _worst_case(row: Row) -> float | None:
    if row.low is None or row.high is None:
        return None
    return -row.low if row.metric == "tokens_per_s" else row.high


def _badness(row: Row) -> float:
    return abs(row.shift) if row.shift is not None else float("inf")


def _sentence(row: Row) -> str:
    if row.shift is None:
        return f"{row.candidate:.1f} % of requests failed, {row.baseline:.1f} % before ({row.where})"
    return f"{row.metric} {change(row)} ({interval(row)}; {row.where})"


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def change(row: Row) -> str:
    return "" if row.shift is None else f"{_signed(row.shift, _digits(row.shift))} %"


def interval(row: Row) -> str:
    if row.low is None or row.high is None:
        return ""
    digits = min(_digits(row.low), _digits(row.high))
    return f"{_signed(row.low, digits)} to {_signed(row.high, digits)} %"


def _signed(share: float, digits: int) -> str:
    return f"{round(share * 100, digits) + 0.0:+.{digits}f}"  # + 0.0, or there would be a -0.0


def _digits(share: float) -> int:
    return 1 if abs(share) < 1 else 0
