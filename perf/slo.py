"""Service level objectives: `ttft_p95<500ms,tpot_p95<50ms`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perf.records import Record

QUANTITIES = ("ttft", "tpot", "itl", "e2e")
_BOUND = re.compile(r"(\w+?)_p(\d+(?:\.\d+)?)\s*<=?\s*(\d+(?:\.\d+)?)\s*(ms|s)")


class SloError(ValueError):
    """What was written is no objective; the sentence shows one."""


@dataclass(frozen=True, slots=True)
class Bound:
    """That the `percentile`-th percentile of a quantity is below `limit_s`."""

    quantity: str
    percentile: float
    limit_s: float

    def __str__(self) -> str:
        return f"{self.quantity}_p{self.percentile:.12g}<{self.limit_s * 1e3:.12g}ms"

    def values(self, record: Record, service: bool = False) -> list[float]:
        """Seconds, of one finished request; an answer of one token has no TPOT, and keeps any bound on it.

        `service` counts from when it was sent: what the server took, however late the client was.
        """
        if self.quantity == "itl":
            return record.gaps
        in_service = {"ttft": "ttft_service", "e2e": "service"} if service else {}
        value: float | None = getattr(record, in_service.get(self.quantity, self.quantity))
        return [] if value is None else [value]

    def met_by(self, record: Record) -> bool:
        """Whether this one request is within the limit; one that failed is not."""
        return record.ok and all(value < self.limit_s for value in self.values(record))

    def measured(self, records: Sequence[Record], service: bool = False) -> float | None:
        """The percentile in seconds, as numpy's; None if nobody had such a quantity.

        A request that failed took for ever, and counts as much as one that did not: as many gaps as those had.
        """
        good = [self.values(record, service) for record in records if record.ok]
        values = [value for of_one in good for value in of_one]
        failed = sum(not record.ok for record in records)
        if not failed:
            return float(np.percentile(values, self.percentile)) if values else None
        values += [np.inf] * (failed * max(1, round(len(values) / max(1, len(good)))))
        # Between a number and infinity numpy would interpolate to NaN.
        return float(np.percentile(values, self.percentile, method="higher"))


@dataclass(frozen=True, slots=True)
class Slo:
    """All of its bounds."""

    bounds: tuple[Bound, ...]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Raises SloError."""
        return cls(tuple(_bound(part.strip()) for part in text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.bounds))

    def of_whole_answers(self) -> Slo:
        """The bounds that an answer which comes whole can be judged by."""
        return Slo(tuple(bound for bound in self.bounds if bound.quantity == "e2e"))

    def met_by(self, record: Record) -> bool:
        return all(bound.met_by(record) for bound in self.bounds)

    def missed(self, records: Sequence[Record], service: bool = False) -> list[str]:
        """What does not hold, in words."""
        found = []
        for bound in self.bounds:
            value = bound.measured(records, service)
            if value is None and any(record.ok for record in records):
                continue  # as the TPOT of answers of one token
            if value is None or not value < bound.limit_s:
                told = "was not measured" if value is None else f"is {value * 1e3:.4g} ms"
                found.append(
                    f"{bound.quantity}_p{bound.percentile:.12g} {told}, not below {bound.limit_s * 1e3:.12g} ms"
                )
        return found


def _bound(text: str) -> Bound:
    found = _BOUND.fullmatch(text.lower())
    if found is None or found[1] not in QUANTITIES or not 0 < float(found[2]) <= 100:
        raise SloError(
            f"{text!r} is no objective; write one of {', '.join(QUANTITIES)}, a percentile and a limit: ttft_p95<500ms"
        )
    return Bound(found[1], float(found[2]), float(found[3]) / (1e3 if found[4] == "ms" else 1))
