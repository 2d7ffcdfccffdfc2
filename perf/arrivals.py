"""When requests are due: endless schedules of open loops, in seconds from the start, each by its seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import sqrt
from pathlib import Path

import numpy as np

_AT_ONCE = 1024  # gaps drawn in one call


def constant(rate: float) -> Iterator[float]:
    return (number / rate for number in count())


def gamma(rate: float, cv: float, seed: int) -> Iterator[float]:
    """Independent gaps of mean 1 / rate and coefficient of variation `cv`: above 1 they come in clusters."""
    shape = 1 / cv**2
    rng, at = np.random.default_rng(seed), 0.0
    while True:
        for gap in rng.gamma(shape, 1 / (rate * shape), _AT_ONCE):
            at += gap
            yield float(at)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """A gamma of coefficient 1 is the exponential distribution."""
    return gamma(rate, 1, seed)


def burst(rate: float, size: int) -> Iterator[float]:
    """`size` requests at the same instant, as often as makes `rate` on average."""
    return (number // size * size / rate for number in count())


def ramp(rate: float, within_s: float) -> Iterator[float]:
    """From none to `rate` in a straight line, and on at that rate.

    Until t there are rate * t^2 / (2 * within_s) requests, of which this is the inverse.
    """
    rising = int(rate * within_s / 2)
    for number in count():
        if number < rising:
            yield sqrt(2 * number * within_s / rate)
        else:
            yield within_s + (number - rate * within_s / 2) / rate


class TraceError(Exception):
    """A file that is no trace; the sentence says which line is wrong and how it should look."""


@dataclass(frozen=True, slots=True)
class Traced:
    at_s: float
    prompt_words: int
    max_tokens: int


def trace(path: Path) -> list[Traced]:
    """JSON lines as in Mooncake's published traces: `timestamp` (ms), `input_length`, `output_length` (tokens).

    Raises TraceError.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    found = [_traced(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TraceError(f"{path} holds no request")
    first = min(one.at_s for one in found)
    moved = (Traced(one.at_s - first, one.prompt_words, one.max_tokens) for one in found)
    return sorted(moved, key=lambda one: one.at_s)


def _traced(path: Path, number: int, line: str) -> Traced:
    try:
        document = json.loads(line)
        one = Traced(document["timestamp"] / 1e3, int(document["input_length"]), int(document["output_length"]))
        if one.at_s < 0 or one.prompt_words < 1 or one.max_tokens < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        example = '{"timestamp": 1500, "input_length": 60, "output_length": 64}'
        raise TraceError(f"{path}:{number} is not like {example}") from None
    return one
