"""The tenants and keys of the database in the memory of a process, read again after each change."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from serve_app.core.tenants import CredentialsRefused, Identity, Limits, Tenant
from serve_app.database import first_line
from serve_app.tenants.api_key import NO_KEY, parse_key
from serve_app.tenants.store import KeyRecord, TenantStore

log = logging.getLogger(__name__)

# A key that is used all the time is written to the database this often, in seconds.
_LAST_USED_INTERVAL_S = 60.0
_NO_LIMITS = Limits()
# What an unknown id is compared with, so that it takes the same work as a known one.
_NO_RECORD = KeyRecord("", NO_KEY.digest, "", "", frozenset(), None, _NO_LIMITS, 0.0, revoked=0.0)


# The answers to a wrong key. Only the owner of the secret learns that a key has expired or was revoked.
_MESSAGES = {
    "invalid": "The API key is not valid.",
    "expired": "The API key has expired.",
    "revoked": "The API key was revoked.",
}


@dataclass(frozen=True, slots=True)
class _State:
    revision: int = -1
    tenants: dict[str, Tenant] = field(default_factory=dict)
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)


class Directory:
    """Implements `core.tenants.Tenants`. Reads return at once; a thread keeps the state up to date.

    A change is known after `refresh_s` seconds. While the database cannot be read, the last state stays.
    """

    def __init__(
        self, open_store: Callable[[], TenantStore], refresh_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`open_store` is called in the thread, again after each failure. `clock` returns seconds since 1970."""
        self._open_store = open_store
        self._store: TenantStore | None = None
        self._refresh_s = refresh_s
        self._clock = clock
        self._state = _State()
        self._used: dict[str, float] = {}
        self._wrote_used = time.monotonic()
        self._refreshed: float | None = None
        self._failing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tenants", daemon=True)

    def start(self) -> None:
        """Read the state once, if the database can be read, and keep it up to date until `stop`."""
        self._refresh()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._write_used()
        if self._store is not None:
            self._store.close()

    def age_s(self) -> float | None:
        """The seconds since the state was last known to be that of the database; None if it never was."""
        return None if self._refreshed is None else time.monotonic() - self._refreshed

    def tenant(self, name: str) -> Tenant:
        return self._state.tenants.get(name) or Tenant(name)

    def key_limits(self, key: str) -> Limits:
        record = self._state.keys.get(key)
        return _NO_LIMITS if record is None else record.limits

    def identify(self, text: str) -> Identity:
        """The identity that a key proves. Raises CredentialsRefused.

        The work is the same for an unknown id and for a wrong secret, and the comparison takes constant time.
        """
        state, key = self._state, parse_key(text)
        given = NO_KEY if key is None else key
        record = state.keys.get(given.id, _NO_RECORD)
        matches = hmac.compare_digest(given.digest, record.digest)
        if not matches or record is _NO_RECORD:
            raise CredentialsRefused("invalid", _MESSAGES["invalid"])
        now = self._clock()
        reason = record.state(now)
        if reason != "active":
            raise CredentialsRefused(reason, _MESSAGES[reason])
        self._used[record.id] = now
        return state.identities[record.id]

    def _run(self) -> None:
        while not self._stopped.wait(self._refresh_s):
            self._refresh()
            if time.monotonic() - self._wrote_used > _LAST_USED_INTERVAL_S:
                self._write_used()

    def _refresh(self) -> None:
        try:
            if self._store is None:
                self._store = self._open_store()
            number = self._store.revision()
            if number != self._state.revision:
                self._state = _read(self._store, number)
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread must go on
            if not self._failing:
                log.error("The keys cannot be read; the last state stays. %s", first_line(error))
            self._failing = True
            return
        if self._failing:
            log.info("The keys can be read again.")
        self._failing, self._refreshed = False, time.monotonic()

    def _write_used(self) -> None:
        used, self._used, self._wrote_used = self._used, {}, time.monotonic()
        try:
            if used and self._store is not None:
                self._store.used(used)
        except Exception as error:  # noqa: BLE001
            log.warning("The last use of %d keys was not written. %s", len(used), first_line(error))


def _read(store: TenantStore, number: int) -> _State:
    """The state is at least as new as the revision, which was read before it."""
    keys = {record.id: record for record in store.list_keys()}
    identities = {key: Identity(one.tenant, key, one.scopes, one.models) for key, one in keys.items()}
    return _State(number, {tenant.name: tenant for tenant in store.list_tenants()}, keys, identities)
