"""What a run does: the command line with everything decided that was left open."""

from __future__ import annotations

import argparse
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perf import arrivals
from perf.arrivals import Traced
from perf.dialects import Api
from perf.gate import Window
from perf.options import DEFAULT_SLO, PROFILE_SIZES, SCENARIOS, USUAL
from perf.results import Load, Scenario
from perf.slo import Slo

STREAMED: set[Scenario] = {"streaming", "concurrency", "rate", "find-max"}

Arrival = Literal["constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"]
_RAMP_S = 60.0
# Of each of the eight levels of --quick, for its warm-up and for its window: a slow machine has fewer requests.
_QUICK_S = 1.5


@dataclass(frozen=True)
class Settings:
    """`slo` is None where nothing is judged; `skipped` says of what cannot be done why."""

    url: str
    api: Api
    model: str | None
    timeout_s: float
    prompt: str | None
    prompt_words: int
    max_tokens: int
    seed: int
    salt: str
    fixed_length: bool
    scenarios: tuple[Scenario, ...]
    skipped: dict[str, str]
    quick: bool
    num_requests: int
    duration_s: float | None
    batch_sizes: tuple[int, ...]
    profile_sizes: tuple[int, ...]
    concurrency: tuple[int, ...]
    rates: tuple[float, ...]
    arrival: Arrival
    burstiness: float
    burst_size: int
    trace: tuple[Traced, ...]
    warmup: int | Literal["auto"]
    repeats: int
    slo: Slo | None
    instance_type: str | None

    def told(self) -> dict[str, Any]:
        """As it goes into results.json."""
        elsewhere = ("url", "api", "model", "trace", "skipped", "slo")
        kept = {name: value for name, value in vars(self).items() if name not in elsewhere and value not in (None, ())}
        return {**kept, "traced_requests": len(self.trace)} if self.trace else kept

    def window(self, together: int, requests: int | None = None) -> Window:
        """Of a level on which so many are under way at a time."""
        warmup_limit_s = _QUICK_S if self.quick else 20.0
        if self.duration_s is not None:
            return Window(None, self.duration_s, self.warmup, warmup_limit_s)
        at_most_s = _QUICK_S if self.quick else None
        return Window(max(requests or self.num_requests, 2 * together), at_most_s, self.warmup, warmup_limit_s)

    def schedule(self, load: Load, part: str) -> Iterator[float]:
        """Of an open loop; another part of a run has another one by the same seed."""
        rate, seed = load.rate or 0.0, self.seed + zlib.crc32(part.encode())
        match load.arrival:
            case "constant":
                return arrivals.constant(rate)
            case "poisson":
                return arrivals.poisson(rate, seed)
            case "gamma":
                return arrivals.gamma(rate, self.burstiness, seed)
            case "burst":
                return arrivals.burst(rate, self.burst_size)
            case "ramp":
                return arrivals.ramp(rate, self.duration_s or _RAMP_S)
            case "trace":
                return iter([one.at_s for one in self.trace])
            case "closed":
                raise AssertionError("a closed loop has no schedule")


def settings(asked: argparse.Namespace, fail: Callable[[str], Any]) -> Settings:
    """`fail` is told, in a sentence, of what does not go together. Raises TraceError."""
    arrival: Arrival = asked.arrival or ("trace" if asked.trace else "poisson")
    if (arrival == "trace") != (asked.trace is not None):
        fail("--arrival trace and --trace FILE belong together")
    if arrival == "trace":
        _refuse(asked, ("rate", "num_requests", "duration", "max_tokens", "prompt"), "a trace says that itself", fail)
    if asked.fail_on is not None and asked.baseline is None:
        fail("--fail-on belongs to --baseline FILE")
    if arrival == "closed" and asked.rate:
        fail("--arrival closed has no --rate: requests are sent when a stream is free; give --concurrency")
    scenarios = _scenarios(asked, arrival, fail)
    skipped: dict[str, str] = {}
    if asked.api == "tgi":
        skipped = {
            name: "TGI has no call for several prompts" for name in ("batch", "batch-profile") if name in scenarios
        }
    scenarios = tuple(name for name in scenarios if name not in skipped)
    if not scenarios:
        fail(f"nothing is left to measure: {'; '.join(skipped.values())}")
    if asked.slo and asked.slo.of_whole_answers() != asked.slo and not set(scenarios) & STREAMED:
        fail(f"--slo {asked.slo} has times of tokens, and nothing that is measured streams; add concurrency to --only")
    quick = asked.quick
    slo = asked.slo or (Slo.parse(DEFAULT_SLO) if "find-max" in scenarios else None)
    return Settings(
        url=asked.url,
        api=asked.api,
        model=asked.model,
        timeout_s=asked.timeout,
        prompt=asked.prompt,
        prompt_words=asked.prompt_words,
        max_tokens=asked.max_tokens or (32 if quick else 64),
        seed=asked.seed,
        salt=secrets.token_hex(4),
        fixed_length=not asked.no_fixed_length and asked.api != "tgi",
        scenarios=scenarios,
        skipped=skipped,
        quick=quick,
        num_requests=asked.num_requests or (8 if quick else 20),
        duration_s=asked.duration,
        batch_sizes=_ascending(asked.batch_sizes or ((1, 4, 8) if quick else (1, 4, 8, 16))),
        profile_sizes=_ascending(asked.batch_sizes or PROFILE_SIZES),
        concurrency=_ascending(asked.concurrency or ((1, 4, 16) if quick else (1, 2, 4, 8, 16, 32))),
        rates=tuple(sorted(set(asked.rate or ()))),
        arrival=arrival,
        burstiness=asked.burstiness,
        burst_size=asked.burst_size,
        trace=tuple(arrivals.trace(Path(asked.trace))) if asked.trace is not None else (),
        warmup=asked.warmup,
        repeats=asked.repeats,
        slo=slo,
        instance_type=asked.instance_type,
    )


def _refuse(asked: argparse.Namespace, names: Sequence[str], why: str, fail: Callable[[str], Any]) -> None:
    for name in names:
        if getattr(asked, name):
            fail(f"leave out --{name.replace('_', '-')}: {why}")


def _scenarios(asked: argparse.Namespace, arrival: Arrival, fail: Callable[[str], Any]) -> tuple[Scenario, ...]:
    """Those of --only or the usual ones, and what other options ask for beside them."""
    chosen: set[Scenario] = set(asked.only or USUAL)
    if asked.find_max:
        chosen.add("find-max")
    if asked.rate or arrival == "trace":
        if asked.only is not None and "rate" not in chosen:
            fail("--rate and --trace are for the scenario rate; add it to --only")
        chosen.add("rate")
    if asked.arrival not in (None, "trace") and not chosen & {"rate", "find-max"}:
        fail("--arrival is how a --rate arrives, or what --find-max searches with; give one of them")
    if "rate" in chosen and not asked.rate and arrival != "trace":
        fail("the scenario rate wants --rate, such as --rate 2 4 8")
    if "find-max" in chosen and arrival in ("ramp", "trace"):
        fail(f"find-max cannot search with --arrival {arrival}; use poisson, constant, gamma, burst or closed")
    return tuple(name for name in SCENARIOS if name in chosen)


def _ascending(numbers: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))
