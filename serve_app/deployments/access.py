"""Who may use an ingress: its API keys, the address that it listens on, and the audit log.

The packages of the database and of tokens are imported when they are needed: a service without keys starts sooner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from serve_app.config import AppConfig
from serve_app.core.tenants import Identity, NoTenants, Tenants

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from serve_app.tenants.authenticator import KeyAuthenticator

logger = logging.getLogger("ray.serve")

# The actor of what the service does by itself.
SERVICE = Identity("", "service", frozenset())
# The actor of a call without a key.
_ANYONE = "anyone"
_CONTROLLER_TIMEOUT_S = 10.0


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
            from serve_app.tenants.authenticator import KeyAuthenticator

            self.authenticator = KeyAuthenticator(config.auth, config.database)
            self.tenants = self.authenticator.directory
            telemetry.watch_keys(self.authenticator.directory.age_s)

    async def start(self) -> None:
        """Raises ConfigError if strangers could reach the service although the configuration does not say so.

        `serve deploy` takes files that no program of this package has checked.
        """
        if self._config.auth is None:
            host = await _listening_host()
            if host is not None:
                self._config.check_address(host)
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
        try:
            await asyncio.to_thread(self._record, actor, action, target, details)
        except Exception:
            logger.exception("Audit: %s %r by %s: %s. The database has no entry.", action, target, actor, details)

    def _record(self, *about: Any) -> None:
        from serve_app.database import open_database
        from serve_app.tenants.audit_log import record_action

        if self._database is None:
            self._database = open_database(self._config.database)
        record_action(self._database, *about)


async def _listening_host() -> str | None:
    """The address on which Ray Serve's proxies listen; None if none runs. Ray has no public interface for it."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    async with asyncio.timeout(_CONTROLLER_TIMEOUT_S):
        options = await controller.get_http_config.remote()
    return None if options.host is None else str(options.host)
