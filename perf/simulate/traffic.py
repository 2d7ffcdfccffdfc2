"""The requests of a day, or of a part of it: conversations of many users that begin with common system prompts.

The users are simulated by their arrival process: conversations begin by a Poisson process whose rate follows the time
of the day and bursts, and each belongs to a user that is drawn at random. Only conversations have state. The times of
all requests are fixed before the simulation (open loop), so that all strategies get the same requests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from perf.simulate.settings import Burst, Traffic

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

PEAK_HOUR = 15.0
_DAY_S = 86_400.0
# Digests: bit 62 marks a system prompt, the bits above 20 its family or its conversation, the bits below the block.
_FAMILY = 1 << 62
_BLOCK_BITS = 20
_LONGEST_PROMPT, _LONGEST_ANSWER = 12_000, 2_000


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests in the order of their arrival; all arrays have one entry for each."""

    at: Floats
    session: Ints
    user: Ints
    family: Ints
    common: Ints  # tokens of the system prompt
    prompt: Ints  # tokens, the system prompt and the conversation so far included
    answer: Ints
    named: NDArray[np.bool_]  # whether the caller names its session
    seconds: float

    def __len__(self) -> int:
        return len(self.at)

    def digests(self, number: int, tokens: int, block: int) -> array[int]:
        """The digests of the whole blocks of the first `tokens` tokens of a request and its answer."""
        blocks = tokens // block
        common = min(int(self.common[number]) // block, blocks)
        of_family = _FAMILY | int(self.family[number]) << _BLOCK_BITS
        own = int(self.session[number]) + 1 << _BLOCK_BITS
        found = array("Q", range(of_family, of_family + common))
        found.extend(range(own + common, own + blocks))
        return found


def relative_rate(traffic: Traffic, bursts: tuple[Burst, ...], at: Floats) -> Floats:
    """The rate at the given seconds, relative to the mean of a day."""
    hours = traffic.from_hour + at / 3600
    rate: Floats = 1 + traffic.diurnal * np.cos(2 * np.pi * (hours - PEAK_HOUR) / 24)
    for burst in bursts:
        rate = np.where((at >= burst.at_s) & (at < burst.at_s + burst.seconds), rate * burst.factor, rate)
    return rate


def generate(traffic: Traffic, seed: int) -> Trace:
    rng = np.random.default_rng(seed)
    bursts = (*traffic.bursts, *_random_bursts(traffic, rng))
    starts = _session_starts(traffic, bursts, rng)
    sessions = len(starts)
    turns = rng.geometric(1 / traffic.turns, sessions)
    session = np.repeat(np.arange(sessions), turns)
    count = len(session)
    turn = np.arange(count) - np.repeat(np.cumsum(turns) - turns, turns)
    family = _zipf(traffic.families, traffic.zipf, rng.random(sessions))
    common = _lengths(rng, traffic.family_tokens, 0.8, traffic.families, 4096)[family][session]
    message = _lengths(rng, traffic.message_tokens, 1.0, count, 4096)
    answer = _lengths(rng, traffic.answer_tokens, 0.7, count, _LONGEST_ANSWER)
    # A prompt has all messages and answers before it.
    before = np.where(turn > 0, np.roll(answer, 1), 0)
    prompt = common + _cumulated(message + before, turns).astype(np.int64)
    # The next message comes after the answer, generated at a usual speed, and a pause.
    gap = np.where(turn > 0, np.roll(answer, 1) / 25.0 + rng.lognormal(np.log(traffic.think_s) - 0.5, 1.0, count), 0.0)
    at = starts[session] + _cumulated(gap, turns)
    kept = np.flatnonzero((at >= 0) & (at < traffic.seconds) & (prompt <= _LONGEST_PROMPT))
    order = kept[np.argsort(at[kept], kind="stable")]
    user = rng.integers(0, traffic.users, sessions)
    named = rng.random(sessions) < traffic.named_sessions
    of = session[order]
    return Trace(
        at[order], of, user[of], family[of], common[order], prompt[order], answer[order], named[of], traffic.seconds
    )


def _session_starts(traffic: Traffic, bursts: tuple[Burst, ...], rng: np.random.Generator) -> Floats:
    """A Poisson process with a rate per second, from long before the trace on, so that conversations are under way.

    The requests of a burst are new conversations, therefore it is felt longer than it lasts.
    """
    before = 8 * traffic.think_s * traffic.turns
    seconds = np.arange(-before, traffic.seconds)
    mean = traffic.users * traffic.sessions_per_day / _DAY_S
    counts = rng.poisson(mean * relative_rate(traffic, bursts, seconds))
    return np.sort(np.repeat(seconds, counts) + rng.random(int(counts.sum())))


def _random_bursts(traffic: Traffic, rng: np.random.Generator) -> Iterator[Burst]:
    for _ in range(rng.poisson(traffic.hourly_bursts * traffic.seconds / 3600)):
        yield Burst(rng.uniform(0, traffic.seconds), rng.uniform(30, 300), rng.uniform(1.2, 1.8))


def _zipf(count: int, exponent: float, uniform: Floats) -> Ints:
    """Ranks from 0 with probabilities by Zipf's law."""
    weights = np.arange(1, count + 1) ** -exponent
    ranks: Ints = np.searchsorted(np.cumsum(weights) / weights.sum(), uniform)
    return np.minimum(ranks, count - 1)


def _lengths(rng: np.random.Generator, mean: float, sigma: float, count: int, most: int) -> Ints:
    """Log-normal lengths in tokens, of at least 1."""
    lengths: Ints = np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), 1, most).astype(np.int64)
    return lengths


def _cumulated(values: Floats | Ints, turns: Ints) -> Floats:
    """The sums of the values of each conversation up to each of its requests; exact for whole numbers below 2**53."""
    sums: Floats = np.cumsum(values, dtype=np.float64)
    ends = np.cumsum(turns)
    before = np.concatenate([[0], sums[ends[:-1] - 1]]) if len(ends) else sums
    cumulated: Floats = sums - np.repeat(before, turns)
    return cumulated
