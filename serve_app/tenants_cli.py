"""The command `python -m serve_app tenants`: their weights, limits and budgets."""

from __future__ import annotations

import argparse
import getpass
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import ConfigError
from serve_app.core.tenants import Limits, Tenant, is_tenant_name
from serve_app.database import first_line, open_database
from serve_app.database_config import DatabaseOptions
from serve_app.serve_file import load_serve_file
from serve_app.tenants.store import TenantStore, UnknownName, to_json

_CONFIG = "serve_config.yaml"
_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DESCRIPTION = (
    "Tenants: groups of API keys that share limits and budgets. While requests wait, tenants get tokens in proportion "
    "to their weights. A running service knows a change after `auth.refresh_s` seconds, 2 by default."
)
_EPILOG = """examples:
  python -m serve_app tenants set acme --weight 2 --tokens-per-minute 50000 --dollars-per-month 500
  python -m serve_app tenants set acme --tokens-per-minute none      # remove a limit
  python -m serve_app tenants list --json
"""

Command = Callable[[argparse.Namespace, Engine], None]


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 after an error."""
    arguments = _parser().parse_args(argv)
    return run(arguments, {"list": _list, "set": _set, "delete": _delete}[arguments.command])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app tenants",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list the tenants with their limits")
    change = commands.add_parser("set", help="create a tenant, or change what is given")
    change.add_argument("tenant", type=name)
    change.add_argument("--weight", type=_weight, help="share of the tokens while requests wait (default: 1)")
    add_limits(change)
    delete = commands.add_parser("delete", help="delete a tenant that has no keys")
    delete.add_argument("tenant", type=name)
    for command in (listing, change, delete):
        add_database(command)
    return parser


def _list(arguments: argparse.Namespace, database: Engine) -> None:
    tenants = TenantStore(database).list_tenants()
    if arguments.json:
        print(json.dumps([_facts(tenant) for tenant in tenants], indent=2))
        return
    rows = [[one.name, f"{one.weight:g}", _limits_text(one.limits)] for one in tenants]
    print(table(["tenant", "weight", "limits"], rows))


def _set(arguments: argparse.Namespace, database: Engine) -> None:
    store = TenantStore(database, actor())
    tenant = store.set_tenant(arguments.tenant, arguments.weight, _changed_limits(arguments))
    if arguments.json:
        print(json.dumps(_facts(tenant), indent=2))
    else:
        print(f"Tenant {tenant.name}: weight {tenant.weight:g}, limits: {_limits_text(tenant.limits)}.")


def _delete(arguments: argparse.Namespace, database: Engine) -> None:
    TenantStore(database, actor()).delete_tenant(arguments.tenant)
    print(json.dumps({"tenant": arguments.tenant}) if arguments.json else f"Tenant {arguments.tenant} is deleted.")


def run(arguments: argparse.Namespace, command: Command) -> int:
    """Run a command on the database of the arguments. Returns the exit code."""
    try:
        database = open_database(_database_options(arguments))
        try:
            command(arguments, database)
        finally:
            database.dispose()
    except (ConfigError, UnknownName) as error:
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    except SQLAlchemyError as error:
        print(f"serve_app: the database cannot be used: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _database_options(arguments: argparse.Namespace) -> DatabaseOptions:
    """Raises ConfigError. Without a configuration file the database is that of a service without options for it."""
    if arguments.database_url is not None:
        try:
            return DatabaseOptions(url=arguments.database_url)
        except ValueError as error:
            raise ConfigError(f"--database-url: {error}") from None
    if arguments.config == _CONFIG and not Path(_CONFIG).exists():
        return DatabaseOptions()
    return load_serve_file(arguments.config).application.args.database


def add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default=_CONFIG, help="Ray Serve config file, for its `database` (default: %(default)s)"
    )
    parser.add_argument("--database-url", help="SQLAlchemy URL of the database, in place of that of the config file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """An option for each field of `core.tenants.Limits`; `none` removes a limit."""
    group = parser.add_argument_group("limits", "a number, or none; days and months are those of UTC")
    for field in fields(Limits):
        whole = not field.name.startswith("dollars")
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_whole if whole else _dollars,
            metavar="N" if whole else "USD",
            dest=f"limit_{field.name}",
        )


def _changed_limits(arguments: argparse.Namespace) -> dict[str, float | None]:
    """The limits that are given, None for those to remove."""
    given = {field.name: getattr(arguments, f"limit_{field.name}") for field in fields(Limits)}
    return {key: None if value == "none" else value for key, value in given.items() if value is not None}


def given_limits(arguments: argparse.Namespace) -> Limits:
    values: Mapping[str, Any] = _changed_limits(arguments)
    return Limits(**values)


def actor() -> str:
    """The user of the command line, for the audit log."""
    try:
        return f"user {getpass.getuser()}"
    except (OSError, KeyError):
        return "a user without a name"


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def name(text: str) -> str:
    if not is_tenant_name(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a name: use letters, digits and . _ : @ -, at most 128 characters"
        )
    return text


def duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: use a number and s, m, h or d, for example 90d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.001 <= weight <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a weight: use a number from 0.001 to 1000")
    return weight


def _whole(text: str) -> int | str:
    if text == "none":
        return text
    if not re.fullmatch(r"\d{1,15}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a limit: use a whole number from 0, or none")
    return int(text)


def _dollars(text: str) -> float | str:
    if text == "none":
        return text
    if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text):
        raise argparse.ArgumentTypeError(f"{text} is not an amount: use a number of US dollars, or none")
    return float(text)


def _facts(tenant: Tenant) -> dict[str, Any]:
    return {"tenant": tenant.name, "weight": tenant.weight, "limits": to_json(tenant.limits)}


def _limits_text(limits: Limits) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in to_json(limits).items()) or "none"
