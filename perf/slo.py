"""Service level objectives, written as `ttft_p95<500ms,tpot_p95<50ms`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perf.records import Record

METRICS = ("ttft", "tpot", "itl", "e2e")
_BOUND = re.compile(r"(\w+?)_p(\d+(?:\.\d+)?)\s*<=?\s*(\d+(?:\.\d+)?)\s*(ms|s)")


class SloError(ValueError):
    """The text is not a valid SLO; the message shows the expected format."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The `percentile`-th percentile of a latency metric must be below `limit_s`."""

    metric: str
    percentile: float
    limit_s: float

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percentile:.12g}<{self.limit_s * 1e3:.12g}ms"

    def values(self, record: Record, service: bool = False) -> list[float]:
        """Seconds, of one finished request; empty if the request has no such value, as TPOT of one token.

        With `service`, times count from sending, so that they exclude the lateness of the client.
        """
        if self.metric == "itl":
            return record.gaps
        service_metrics = {"ttft": "ttft_service", "e2e": "service"} if service else {}
        value: float | None = getattr(record, service_metrics.get(self.metric, self.metric))
        return [] if value is None else [value]

    def met_by(self, record: Record) -> bool:
        """Whether this request is within the limit; a failed request is not."""
        return record.ok and all(value < self.limit_s for value in self.values(record))

    def measured(self, records: Sequence[Record], service: bool = False) -> float | None:
        """The percentile in seconds, by numpy's definition; None without any value.

        A failed request counts as infinite latency, with the weight of a successful one: as many gaps as those have.
        """
        good = [self.values(record, service) for record in records if record.ok]
        values = [value for of_request in good for value in of_request]
        failed = sum(not record.ok for record in records)
        if not failed:
            return float(np.percentile(values, self.percentile)) if values else None
        values += [np.inf] * (failed * max(1, round(len(values) / max(1, len(good)))))
        # numpy would interpolate between a number and infinity to NaN.
        return float(np.percentile(values, self.percentile, method="higher"))


@dataclass(frozen=True, slots=True)
class Slo:
    """A request or a stage meets the SLO if it meets all bounds."""

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Raises SloError."""
        return cls(tuple(_bound(part.strip()) for part in text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.bounds))

    def without_streaming(self) -> Slo:
        """The bounds that apply to a response without streaming: those on end-to-end latency."""
        return Slo(tuple(bound for bound in self.bounds if bound.metric == "e2e"))

    def met_by(self, record: Record) -> bool:
        return all(bound.met_by(record) for bound in self.bounds)

    def missed(self, records: Sequence[Record], service: bool = False) -> list[str]:
        """A sentence for each bound that is not met."""
        sentences = []
        for bound in self.bounds:
            value = bound.measured(records, service)
            if value is None and any(record.ok for record in records):
                continue  # responses of one token have no TPOT
            if value is None or not value < bound.limit_s:
                state = "was not measured" if value is None else f"is {value * 1e3:.4g} ms"
                sentences.append(
                    f"{bound.metric}_p{bound.percentile:.12g} {state}, not below {bound.limit_s * 1e3:.12g} ms"
                )
        return sentences


def _bound(text: str) -> Bound:
    match = _BOUND.fullmatch(text.lower())
    if match is None or match[1] not in METRICS or not 0 < float(match[2]) <= 100:
        raise SloError(
            f"invalid objective {text!r}; write a metric ({', '.join(METRICS)}), a percentile and a limit, "
            "such as ttft_p95<500ms"
        )
    return Bound(match[1], float(match[2]), float(match[3]) / (1e3 if match[4] == "ms" else 1))
