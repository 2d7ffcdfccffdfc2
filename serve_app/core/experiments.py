"""Experiments as data: who calls, which variant answers, what callers think of answers, and the report."""

from __future__ import annotations

from dataclasses import dataclass

# The units of an experiment are hashed to this number of clusters, by which its statistics are kept.
CLUSTERS = 128
# The outcomes of a mirrored request that did not start, and of one that gave way to requests of clients.
SKIPPED, YIELDED = "skipped", "yielded"


@dataclass(frozen=True, slots=True)
class Caller:
    """What a call says about its caller; "" is unknown. `variant` is the variant that the call asks for."""

    key: str = ""
    user: str = ""
    session: str = ""
    request: str = ""
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The variant of an experiment that answers a request.

    `cluster`, from 0 to CLUSTERS - 1, is where the statistics count the request; None if they do not.
    """

    experiment: str
    variant: str
    cluster: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """An assignment with what it means: the model, and what replaces the model's own settings; None, "" if nothing."""

    assignment: Assignment
    model: str
    adapter: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    template: str = ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a caller thinks of the answers to a call of its tenant: a score from 0 (bad) to 1 (good)."""

    request_id: str
    score: float
    comment: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of a metric, and the interval that holds the true value at all times; None is unknown.

    `count` is the number of requests that the value is computed from.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A variant's value less that of the control, with its interval. None is unknown.

    `verdict` is `better`, `worse`, `higher`, `lower`, `no difference seen yet` or `not enough data yet`.
    """

    value: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class VariantReport:
    """`percent` is the current share of the units. The control has no differences."""

    name: str
    model: str
    percent: float
    outcomes: dict[str, int]
    metrics: dict[str, Estimate]
    differences: dict[str, Difference]


@dataclass(frozen=True, slots=True)
class ExperimentReport:
    """An experiment since `began`, in seconds since 1970; 0 if no request was counted.

    `confidence` is the probability with which all intervals hold at all times. `stopped` is the reason of the guard
    that has stopped the experiment, or "".
    """

    name: str
    revision: int
    unit: str
    began: float
    confidence: float
    stopped: str
    verdict: str
    variants: tuple[VariantReport, ...]


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of all experiments. `error` says why the latest configuration of experiments was refused, or ""."""

    experiments: tuple[ExperimentReport, ...]
    error: str = ""
