"""What can be said on the command line of `python -m perf.suite`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from perf.dialects import DIALECTS
from perf.results import Scenario
from perf.slo import Slo, SloError

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
USUAL: tuple[Scenario, ...] = ("single", "batch", "streaming", "concurrency")
DEFAULT_SLO = "ttft_p95<500ms,tpot_p95<50ms"
PROFILE_SIZES = (1, 2, 4, 8, 16, 32)

_EPILOG = """\
examples:
  python -m perf.suite                                  the four usual scenarios against localhost:8000
  python -m perf.suite --quick                          the same in under a minute
  python -m perf.suite --rate 2 4 8 --slo 'ttft_p95<500ms,tpot_p95<50ms'
  python -m perf.suite --only find-max --arrival closed most users at a time that the objective allows
  python -m perf.suite --only batch-profile             which max_batch_size pays
  python -m perf.suite --api openai --model m --url http://localhost:8001   vLLM, llama.cpp and others

exit codes: 0 all well; 1 an objective was missed, requests failed, or something got worse than the baseline;
2 wrong arguments; 3 nobody answers; 4 the client was the bottleneck, so that the figures are not the server's.
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.suite",
        description="Load tests of an LLM service over HTTP, with a verdict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _target(parser.add_argument_group("what is measured"))
    _work(parser.add_argument_group("what is asked"))
    _load(parser.add_argument_group("how much of it"))
    _judging(parser.add_argument_group("how it is judged"))
    _output(parser.add_argument_group("what comes out"))
    return parser


def _target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://localhost:8000", type=_url, help="default: %(default)s")
    group.add_argument("--api", choices=tuple(DIALECTS), default="native", help="what it speaks (default: native)")
    group.add_argument("--model", help="its name, where there are several or the API wants one (default: the first)")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the bearer token")
    group.add_argument("--timeout", type=_seconds, default=120.0, help="of one request (default: 120s)")


def _work(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", help="the same for everybody, which a prefix cache makes cheap")
    group.add_argument(
        "--prompt-words", type=_positive, default=60, help="of the random prompts without --prompt (default: 60)"
    )
    group.add_argument("--max-tokens", type=_positive, help="of an answer (default: 64)")
    group.add_argument("--seed", type=int, default=7, help="of prompts and arrivals (default: 7)")
    group.add_argument(
        "--no-fixed-length",
        action="store_true",
        help="let answers end by themselves; else ignore_eos is sent where the server takes it: equal lengths",
    )


def _load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--only", type=_scenarios, metavar="NAME,...", help=f"some of {', '.join(SCENARIOS)}")
    group.add_argument("--quick", action="store_true", help="fewer levels and requests: under a minute")
    group.add_argument(
        "--num-requests",
        type=_positive,
        help="at a level (default: 20): at least 2 for each stream, 10 s of a rate; half as many of a batch",
    )
    group.add_argument("--duration", type=_seconds, help="of a level, in place of a number of requests")
    group.add_argument("--batch-sizes", type=_positive, nargs="+", metavar="N", help="default: 1 4 8 16")
    group.add_argument("--concurrency", type=_positive, nargs="+", metavar="N", help="default: 1 2 4 8 16 32")
    group.add_argument("--rate", type=_rate, nargs="+", metavar="R", help="requests a second; adds the scenario rate")
    group.add_argument(
        "--arrival",
        choices=("constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"),
        help="how requests of a rate arrive (default: poisson); closed: as soon as a stream is free",
    )
    group.add_argument("--burstiness", type=_rate, default=2.0, help="coefficient of variation of gamma (default: 2)")
    group.add_argument("--burst-size", type=_positive, default=10, help="requests at once of burst (default: 10)")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="JSON lines: timestamp (ms), input_length, output_length"
    )
    group.add_argument(
        "--warmup", type=_warmup, default="auto", help="requests that do not count, or auto: until latency has settled"
    )
    group.add_argument("--repeats", type=_positive, default=1, help="of every level, in turn (default: 1)")


def _judging(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo", type=_slo, help=f"such as {DEFAULT_SLO}")
    group.add_argument("--find-max", action="store_true", help="search for the highest load that meets the SLO")
    group.add_argument("--baseline", type=Path, metavar="FILE", help="a results.json to compare with")
    group.add_argument(
        "--fail-on", type=_percent, help="a shift for the worse than the baseline that fails the run (default: 5%%)"
    )
    group.add_argument("--instance-type", metavar="TYPE", help="dollars a million tokens if it ran on this one")


def _output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        default=Path("perf-results"),
        help="folder for all, or a .json file (default: %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="results on standard output, and nothing else there")


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+.*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write http://host:port")
    if "@" in text.split("/")[2]:
        raise argparse.ArgumentTypeError("leave the key out of the address, it would be printed; use --api-key-file")
    return text.rstrip("/")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text)
    seconds = float(found[1]) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}[found[2] or "s"] if found is not None else 0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 30s or 2m")
    return seconds


def _percent(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; write 5%")
    return float(found[1]) / 100


def _warmup(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of requests")
    return int(text)


def _scenarios(text: str) -> list[Scenario]:
    chosen = [one.strip() for one in text.split(",")]
    for one in chosen:
        if one not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"there is no scenario {one!r}; choose of {', '.join(SCENARIOS)}")
    return [one for one in SCENARIOS if one in chosen]


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except SloError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
