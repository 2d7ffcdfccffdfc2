"""The settings of a run: the command line, checked, with all defaults filled in."""

from __future__ import annotations

import argparse
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perf import arrivals
from perf.arrivals import TraceEntry
from perf.dialects import Api
from perf.options import DEFAULT_SCENARIOS, DEFAULT_SLO, PROFILE_SIZES, SCENARIOS
from perf.phases import Window
from perf.results import Load, Scenario
from perf.slo import Slo

STREAMING_SCENARIOS: set[Scenario] = {"streaming", "concurrency", "rate", "find-max"}

Arrival = Literal["constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"]
_RAMP_S = 60.0
# Limit of the warm-up and of the window of each of the eight levels of --quick, for slow machines.
_QUICK_S = 1.5


@dataclass(frozen=True)
class Settings:
    """`slo` is None without an objective; `skipped` maps scenarios that cannot run to the reason."""

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
    trace: tuple[TraceEntry, ...]
    warmup: int | Literal["auto"]
    repeats: int
    slo: Slo | None
    instance_type: str | None

    def to_results(self) -> dict[str, Any]:
        """The settings that results.json lists; it has the others in fields of their own."""
        elsewhere = ("url", "api", "model", "trace", "skipped", "slo")
        kept = {name: value for name, value in vars(self).items() if name not in elsewhere and value not in (None, ())}
        return {**kept, "traced_requests": len(self.trace)} if self.trace else kept

    def window(self, concurrency: int, requests: int | None = None) -> Window:
        """The window of a level with this number of requests in flight."""
        warmup_limit_s = _QUICK_S if self.quick else 20.0
        if self.duration_s is not None:
            return Window(None, self.duration_s, self.warmup, warmup_limit_s)
        limit_s = _QUICK_S if self.quick else None
        return Window(max(requests or self.num_requests, 2 * concurrency), limit_s, self.warmup, warmup_limit_s)

    def schedule(self, load: Load, part: str) -> Iterator[float]:
        """The schedule of an open loop; each `part` of a run has its own, all drawn from the same seed."""
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
                return iter([entry.at_s for entry in self.trace])
            case "closed":
                raise AssertionError("a closed loop has no schedule")


def settings(args: argparse.Namespace, fail: Callable[[str], Any]) -> Settings:
    """Calls `fail` with a sentence for options that contradict each other. Raises TraceError."""
    arrival: Arrival = args.arrival or ("trace" if args.trace else "poisson")
    if (arrival == "trace") != (args.trace is not None):
        fail("--arrival trace requires --trace FILE, and --trace requires --arrival trace")
    if arrival == "trace":
        reason = "the trace defines it"
        _reject(args, ("rate", "num_requests", "duration", "max_tokens", "prompt"), reason, fail)
    if args.fail_on is not None and args.baseline is None:
        fail("--fail-on requires --baseline FILE")
    if arrival == "closed" and args.rate:
        fail("--arrival closed has no --rate: a stream sends its next request after its response; give --concurrency")
    scenarios = _scenarios(args, arrival, fail)
    skipped: dict[str, str] = {}
    if args.api == "tgi":
        skipped = {
            name: "TGI has no call for several prompts" for name in ("batch", "batch-profile") if name in scenarios
        }
    scenarios = tuple(name for name in scenarios if name not in skipped)
    if not scenarios:
        fail(f"no scenario is left to run: {'; '.join(skipped.values())}")
    if args.slo and args.slo.without_streaming() != args.slo and not set(scenarios) & STREAMING_SCENARIOS:
        fail(f"--slo {args.slo} needs token times, but no chosen scenario streams; add concurrency to --only")
    quick = args.quick
    slo = args.slo or (Slo.parse(DEFAULT_SLO) if "find-max" in scenarios else None)
    return Settings(
        url=args.url,
        api=args.api,
        model=args.model,
        timeout_s=args.timeout,
        prompt=args.prompt,
        prompt_words=args.prompt_words,
        max_tokens=args.max_tokens or (32 if quick else 64),
        seed=args.seed,
        salt=secrets.token_hex(4),
        fixed_length=not args.no_fixed_length and args.api != "tgi",
        scenarios=scenarios,
        skipped=skipped,
        quick=quick,
        num_requests=args.num_requests or (8 if quick else 20),
        duration_s=args.duration,
        batch_sizes=_ascending(args.batch_sizes or ((1, 4, 8) if quick else (1, 4, 8, 16))),
        profile_sizes=_ascending(args.batch_sizes or PROFILE_SIZES),
        concurrency=_ascending(args.concurrency or ((1, 4, 16) if quick else (1, 2, 4, 8, 16, 32))),
        rates=tuple(sorted(set(args.rate or ()))),
        arrival=arrival,
        burstiness=args.burstiness,
        burst_size=args.burst_size,
        trace=tuple(arrivals.trace(Path(args.trace))) if args.trace is not None else (),
        warmup=args.warmup,
        repeats=args.repeats,
        slo=slo,
        instance_type=args.instance_type,
    )


def _reject(args: argparse.Namespace, names: Sequence[str], reason: str, fail: Callable[[str], Any]) -> None:
    for name in names:
        if getattr(args, name):
            fail(f"remove --{name.replace('_', '-')}: {reason}")


def _scenarios(args: argparse.Namespace, arrival: Arrival, fail: Callable[[str], Any]) -> tuple[Scenario, ...]:
    """The scenarios of --only or the default ones, and those that other options add."""
    chosen: set[Scenario] = set(args.only or DEFAULT_SCENARIOS)
    if args.find_max:
        chosen.add("find-max")
    if args.rate or arrival == "trace":
        if args.only is not None and "rate" not in chosen:
            fail("--rate and --trace need the scenario rate; add it to --only")
        chosen.add("rate")
    if args.arrival not in (None, "trace") and not chosen & {"rate", "find-max"}:
        fail("--arrival applies to --rate and --find-max; give one of them")
    if "rate" in chosen and not args.rate and arrival != "trace":
        fail("the scenario rate requires --rate, such as --rate 2 4 8")
    if "find-max" in chosen and arrival in ("ramp", "trace"):
        fail(f"find-max cannot search with --arrival {arrival}; use poisson, constant, gamma, burst or closed")
    return tuple(name for name in SCENARIOS if name in chosen)


def _ascending(numbers: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))
