"""The command line of `python -m perf.suite`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

from perf.dialects import DIALECTS
from perf.results import Scenario
from perf.slo import Slo, SloError

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
DEFAULT_SCENARIOS: tuple[Scenario, ...] = ("single", "batch", "streaming", "concurrency")
DEFAULT_SLO = "ttft_p95<500ms,tpot_p95<50ms"
PROFILE_SIZES = (1, 2, 4, 8, 16, 32)

_EPILOG = """\
examples:
  python -m perf.suite                                  the four default scenarios against localhost:8000
  python -m perf.suite --quick                          the same scenarios in less than a minute
  python -m perf.suite --rate 2 4 8 --slo 'ttft_p95<500ms,tpot_p95<50ms'
  python -m perf.suite --only find-max --arrival closed the highest number of streams that meets the objective
  python -m perf.suite --only batch-profile             advice for max_batch_size
  python -m perf.suite --api openai --model m --url http://localhost:8001   vLLM, llama.cpp and others

exit codes: 0 success; 1 an objective was missed, requests failed, or a metric regressed against the baseline;
2 invalid arguments; 3 no server answers; 4 the client was the bottleneck, so the metrics do not describe the server.
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.suite",
        description="Load tests of an LLM service over HTTP, with a verdict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_target(parser.add_argument_group("target"))
    _add_requests(parser.add_argument_group("requests"))
    _add_load(parser.add_argument_group("load"))
    _add_evaluation(parser.add_argument_group("evaluation"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://localhost:8000", type=_url, help="default: %(default)s")
    group.add_argument("--api", choices=tuple(DIALECTS), default="native", help="API of the server (default: native)")
    group.add_argument("--model", help="model name, if the server has several or requires one (default: the first)")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the bearer token")
    group.add_argument("--timeout", type=seconds, default=120.0, help="limit for one request (default: 120s)")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompt", help="the same prompt for all requests; a prefix cache makes it cheap")
    group.add_argument(
        "--prompt-words",
        type=positive,
        default=60,
        help="length of the random prompts that are sent without --prompt (default: 60)",
    )
    group.add_argument("--max-tokens", type=positive, help="length of a response in tokens (default: 64)")
    group.add_argument("--seed", type=int, default=7, help="seed of prompts and arrivals (default: 7)")
    group.add_argument(
        "--no-fixed-length",
        action="store_true",
        help="let responses end at the end of text; by default ignore_eos is sent where the server accepts it, so "
        "that all responses have the same length",
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--only", type=_scenarios, metavar="NAME,...", help=f"scenarios to run: {', '.join(SCENARIOS)}")
    group.add_argument("--quick", action="store_true", help="fewer levels and requests: less than a minute")
    group.add_argument(
        "--num-requests",
        type=positive,
        help="requests per level (default: 20); at least 2 per stream and 10 s of a rate; half as many for batches",
    )
    group.add_argument("--duration", type=seconds, help="length of a level, instead of a number of requests")
    group.add_argument("--batch-sizes", type=positive, nargs="+", metavar="N", help="default: 1 4 8 16")
    group.add_argument("--concurrency", type=positive, nargs="+", metavar="N", help="default: 1 2 4 8 16 32")
    group.add_argument("--rate", type=_rate, nargs="+", metavar="R", help="requests/s; adds the scenario rate")
    group.add_argument(
        "--arrival",
        choices=("constant", "poisson", "gamma", "burst", "ramp", "closed", "trace"),
        help="arrival process of a rate (default: poisson); closed: each stream sends after its response",
    )
    group.add_argument("--burstiness", type=_rate, default=2.0, help="coefficient of variation of gamma (default: 2)")
    group.add_argument("--burst-size", type=positive, default=10, help="requests per burst (default: 10)")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="JSON lines: timestamp (ms), input_length, output_length"
    )
    group.add_argument(
        "--warmup",
        type=_warmup,
        default="auto",
        help="number of requests that are not measured, or auto: until latency is steady",
    )
    group.add_argument("--repeats", type=positive, default=1, help="repeats of every level, in turn (default: 1)")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo", type=_slo, help=f"objective, such as {DEFAULT_SLO}")
    group.add_argument("--find-max", action="store_true", help="search for the highest load that meets the SLO")
    group.add_argument("--baseline", type=Path, metavar="FILE", help="results.json of an earlier run to compare with")
    group.add_argument(
        "--fail-on", type=_percent, help="smallest regression against the baseline that fails the run (default: 5%%)"
    )
    group.add_argument("--instance-type", metavar="TYPE", help="cloud instance type, for the cost per million tokens")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        default=Path("perf-results"),
        help="folder for all files, or the path of the .json file (default: %(default)s)",
    )
    group.add_argument("--json", action="store_true", help="print only the results as JSON on standard output")


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+.*", text):
        raise argparse.ArgumentTypeError(f"invalid URL {text!r}; write http://host:port")
    if "@" in text.split("/")[2]:
        raise argparse.ArgumentTypeError("the URL must not contain a key, since it is printed; use --api-key-file")
    return text.rstrip("/")


def positive(text: str) -> int:
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


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)?", text)
    seconds = float(match[1]) * {"ms": 1e-3, "s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match is not None else 0
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"invalid duration {text!r}; write 30s or 2m")
    return seconds


def _percent(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid percentage {text!r}; write 5%")
    return float(match[1]) / 100


def _warmup(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of requests")
    return int(text)


def _scenarios(text: str) -> list[Scenario]:
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"unknown scenario {name!r}; choose from {', '.join(SCENARIOS)}")
    return [name for name in SCENARIOS if name in chosen]


def _slo(text: str) -> Slo:
    try:
        return Slo.parse(text)
    except SloError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
