"""`python -m perf.compare baseline.json candidate.json`: a statistical comparison of two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from perf.comparison import (
    ALPHA,
    FAIL_ON,
    METRICS,
    Comparison,
    ComparisonError,
    Metric,
    Row,
    Verdict,
    change,
    compare,
    interval,
    percent,
)
from perf.exits import Exit
from perf.results import ResultsError, Run

__all__ = ["Comparison", "ComparisonError", "compare", "markdown", "share", "show"]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10_000 else f"{value:.0f}"


UNITS: dict[Metric, str] = {
    "ttft": "ttft ms",
    "tpot": "tpot ms",
    "e2e": "e2e ms",
    "tokens_per_s": "tokens/s",
    "errors": "errors %",
}


def _verdict_text(row: Row, fail_on: float) -> str:
    if row.verdict is Verdict.WORSE and not row.regression:
        return f"worse (< {percent(fail_on)})"
    return row.verdict.value


def _cells(row: Row, fail_on: float) -> tuple[str, ...]:
    numbers = (_number(row.baseline), _number(row.candidate), change(row), interval(row))
    return (UNITS[row.metric], *numbers, _verdict_text(row, fail_on))


HEADINGS = ("", "baseline", "candidate", "change", "95 % interval", "verdict")
WIDTHS = (10, 8, 9, 8, 18, 18)
STYLES = {Verdict.WORSE: "red", Verdict.BETTER: "green", Verdict.SAME: "", Verdict.TOO_FEW: "dim"}


def show(comparison: Comparison, console: Console) -> None:
    """Prints the comparison in 80 columns."""
    for condition in comparison.conditions:
        console.print(f"differs: {condition.what}: {condition.baseline} -> {condition.candidate}", style="dim")
    console.print(_grid([_headings(comparison.alpha)], ["bold"]))
    for where in dict.fromkeys(row.where for row in comparison.rows):
        rows = [row for row in comparison.rows if row.where == where]
        console.print(where, style="bold")
        console.print(_grid([_cells(row, comparison.fail_on) for row in rows], [STYLES[row.verdict] for row in rows]))
    for line in (*comparison.client_limited, *comparison.cautions):
        console.print(f"note: {line}", style="yellow")
    console.print(comparison.conclusion, style="bold")


def _headings(alpha: float) -> tuple[str, ...]:
    return tuple(heading.replace("95 %", percent(1 - alpha)) for heading in HEADINGS)


def _grid(lines: Sequence[Sequence[str]], styles: Sequence[str]) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    for number, width in enumerate(WIDTHS):
        grid.add_column(width=width, no_wrap=True, justify="right" if 0 < number < len(WIDTHS) - 1 else "left")
    for line, style in zip(lines, styles, strict=True):
        grid.add_row(*line, style=style)
    return grid


def markdown(comparison: Comparison) -> str:
    lines = ["# Comparison", "", comparison.conclusion, ""]
    lines += [f"- {line}" for line in (*comparison.client_limited, *comparison.cautions)]
    if comparison.conditions:
        lines += ["", "| differs | baseline | candidate |", "|---|---|---|"]
        lines += [_line((each.what, each.baseline, each.candidate)) for each in comparison.conditions]
    headings = ("stage", "metric", *_headings(comparison.alpha)[1:], "p")
    lines += ["", _line(headings), "|---|---|---:|---:|---:|---:|---|---:|"]
    for row in comparison.rows:
        p = "" if row.p is None else f"{row.p:.2g}"
        lines.append(_line((row.where, *_cells(row, comparison.fail_on), p)))
    method = (
        "Change: the median ratio of all pairs of requests. Its interval is a bootstrap over repeats (over blocks of "
        "time in a run with one repeat). p: Mann-Whitney test, corrected for these clusters and, by Holm's method, for "
        "the number of rows."
    )
    return "\n".join([*lines, "", method, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def share(text: str) -> float:
    """Parses `5%` as 0.05. Raises ArgumentTypeError."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not (text.endswith("%") and 0 <= value < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage; write 5% or 0%")
    return value


def _metrics(text: str) -> list[Metric]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METRICS)}")
    return [metric for metric in METRICS if metric in names]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability; write a number between 0 and 1, such as 0.05")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__)
    parser.add_argument("baseline", type=Path, help="results.json of the run to compare with")
    parser.add_argument("candidate", type=Path, help="results.json of the run to evaluate")
    parser.add_argument(
        "--fail-on",
        type=share,
        default=FAIL_ON,
        metavar="5%",
        help="the smallest change for the worse that is a regression (default 5%%: two runs of the same code can "
        "differ by less than that); with 0%% every significant change for the worse is one",
    )
    parser.add_argument(
        "--metrics", type=_metrics, default=METRICS, help=f"comma-separated list of {', '.join(METRICS)} (default: all)"
    )
    parser.add_argument("--alpha", type=_probability, default=ALPHA, help="probability of a false alarm (default 0.05)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON instead of the table")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="also write the comparison as Markdown")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        runs = Run.read(args.baseline), Run.read(args.candidate)
        comparison = compare(*runs, fail_on=args.fail_on, alpha=args.alpha, metrics=args.metrics)
        if args.output:
            args.output.write_text(markdown(comparison))
    except (ResultsError, ComparisonError) as error:
        print(error, file=sys.stderr)
        return Exit.USAGE
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return Exit.USAGE
    if args.json:
        print(comparison.model_dump_json(indent=2))
    else:
        terminal = sys.stdout.isatty()
        show(comparison, Console(width=80, force_terminal=terminal, no_color=not terminal, highlight=False))
    return comparison.exit_code


if __name__ == "__main__":
    sys.exit(main())
