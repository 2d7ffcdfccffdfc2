"""The command `python -m serve_app usage`: prints what keys and tenants have used, from the database."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Engine

from serve_app.config import ConfigError
from serve_app.core.usage import MOST_ROWS, UsageQuery
from serve_app.core.usage_report import groups_of, instant, month_begin, table, to_csv, with_cost
from serve_app.tenants.usage_store import UsageStore
from serve_app.tenants_cli import add_database, run

_EPILOG = """examples:
  python -m serve_app usage                                          # this month, by tenant, key and model
  python -m serve_app usage --group-by day,model --tenant acme --from 2026-11-01 --to 2026-12-01
  python -m serve_app usage --group-by month,tenant --csv
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 after an error."""
    return run(_parser().parse_args(argv), _print)


def _print(arguments: argparse.Namespace, database: Engine) -> None:
    groups = arguments.group_by
    query = UsageQuery(arguments.begin, arguments.end, arguments.tenant, arguments.key, arguments.model, groups)
    rows = [with_cost(row) for row in UsageStore(database).report(query)]
    if len(rows) > MOST_ROWS:
        raise ConfigError(f"the report has more than {MOST_ROWS} rows; choose a shorter time or fewer groups")
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif arguments.csv:
        sys.stdout.write(to_csv(rows, groups))
    else:
        print("\n".join(_aligned(table(rows, groups), len(groups))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app usage",
        description="The requests, the tokens and the cost of keys and tenants. Times are in UTC, and whole hours are "
        "counted. A running service writes what was used every `quotas.flush_s` seconds, 5 by default.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    when = "a date such as 2026-11-30 or 2026-11-30T12:00, or seconds since 1970"
    parser.add_argument(
        "--from",
        dest="begin",
        metavar="TIME",
        type=_type(instant),
        default=month_begin(),
        help=f"{when} (default: this month)",
    )
    parser.add_argument(
        "--to", dest="end", metavar="TIME", type=_type(instant), default=time.time(), help="the end (default: now)"
    )
    parser.add_argument(
        "--group-by",
        metavar="GROUPS",
        type=_type(groups_of),
        default=groups_of("tenant,key,model"),
        help="hour, day, month, tenant, key, model; several with commas (default: tenant,key,model)",
    )
    for name in ("tenant", "key", "model"):
        parser.add_argument(f"--{name}", help=f"only this {name}")
    parser.add_argument("--csv", action="store_true", help="print CSV")
    add_database(parser)
    return parser


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
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
