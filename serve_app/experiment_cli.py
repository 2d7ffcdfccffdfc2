"""The command `python -m serve_app experiments`: prints the reports of a running service, and checks a config file."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_app.config import ConfigError
from serve_app.direct import opener
from serve_app.serve_file import load_serve_file

_TIMEOUT_S = 10.0
_KEY_VARIABLE = "SERVE_APP_API_KEY"
# Title, unit and digits of each metric of a report. Times are in milliseconds, shares in percent.
_METRICS = {
    "ttft": ("TTFT mean", "ms", 1000.0),
    "ttft_p95": ("TTFT p95", "ms", 1000.0),
    "tpot": ("TPOT mean", "ms", 1000.0),
    "length": ("answer length", "tokens", 1.0),
    "error_rate": ("failed", "%", 100.0),
    "feedback": ("feedback score", "", 1.0),
}


class ReportError(Exception):
    """The service gave no report. The message says why."""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if the report was printed or the file is valid, else 1."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "check":
            options = load_serve_file(arguments.config).application.deployments
            names = [experiment.name for one in options for experiment in one.user_config.experiments]
            print(f"{arguments.config}: valid; experiments: {', '.join(names) or 'none'}")
            return 0
        reports = _reports(arguments.url.rstrip("/"), _key(arguments.key_file))
    except (ConfigError, ReportError) as error:
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    print(json.dumps(reports, indent=2) if arguments.format == "json" else "\n".join(_table(reports)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app experiments", description="Experiments of the service.")
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="compare the variants of each experiment with their control",
        description="Compare the variants of each experiment with their control. The intervals hold the true values at "
        "all times together with the confidence that the report states, so that the report can be read at any time and "
        "as often as you like.",
    )
    report.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
    report.add_argument(
        "--key-file",
        type=Path,
        help="file with an API key with the scope admin (default: the environment's SERVE_APP_API_KEY)",
    )
    report.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    check = commands.add_parser("check", help="check a config file and its experiments before it is deployed")
    check.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    return parser


def _key(file: Path | None) -> str:
    """The API key for a service that demands one, or "". Raises ReportError."""
    if file is None:
        return os.environ.get(_KEY_VARIABLE, "")
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"--key-file {file}: {error}") from None


def _reports(url: str, key: str) -> dict[str, Any]:
    """Raises ReportError."""
    request = urllib.request.Request(f"{url}/experiments", headers={"authorization": f"Bearer {key}"} if key else {})  # noqa: S310 (an http URL)
    try:
        with opener(url).open(request, timeout=_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ReportError(f"{url}/experiments gave no report: {error}; set the address with --url") from None
    return found


def _table(reports: dict[str, Any]) -> Iterator[str]:
    if reports["error"]:
        yield f"The latest configuration was refused, the earlier one applies. {reports['error']}\n"
    if not reports["experiments"]:
        yield "The service has no experiments."
    for report in reports["experiments"]:
        yield from _lines(report)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    began = datetime.fromtimestamp(report["began"], UTC).isoformat(timespec="seconds") if report["began"] else "-"
    yield f"{report['name']} (revision {report['revision']}), by {report['unit']}, since {began}"
    yield f"verdict: {report['verdict']}"
    yield f"intervals hold together at all times with {report['confidence']:.0%} confidence\n"
    header = ["metric", *(f"{one['name']} ({one['percent']:g} %)" for one in report["variants"])]
    header += [f"{one['name']} - {report['variants'][0]['name']}" for one in report["variants"][1:]]
    rows = [header, ["requests", *(str(sum(one["outcomes"].values())) for one in report["variants"])]]
    for metric, (title, unit, scale) in _METRICS.items():
        cells = [_cell(one["metrics"][metric], scale) for one in report["variants"]]
        for one in report["variants"][1:]:
            difference = one["differences"][metric]
            cells.append(f"{_cell(difference, scale, '+')}: {difference['verdict']}")
        rows.append([f"{title} {unit}".strip(), *cells])
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(header))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
    yield ""


def _cell(found: dict[str, Any], scale: float, sign: str = "") -> str:
    """A value with its interval; `..` for an end that is not known."""
    if found["value"] is None:
        return "-"
    low, high = (".." if found[end] is None else f"{found[end] * scale:.4g}" for end in ("low", "high"))
    return f"{found['value'] * scale:{sign}.4g} [{low}, {high}]"
