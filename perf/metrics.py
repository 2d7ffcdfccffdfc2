"""Computes distributions, samples, error counts and timelines from request records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from perf.records import Record
from perf.results import Distribution, Samples, Second

PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}


def distribution(seconds: Iterable[float | None]) -> Distribution | None:
    """In ms; None if there is no value."""
    values = np.array([value for value in seconds if value is not None]) * 1e3
    if not len(values):
        return None
    percentiles = np.percentile(values, list(PERCENTILES.values()))
    return Distribution(
        count=len(values),
        mean=float(values.mean()),
        min=float(values.min()),
        max=float(values.max()),
        **dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
    )


def gap_quantiles(records: Sequence[Record]) -> list[float]:
    """Gaps between chunks in ms at 0, 1, ... 100 percent."""
    gaps = np.array([gap for record in records for gap in record.gaps]) * 1e3
    return [round(float(value), 4) for value in np.percentile(gaps, np.arange(101))] if len(gaps) else []


def samples(repeats: Sequence[tuple[float, Sequence[Record]]]) -> Samples:
    """`repeats`: start of the window and records of each repeat. Failed requests have no latency and are left out."""
    rows = [
        (repeat, record.due - opened, record)
        for repeat, (opened, records) in enumerate(repeats)
        for record in sorted(records, key=lambda record: record.due)
        if record.ok
    ]

    def ms(read: Callable[[Record], float | None]) -> list[float | None]:
        values = (read(record) for _, _, record in rows)
        return [None if value is None else round(value * 1e3, 4) for value in values]

    return Samples(
        repeat=[repeat for repeat, _, _ in rows],
        due_s=[round(due, 6) for _, due, _ in rows],
        ttft_ms=ms(lambda r: r.ttft),
        tpot_ms=ms(lambda r: r.tpot),
        e2e_ms=[value or 0.0 for value in ms(lambda r: r.e2e)],
        service_ms=[value or 0.0 for value in ms(lambda r: r.service)],
        longest_gap_ms=ms(lambda r: max(r.gaps, default=None)),
        tokens=[record.tokens for _, _, record in rows],
    )


def errors(records: Iterable[Record]) -> dict[str, int]:
    """Failures by kind, the most frequent first."""
    return dict(Counter(record.error for record in records if record.error is not None).most_common())


def timeline(records: Sequence[Record], opened: float, closed: float) -> list[Second]:
    """One entry for each full second of the window, over all requests including warm-up and cool-down."""
    count = int(closed - opened)
    edges = opened + np.arange(count + 1)
    streamed = [(r.chunks, np.array(r.events) * r.tokens_per_event) for r in records if r.chunks]
    unstreamed = [([r.done], np.array([r.tokens])) for r in records if not r.chunks and r.done is not None]
    tokens = np.zeros(count)
    for at, weights in [*streamed, *unstreamed]:
        tokens += np.histogram(at, edges, weights=weights)[0]
    sent = np.array([r.sent for r in records if r.sent is not None])
    done = np.array([r.done if r.done is not None else np.inf for r in records if r.sent is not None])
    started = np.histogram(sent, edges)[0]
    return [
        Second(
            at_s=float(second),
            tokens=round(float(tokens[second]), 2),
            started=int(started[second]),
            in_flight=int(((sent < edges[second + 1]) & (done >= edges[second + 1])).sum()),
        )
        for second in range(count)
    ]
