"""Who may use an ingress: its API keys, the address that it listens on, and the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import AppConfig
from serve_app.core.tenants import Identity, NoTenants, Tenants
from serve_app.database import open_database
from serve_app.tenants.audit_log import record_action
from serve_app.tenants.authenticator import KeyAuthenticator

logger = logging.getLogger("ray.serve")

# The actor of what the service does by itself.
SERVICE = Identity("", "service", frozenset())
# The actor of a call without a key.
_ANYONE = "anyone"


class WatchesKeys(Protocol):
    """A telemetry that shows the age of the API keys."""

    def watch_keys(self, age_s: Callable[[], float | None]) -> None: ...


class Access:
    """The keys and tenants of one ingress. Without `auth` everyone may do everything, but only on this machine."""

    def __init__(self, config: AppConfig, telemetry: WatchesKeys) -> None:
        self._config = config
        self._database: Engine | None = None
        self.authenticator: KeyAuthenticator | None = None
        self.tenants: Tenants = NoTenants()
        if config.auth is not None and config.checks_keys:
            self.authenticator = KeyAuthenticator(config.auth, config.database)
            self.tenants = self.authenticator.directory
            telemetry.watch_keys(self.authenticator.directory.age_s)

    async def start(self) -> None:
        """Raises ConfigError if strangers could reach the service although the configuration does not say so.

        `serve deploy` takes files that no program of this package has checked.
        """
        self._config.check_address(await asyncio.to_thread(_listening_host))
        if self.authenticator is not None:
            await asyncio.to_thread(self.authenticator.start)

    async def stop(self) -> None:
        if self.authenticator is not None:
            await asyncio.to_thread(self.authenticator.stop)
        if self._database is not None:
            await asyncio.to_thread(self._database.dispose)

    async def audit(self, identity: Identity, action: str, target: str, details: dict[str, Any]) -> None:
        """Record an action of an administrator in the log and in the database.

        The action has happened: if the database cannot be written, the log line alone has it.
        """
        actor = identity.key or _ANYONE
        logger.info("Audit: %s %r by %s: %s", action, target, actor, details)
        try:
            await asyncio.to_thread(self._record, actor, action, target, details)
        except SQLAlchemyError:
            logger.exception("The audit log cannot be written.")

    def _record(self, *about: Any) -> None:
        if self._database is None:
            self._database = open_database(self._config.database)
        record_action(self._database, *about)


def _listening_host() -> str:
    """The address on which Ray Serve's proxies listen; Ray has no public interface for it."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client().http_config.host)
