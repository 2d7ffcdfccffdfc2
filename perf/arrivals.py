"""Arrival schedules of open loops: endless, seeded series of times (in seconds after the start) of requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import sqrt
from pathlib import Path

import numpy as np

_GAPS_PER_DRAW = 1024


def constant(rate: float) -> Iterator[float]:
    return (number / rate for number in count())


def gamma(rate: float, cv: float, seed: int) -> Iterator[float]:
    """Independent gaps with mean 1 / rate and coefficient of variation `cv`; above 1, arrivals are bursty."""
    shape = 1 / cv**2
    rng, at = np.random.default_rng(seed), 0.0
    while True:
        for gap in rng.gamma(shape, 1 / (rate * shape), _GAPS_PER_DRAW):
            at += gap
            yield float(at)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """A gamma distribution with coefficient of variation 1 is the exponential distribution."""
    return gamma(rate, 1, seed)


def burst(rate: float, size: int) -> Iterator[float]:
    """`size` requests at the same instant; the bursts are spaced so that the mean rate is `rate`."""
    return (number // size * size / rate for number in count())


def ramp(rate: float, ramp_s: float) -> Iterator[float]:
    """The rate rises linearly from 0 to `rate` within `ramp_s` seconds, and stays there.

    Until t, rate * t^2 / (2 * ramp_s) requests are due; the schedule is the inverse of this function.
    """
    rising = int(rate * ramp_s / 2)
    for number in count():
        if number < rising:
            yield sqrt(2 * number * ramp_s / rate)
        else:
            yield ramp_s + (number - rate * ramp_s / 2) / rate


class TraceError(Exception):
    """The trace file cannot be used; the message gives the line and the expected format."""


@dataclass(frozen=True, slots=True)
class TraceEntry:
    at_s: float
    prompt_words: int
    max_tokens: int


def trace(path: Path) -> list[TraceEntry]:
    """Reads JSON lines in the format of Mooncake's published traces, sorted by time and shifted to start at 0 s.

    Fields: `timestamp` (ms), `input_length` and `output_length` (tokens). Raises TraceError.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    entries = [_trace_entry(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise TraceError(f"{path} contains no request")
    first = min(entry.at_s for entry in entries)
    shifted = (TraceEntry(entry.at_s - first, entry.prompt_words, entry.max_tokens) for entry in entries)
    return sorted(shifted, key=lambda entry: entry.at_s)


def _trace_entry(path: Path, number: int, line: str) -> TraceEntry:
    try:
        document = json.loads(line)
        entry = TraceEntry(document["timestamp"] / 1e3, int(document["input_length"]), int(document["output_length"]))
        if entry.at_s < 0 or entry.prompt_words < 1 or entry.max_tokens < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        example = '{"timestamp": 1500, "input_length": 60, "output_length": 64}'
        raise TraceError(f"{path}:{number}: invalid trace line; expected a line like {example}") from None
    return entry
