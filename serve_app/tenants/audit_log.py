"""The audit log: who did which administrative action, in the log and in a table. The calls block."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, insert, select

from serve_app.tenants.tables import audit

log = logging.getLogger(__name__)
# As long as the columns of the table.
_LONGEST = 256


@dataclass(frozen=True, slots=True)
class Action:
    """`at` is in seconds since 1970. `actor` is the public id of a key, or the user of a command line."""

    at: float
    actor: str
    action: str
    target: str
    details: dict[str, Any]


def write_action(
    connection: Connection, at: float, actor: str, action: str, target: str, details: dict[str, Any]
) -> None:
    """Write an action within a transaction."""
    actor, target = actor[:_LONGEST], target[:_LONGEST]
    connection.execute(insert(audit).values(at=at, actor=actor, action=action, target=target, details=details))
    log.info("Audit: %s %s by %s: %s", action, target, actor, json.dumps(details, sort_keys=True))


def record_action(database: Engine, actor: str, action: str, target: str, details: dict[str, Any]) -> None:
    """Write an action. Raises sqlalchemy.exc.SQLAlchemyError."""
    with database.begin() as connection:
        write_action(connection, time.time(), actor, action, target, details)


def recent_actions(database: Engine, limit: int) -> list[Action]:
    """The latest actions, the newest first. Raises sqlalchemy.exc.SQLAlchemyError."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    with database.connect() as connection:
        return [Action(row.at, row.actor, row.action, row.target, row.details) for row in connection.execute(query)]
