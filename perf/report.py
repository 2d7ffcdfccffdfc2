"""`python -m perf.report results.json`: a run as one page that needs no network, or as Markdown, CSV or JUnit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from perf import export, page
from perf.exits import Exit
from perf.results import ResultsError, Run


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="python -m perf.report",
        description="Shows a run of perf.suite: as one HTML page that loads nothing, as Markdown for a README, "
        "as CSV with one row a stage, or as JUnit for a CI server.",
        epilog="Exit codes: 0 written; 2 the file is no run, or could not be written.",
    )
    words.add_argument("run", type=Path, nargs="?", metavar="results.json", help="what perf.suite wrote")
    words.add_argument("--format", choices=("html", "md", "csv", "junit"), default="html", help="default: %(default)s")
    words.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html beside the run; other formats are printed"
    )
    words.add_argument("--columns", action="store_true", help="say what the columns of the CSV mean, and end")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    words = parser()
    asked = words.parse_args(arguments)
    if asked.columns:
        print("\n".join(f"{name:27} {meaning}" for name, meaning, _ in export.COLUMNS))
        return Exit.OK
    if asked.run is None:
        words.error("which run? Give the results.json that perf.suite wrote")
    make = {"html": page.render, "md": export.markdown, "csv": export.csv, "junit": export.junit}[asked.format]
    output: Path | None = asked.output or (asked.run.with_name("report.html") if asked.format == "html" else None)
    try:
        text = make(Run.read(asked.run))
        if output is None:
            sys.stdout.write(text)
        else:
            export.write(output, text)
            print(output)
    except ResultsError as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{output}: {error.strerror}")
    return Exit.OK


def _refused(why: str) -> int:
    print(f"perf.report: {why}", file=sys.stderr)
    return Exit.USAGE


if __name__ == "__main__":
    sys.exit(main())
