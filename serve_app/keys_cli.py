"""The command `python -m serve_app keys`: creates, lists, rotates and revokes API keys, and shows the audit log."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine

from serve_app.core.tenants import Scope
from serve_app.tenants.api_key import ApiKey
from serve_app.tenants.audit_log import recent_actions
from serve_app.tenants.store import DEFAULT_TENANT, KeyRecord, NewKey, TenantStore, to_json
from serve_app.tenants_cli import actor, add_database, add_limits, duration, given_limits, name, run, table

_LONGEST_LABEL = 128
_DESCRIPTION = (
    "API keys of the service. A running service knows a change after `auth.refresh_s` seconds, 2 by default. The "
    "secret of a key is shown once, when it is created: the database has only a digest of it."
)
_EPILOG = """examples:
  python -m serve_app keys create --name ci                          # a key for requests to all models
  python -m serve_app keys create --tenant acme --models small,legal --expires 90d --requests-per-minute 600
  python -m serve_app keys create --name prometheus --scopes metrics
  python -m serve_app keys rotate 3f9c01d2a4b7 --grace 24h           # both keys are valid for a day
  python -m serve_app keys revoke 3f9c01d2a4b7
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, or 1 after an error."""
    arguments = _parser().parse_args(argv)
    commands = {"create": _create, "list": _list, "rotate": _rotate, "revoke": _revoke, "audit": _audit}
    return run(arguments, commands[arguments.command])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app keys",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="create a key and print it")
    create.add_argument("--tenant", type=name, default=DEFAULT_TENANT, help="owner of the key (default: %(default)s)")
    create.add_argument("--name", type=_label, help="what the key is for, for lists and the audit log")
    create.add_argument(
        "--scopes",
        type=_scopes,
        default="inference",
        help="inference (requests to models), metrics (/metrics, /load), admin (LoRA adapters, experiments); several "
        "with commas (default: %(default)s)",
    )
    create.add_argument("--models", type=_names, help="models, adapters and experiments, with commas (default: all)")
    create.add_argument(
        "--expires", type=duration, metavar="TIME", help="lifetime, e.g. 12h or 90d (default: for ever)"
    )
    add_limits(create)
    listing = commands.add_parser("list", help="list the keys, without their secrets")
    listing.add_argument("--tenant", type=name, help="only the keys of this tenant")
    rotate = commands.add_parser(
        "rotate",
        help="create a key in place of another one, which stays valid for a while",
        description=_rotate.__doc__,
    )
    rotate.add_argument("id", help="the id of the key, the 12 digits after sk-serve-")
    rotate.add_argument(
        "--grace", type=duration, default="24h", metavar="TIME", help="validity of the old key (default: %(default)s)"
    )
    revoke = commands.add_parser("revoke", help="make a key invalid at once")
    revoke.add_argument("id", help="the id of the key, the 12 digits after sk-serve-")
    audit = commands.add_parser("audit", help="show the latest actions of administrators")
    audit.add_argument("--limit", type=int, default=50, help="number of actions (default: %(default)s)")
    for command in (create, listing, rotate, revoke, audit):
        add_database(command)
    return parser


def _create(arguments: argparse.Namespace, database: Engine) -> None:
    wanted = NewKey(
        arguments.tenant,
        arguments.name or "",
        arguments.scopes,
        arguments.models,
        given_limits(arguments),
        None if arguments.expires is None else arguments.expires.total_seconds(),
    )
    _show_new(*TenantStore(database, actor()).create_key(wanted), arguments.json)


def _list(arguments: argparse.Namespace, database: Engine) -> None:
    records = TenantStore(database).list_keys(arguments.tenant)
    if arguments.json:
        print(json.dumps([_facts(record) for record in records], indent=2))
        return
    rows = [
        [
            record.id,
            record.tenant,
            record.name or "-",
            ",".join(sorted(record.scopes)),
            "all" if record.models is None else ",".join(sorted(record.models)),
            record.state(datetime.now(UTC).timestamp()),
            _time(record.created),
            _time(record.expires),
            _time(record.last_used),
        ]
        for record in records
    ]
    print(table(["id", "tenant", "name", "scopes", "models", "state", "created", "expires", "last used"], rows))


def _rotate(arguments: argparse.Namespace, database: Engine) -> None:
    """Create a key with the tenant, scopes, models and limits of another one, which stays valid for --grace."""
    store = TenantStore(database, actor())
    _show_new(*store.rotate_key(arguments.id, arguments.grace.total_seconds()), arguments.json)


def _revoke(arguments: argparse.Namespace, database: Engine) -> None:
    TenantStore(database, actor()).revoke_key(arguments.id)
    print(json.dumps({"id": arguments.id, "state": "revoked"}) if arguments.json else f"Key {arguments.id} is revoked.")


def _audit(arguments: argparse.Namespace, database: Engine) -> None:
    actions = recent_actions(database, arguments.limit)
    if arguments.json:
        found = [{**_fields(one), "at": _iso(one.at)} for one in actions]
        print(json.dumps(found, indent=2))
        return
    rows = [[_time(one.at), one.actor, one.action, one.target, json.dumps(one.details)] for one in actions]
    print(table(["at", "actor", "action", "target", "details"], rows))


def _show_new(key: ApiKey, record: KeyRecord, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"key": str(key), **_facts(record)}, indent=2))
        return
    print(f"{key}\n\nThis is the only time that the key is shown. Its id is {record.id}, its tenant {record.tenant}.")


def _facts(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "name": record.name,
        "scopes": sorted(record.scopes),
        "models": None if record.models is None else sorted(record.models),
        "limits": to_json(record.limits),
        "state": record.state(datetime.now(UTC).timestamp()),
        "created": _iso(record.created),
        "expires": _iso(record.expires),
        "revoked": _iso(record.revoked),
        "last_used": _iso(record.last_used),
    }


def _fields(action: Any) -> dict[str, Any]:
    return {one: getattr(action, one) for one in action.__dataclass_fields__}


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _time(at: float | None) -> str:
    return "-" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def _label(text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= _LONGEST_LABEL:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: use at most {_LONGEST_LABEL} printable characters")
    return text


def _scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(one) for one in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: the scopes are {', '.join(Scope)}") from None


def _names(text: str) -> frozenset[str]:
    found = frozenset(one.strip() for one in text.split(",") if one.strip())
    if not found:
        raise argparse.ArgumentTypeError("expected names with commas between them")
    return found
