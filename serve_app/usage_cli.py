"""The command `python -m serve_app usage`: prints what keys and tenants have used, from the database."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from serve_app.config import ConfigError, DatabaseOptions
from serve_app.core.usage import MOST_ROWS, UsageQuery
from serve_app.core.usage_report import groups_of, instant, month_begin, table, to_csv, with_cost
from serve_app.serve_file import load_serve_file


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if the report was printed, else 1."""
    arguments = _parser().parse_args(argv)
    query = UsageQuery(
        arguments.begin, arguments.end, arguments.tenant, arguments.key, arguments.model, arguments.group_by
    )
    try:
        rows = _rows(load_serve_file(arguments.config).application.args.database, query)
    except (ConfigError, _ReportError) as error:
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    if len(rows) > MOST_ROWS:
        print(f"serve_app: more than {MOST_ROWS} rows; choose a shorter time or fewer groups", file=sys.stderr)
        return 1
    if arguments.format == "json":
        print(json.dumps(rows, indent=2))
    elif arguments.format == "csv":
        sys.stdout.write(to_csv(rows, arguments.group_by))
    else:
        print("\n".join(_aligned(table(rows, arguments.group_by), len(arguments.group_by))))
    return 0


class _ReportError(Exception):
    """The database gave no report. The message says why."""


def _rows(options: DatabaseOptions, query: UsageQuery) -> list[dict[str, Any]]:
    """Raises _ReportError."""
    from sqlalchemy.exc import SQLAlchemyError  # its import takes 0.3 s, which other commands need not wait for

    from serve_app.database import open_database
    from serve_app.tenants.usage_store import UsageStore

    try:
        store = UsageStore(open_database(options))
        rows = [with_cost(row) for row in store.report(query)]
        store.close()
    except SQLAlchemyError as error:
        raise _ReportError(f"the usage cannot be read: {str(error).splitlines()[0]}") from None
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app usage",
        description="Print the requests, the tokens and the cost of keys and tenants, from the database of the "
        "configuration file. Times are in UTC, and whole hours are counted.",
    )
    parser.add_argument("--config", default="serve_config.yaml", help="Ray Serve config file (default: %(default)s)")
    when = "a date such as 2026-11-30 or 2026-11-30T12:00, or seconds since 1970"
    parser.add_argument(
        "--from", dest="begin", type=_parsed(instant), default=month_begin(), help=f"{when} (default: this month)"
    )
    parser.add_argument("--to", dest="end", type=_parsed(instant), default=time.time(), help=f"{when} (default: now)")
    parser.add_argument(
        "--group-by",
        type=_parsed(groups_of),
        default=groups_of("tenant,key,model"),
        help="list with commas of hour, day, month, tenant, key, model (default: tenant,key,model)",
    )
    for name in ("tenant", "key", "model"):
        parser.add_argument(f"--{name}", help=f"only this {name}")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: %(default)s")
    return parser


def _parsed(parse: Any) -> Any:
    """The function as a type of argparse, whose error message is that of the exception."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines in columns; the first ones are aligned to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if number < left else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
