"""`python -m perf.report results.json`: a run as an offline HTML file, or as Markdown, CSV or JUnit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from perf import export, html_report
from perf.exits import Exit
from perf.results import ResultsError, Run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.report",
        description="Writes a run of perf.suite as one HTML file without external resources, as Markdown for a "
        "README, as CSV with one row per stage, or as JUnit for a CI server.",
        epilog="Exit codes: 0 success; 2 the input is not a run, or the output could not be written.",
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="results.json", help="results of perf.suite")
    parser.add_argument("--format", choices=("html", "md", "csv", "junit"), default="html", help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html next to the run; other formats are printed"
    )
    parser.add_argument("--columns", action="store_true", help="print the meaning of the CSV columns and exit")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.columns:
        print("\n".join(f"{name:27} {meaning}" for name, meaning, _ in export.COLUMNS))
        return Exit.OK
    if args.run is None:
        parser.error("the path of a results.json is required")
    make = {"html": html_report.render, "md": export.markdown, "csv": export.csv, "junit": export.junit}[args.format]
    output: Path | None = args.output or (args.run.with_name("report.html") if args.format == "html" else None)
    try:
        text = make(Run.read(args.run))
        if output is None:
            sys.stdout.write(text)
        else:
            export.write(output, text)
            print(output)
    except ResultsError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{output}: {error.strerror}")
    return Exit.OK


def _fail(message: str) -> int:
    print(f"perf.report: {message}", file=sys.stderr)
    return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
