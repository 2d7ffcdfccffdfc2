"""The figures of a run: what they are, which limits they must hold, and their forms for people and programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from perf.charts import Series, lines
from perf.plot import Axis
from tests.chaos.census import Process, Tasks, growth, slope
from tests.chaos.load import Outcome

# Limits of a soak (R11).
MEMORY_MB_PER_MIN = 0.5
DRIFT = 0.05
LAG_P99_S = 0.05
# A descriptor or thread more or less is no leak: connections open and close while the census samples.
FLAT = 8
# A shorter window shows how caches fill and not whether memory leaks.
JUDGED_S = 480
_BUCKET_S = 10.0
_MAX_SERIES = 8
_STYLE = """body { font: 15px sans-serif; max-width: 1000px; margin: 2em auto } table { border-collapse: collapse }
td, th { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ccc } svg { width: 100%; max-width: 760px }
path { fill: none; stroke-width: 1.5 } .grid { stroke: #ddd } .base { stroke: #555 } .s0 { stroke: #1f77b4 }
.s1 { stroke: #d95f02 } .s2 { stroke: #1b9e77 } .s3 { stroke: #7570b3 } .s4 { stroke: #e7298a } .s5 { stroke: #666 }
.s6 { stroke: #a6761d } .s7 { stroke: #000 }"""


@dataclass(frozen=True)
class Check:
    """A figure with its limit, both in `unit`. `judged` is False if the run was too short for it.

    A figure of a process has the process's name and a name that it shares with those of other processes.
    """

    name: str
    value: float
    limit: float
    unit: str
    judged: bool = True
    process: str = ""

    @property
    def held(self) -> bool:
        return not self.judged or self.value <= self.limit


@dataclass(frozen=True)
class Fault:
    """One injected fault: when it began, ended and was recovered from, in seconds of the run; what became of requests.

    `lost` are requests that ended with an error or early; `reasons` their details.
    """

    name: str
    began: float
    ended: float
    recovered: float
    cuts: bool
    requests: int = 0
    lost: int = 0
    longest_gap_s: float = 0.0
    reasons: tuple[str, ...] = ()


@dataclass
class Figures:
    """All that a run has measured. `warm_s` is the time after which memory and latency are judged."""

    title: str
    seed: int
    seconds: float
    warm_s: float
    kinds: dict[str, int]
    faults: list[Fault]
    checks: list[Check]
    outcomes: Sequence[Outcome] = field(repr=False, default=())
    processes: Sequence[Process] = field(repr=False, default=())
    began: float = 0.0

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)

    def text(self) -> str:
        """The figures as tables for a terminal."""
        parts = [f"{self.title}, seed {self.seed}, {self.seconds:.0f} s", ""]
        parts += [f"requests: {', '.join(f'{count} {kind}' for kind, count in sorted(self.kinds.items()))}", ""]
        if self.faults:
            parts += [*_columns(_FAULT_HEAD, map(_fault_row, self.faults)), ""]
            parts += [f"{one.name}: {reason}" for one in self.faults for reason in one.reasons[:3]]
        parts += [*_columns(_CHECK_HEAD, [_check_row(one) for one in self.checks if not one.process]), ""]
        parts += [*self._by_process(), ""]
        return "\n".join(parts)

    def _by_process(self) -> list[str]:
        """A line for each process. A figure above its limit has a star, in parentheses if it is not judged."""
        of_process = [one for one in self.checks if one.process]
        names = dict.fromkeys(one.name for one in of_process)
        rows: dict[str, dict[str, str]] = {}
        for one in of_process:
            mark = "" if one.value <= one.limit else " *" if one.judged else " (*)"
            rows.setdefault(one.process, {})[one.name] = f"{one.value:.2f}{mark}"
        cells = [[process, *(row.get(name, "") for name in names)] for process, row in rows.items()]
        return _columns(["process", *names], cells) if rows else []

    def write(self, folder: Path) -> None:
        """figures.json, processes.csv, requests.csv and report.html with the curves."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "title": self.title, "seed": self.seed, "seconds": round(self.seconds, 1), "requests": self.kinds,
            "held": self.held, "faults": [asdict(one) for one in self.faults],
            "checks": [{**asdict(one), "held": one.held} for one in self.checks],
        }  # fmt: skip
        (folder / "figures.json").write_text(json.dumps(document, indent=2))
        _write_rows(
            folder / "processes.csv", ("process", "seconds", "rss_mb", "descriptors", "threads"), self._samples()
        )
        rows = (
            [round(one.began - self.began, 3), *list(asdict(one).values())[:2], *_times(one)] for one in self.outcomes
        )
        _write_rows(folder / "requests.csv", ("seconds", "request", "kind", "ttft_s", "total_s", "detail"), rows)
        (folder / "report.html").write_text(self._html())

    def _samples(self) -> Iterable[list[Any]]:
        for one in self.processes:
            for values in zip(one.times, one.rss_mb, one.descriptors, one.threads, strict=True):
                yield [one.name, *(round(value, 2) for value in values)]

    def _html(self) -> str:
        seconds = Axis("seconds from the start")
        charts = [
            f"<h2>{title}</h2>{lines(title, series, seconds, Axis(label), mode='lines')}"
            for title, series, label in (
                ("Memory by process", self._curves("rss_mb"), "resident MB"),
                ("Growth of memory after the warm-up", self._growth(), "MB"),
                ("Open descriptors by process", self._curves("descriptors"), "descriptors"),
                ("Threads by process", self._curves("threads"), "threads"),
                ("Time to first token", self.latencies(), "ms"),
            )
            if any(one.points for one in series)
        ]
        body = f"<h1>{escape(self.title)}</h1><pre>{escape(self.text())}</pre>{''.join(charts)}"
        return f"<!doctype html><meta charset=utf-8><title>{escape(self.title)}</title><style>{_STYLE}</style>{body}"

    def _shown(self) -> list[Process]:
        """The largest processes that ran for most of the run."""
        lasting = [one for one in self.processes if one.times and one.times[-1] - one.times[0] > self.seconds / 2]
        return sorted(lasting, key=lambda one: -one.rss_mb[-1])[:_MAX_SERIES]

    def _curves(self, value: str) -> list[Series]:
        shown = self._shown()
        return [Series(one.name, list(zip(one.times, getattr(one, value), strict=True))) for one in shown]

    def _growth(self) -> list[Series]:
        found = []
        for one in self._shown():
            pairs = [(at, mb) for at, mb in zip(one.times, one.rss_mb, strict=True) if at >= self.warm_s]
            found.append(Series(one.name, [(at, mb - pairs[0][1]) for at, mb in pairs]))
        return found

    def latencies(self) -> list[Series]:
        """p50 and p95 of the time to first token in every 10 s, in ms."""
        buckets: dict[int, list[float]] = {}
        for one in self.outcomes:
            if one.ttft_s is not None and one.kind == "answered":
                buckets.setdefault(int((one.began - self.began) / _BUCKET_S), []).append(one.ttft_s * 1e3)
        points = sorted(buckets.items())
        return [
            Series(f"p{percent}", [((at + 0.5) * _BUCKET_S, float(np.percentile(ms, percent))) for at, ms in points])
            for percent in (50, 95)
        ]


def of_processes(processes: Iterable[Process], seconds: float, warm_s: float) -> list[Check]:
    """The slope of memory and the growth of descriptors and threads of each process that ran to the end."""
    checks, judged = [], seconds - warm_s >= JUDGED_S
    for one in processes:
        if not one.times or one.times[0] > warm_s or one.times[-1] < seconds - 10:
            continue
        per_min = slope(one.times, one.rss_mb, warm_s)
        if per_min is not None:
            checks.append(Check("memory MB/min", per_min, MEMORY_MB_PER_MIN, "MB/min", judged, one.name))
        more = growth(one.times, one.descriptors, warm_s), growth(one.times, one.threads, warm_s)
        checks.append(Check("descriptors more", more[0], FLAT, "", process=one.name))
        checks.append(Check("threads more", more[1], FLAT, "", process=one.name))
    return checks


def of_loops(loops: Iterable[Tasks], seconds: float, warm_s: float) -> list[Check]:
    """The growth of the tasks of each event loop that ran to the end."""
    lasting = [one for one in loops if one.times[0] <= warm_s and one.times[-1] >= seconds - 10]
    return [Check("tasks more", growth(one.times, one.counts, warm_s), FLAT, "", process=one.name) for one in lasting]


def drift(outcomes: Iterable[Outcome], began: float, seconds: float, warm_s: float) -> Check | None:
    """By how much the median time to first token of the last third after the warm-up is above that of the first."""
    third = (seconds - warm_s) / 3
    thirds: tuple[list[float], list[float]] = ([], [])
    for one in outcomes:
        at = one.began - began - warm_s
        if one.ttft_s is not None and one.kind == "answered" and at >= 0 and (at < third or 2 * third <= at):
            thirds[at >= third].append(one.ttft_s)
    if min(map(len, thirds)) < 20:
        return None
    first, last = (float(np.median(values)) for values in thirds)
    return Check("drift of the median TTFT", last / first - 1, DRIFT, "ratio", seconds - warm_s >= JUDGED_S)


_FAULT_HEAD = ("fault", "at s", "recovered s", "requests", "lost", "longest pause s")
_CHECK_HEAD = ("figure", "value", "limit", "unit", "")


def _fault_row(one: Fault) -> tuple[str, ...]:
    recovered = f"{one.recovered - one.began:.1f}"
    gap = f"{one.longest_gap_s:.1f}"
    return one.name, f"{one.began:.0f}", recovered, str(one.requests), str(one.lost), gap


def _check_row(one: Check) -> tuple[str, ...]:
    verdict = "ok" if one.value <= one.limit else "MISSED"
    return (
        one.name,
        f"{one.value:.3g}",
        f"{one.limit:g}",
        one.unit,
        verdict if one.judged else f"({verdict}: too short)",
    )


def _columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _times(one: Outcome) -> list[Any]:
    ttft = "" if one.ttft_s is None else round(one.ttft_s, 4)
    return [ttft, round(one.ended - one.began, 4), one.detail]


def _write_rows(file: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([head, *rows])
