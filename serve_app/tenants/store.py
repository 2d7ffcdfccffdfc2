"""Reads and changes tenants and API keys in the database. The calls block, and raise sqlalchemy.exc.SQLAlchemyError.

Each change is one transaction, which also writes the audit log and the revision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select, update

from serve_app.core.tenants import Limits, Scope, Tenant
from serve_app.tenants.api_key import ApiKey, new_key
from serve_app.tenants.audit_log import write_action
from serve_app.tenants.tables import keys, revision, tenants

# The tenant of keys that are created without one. It needs not be created first.
DEFAULT_TENANT = "default"
_NO_LIMITS = Limits()


class UnknownName(Exception):
    """There is no tenant or key of this name, or the key can no longer be changed."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What the database knows of a key; instants are seconds since 1970. `models` None is all models."""

    id: str
    digest: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    limits: Limits
    created: float
    expires: float | None = None
    revoked: float | None = None
    last_used: float | None = None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a new key may do. It expires after `ttl_s` seconds; None is never."""

    tenant: str = DEFAULT_TENANT
    name: str = ""
    scopes: frozenset[Scope] = frozenset({Scope.INFERENCE})
    models: frozenset[str] | None = None
    limits: Limits = _NO_LIMITS
    ttl_s: float | None = None


class TenantStore:
    """`actor` names who makes the changes, for the audit log. `clock` returns seconds since 1970."""

    def __init__(self, database: Engine, actor: str = "", clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._actor = actor
        self._clock = clock

    def close(self) -> None:
        """Close the connections."""
        self._database.dispose()

    def create_key(self, wanted: NewKey) -> tuple[ApiKey, KeyRecord]:
        """The key with its secret, which is stored nowhere. Raises UnknownName if the tenant does not exist."""
        with self._change() as connection:
            known = connection.execute(select(tenants.c.name).where(tenants.c.name == wanted.tenant)).first()
            if known is None and wanted.tenant == DEFAULT_TENANT:
                _put_tenant(connection, Tenant(DEFAULT_TENANT), is_new=True)
            elif known is None:
                raise UnknownName(
                    f"tenant {wanted.tenant!r} does not exist; create it with: "
                    f"python -m serve_app tenants set {wanted.tenant}"
                )
            key, record = self._insert_key(connection, wanted)
            self._log(connection, "keys.create", record.id, _facts(record))
        return key, record

    def rotate_key(self, key_id: str, grace_s: float) -> tuple[ApiKey, KeyRecord]:
        """A new key in place of an active one, which expires after the grace period. The new key lives as long.

        Raises UnknownName.
        """
        with self._change() as connection:
            old, now = self._active(connection, key_id), self._clock()
            lifetime = None if old.expires is None else old.expires - old.created
            key, record = self._insert_key(
                connection, NewKey(old.tenant, old.name, old.scopes, old.models, old.limits, lifetime)
            )
            expires = now + grace_s if old.expires is None else min(old.expires, now + grace_s)
            connection.execute(update(keys).where(keys.c.id == key_id).values(expires=expires))
            self._log(connection, "keys.rotate", key_id, {"new": record.id, "old_expires": expires})
        return key, record

    def revoke_key(self, key_id: str) -> None:
        """Raises UnknownName if the key does not exist or is revoked."""
        with self._change() as connection:
            record = self._find(connection, key_id)
            if record.revoked is not None:
                raise UnknownName(f"key {key_id!r} is revoked already")
            connection.execute(update(keys).where(keys.c.id == key_id).values(revoked=self._clock()))
            self._log(connection, "keys.revoke", key_id, {"tenant": record.tenant})

    def set_tenant(self, name: str, weight: float | None = None, limits: Mapping[str, Any] | None = None) -> Tenant:
        """Create the tenant, or change what is given; a limit that is None is removed."""
        with self._change() as connection:
            row = connection.execute(select(tenants).where(tenants.c.name == name)).first()
            before = Tenant(name) if row is None else _tenant(row)
            changed = replace(
                before,
                weight=before.weight if weight is None else weight,
                limits=replace(before.limits, **(limits or {})),
            )
            _put_tenant(connection, changed, is_new=row is None)
            self._log(connection, "tenants.set", name, {"weight": changed.weight, "limits": to_json(changed.limits)})
        return changed

    def delete_tenant(self, name: str) -> None:
        """Raises UnknownName if the tenant does not exist or has keys."""
        with self._change() as connection:
            if connection.execute(select(tenants.c.name).where(tenants.c.name == name)).first() is None:
                raise UnknownName(f"tenant {name!r} does not exist")
            if connection.execute(select(keys.c.id).where(keys.c.tenant == name)).first() is not None:
                raise UnknownName(f"tenant {name!r} has keys, which the usage records name; revoke them instead")
            connection.execute(tenants.delete().where(tenants.c.name == name))
            self._log(connection, "tenants.delete", name, {})

    def list_tenants(self) -> list[Tenant]:
        with self._database.connect() as connection:
            return [_tenant(row) for row in connection.execute(select(tenants).order_by(tenants.c.name))]

    def list_keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """All keys, revoked and expired ones too, the oldest first."""
        query = select(keys).order_by(keys.c.created, keys.c.id)
        if tenant is not None:
            query = query.where(keys.c.tenant == tenant)
        with self._database.connect() as connection:
            return [_key(row) for row in connection.execute(query)]

    def revision(self) -> int:
        """A number that grows with every change."""
        with self._database.connect() as connection:
            return int(connection.execute(select(revision.c.number)).scalar_one_or_none() or 0)

    def used(self, instants: Mapping[str, float]) -> None:
        """Note when keys were last used. This is no change of the keys: the revision stays."""
        with self._database.begin() as connection:
            for key_id, at in sorted(instants.items()):
                later = (keys.c.id == key_id) & (keys.c.last_used.is_(None) | (keys.c.last_used < at))
                connection.execute(update(keys).where(later).values(last_used=at))

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """A transaction. The row of the revision is a lock: changes run one after the other."""
        with self._database.begin() as connection:
            if not connection.execute(update(revision).values(number=revision.c.number + 1)).rowcount:
                connection.execute(insert(revision).values(id=1, number=1))
            yield connection

    def _insert_key(self, connection: Connection, wanted: NewKey) -> tuple[ApiKey, KeyRecord]:
        key, now = new_key(), self._clock()
        record = KeyRecord(
            key.id,
            key.digest,
            wanted.tenant,
            wanted.name,
            wanted.scopes,
            wanted.models,
            wanted.limits,
            now,
            None if wanted.ttl_s is None else now + wanted.ttl_s,
        )
        connection.execute(
            insert(keys).values(
                id=record.id,
                digest=record.digest,
                tenant=record.tenant,
                name=record.name,
                scopes=sorted(record.scopes),
                models=None if record.models is None else sorted(record.models),
                limits=to_json(record.limits),
                created=record.created,
                expires=record.expires,
            )
        )
        return key, record

    def _find(self, connection: Connection, key_id: str) -> KeyRecord:
        """Raises UnknownName."""
        row = connection.execute(select(keys).where(keys.c.id == key_id)).first()
        if row is None:
            raise UnknownName(f"key {key_id!r} does not exist")
        return _key(row)

    def _active(self, connection: Connection, key_id: str) -> KeyRecord:
        """Raises UnknownName."""
        record = self._find(connection, key_id)
        state = record.state(self._clock())
        if state != "active":
            raise UnknownName(f"key {key_id!r} is {state}")
        return record

    def _log(self, connection: Connection, action: str, target: str, details: dict[str, Any]) -> None:
        write_action(connection, self._clock(), self._actor, action, target, details)


def to_json(limits: Limits) -> dict[str, float]:
    """The limits that are set."""
    return {name: value for name, value in asdict(limits).items() if value is not None}


def _put_tenant(connection: Connection, tenant: Tenant, is_new: bool) -> None:
    values = {"weight": tenant.weight, "limits": to_json(tenant.limits)}
    if is_new:
        connection.execute(insert(tenants).values(name=tenant.name, **values))
    else:
        connection.execute(update(tenants).where(tenants.c.name == tenant.name).values(**values))


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.name, row.weight, _limits(row.limits))


def _key(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        row.id,
        row.digest,
        row.tenant,
        row.name,
        frozenset(map(Scope, set(row.scopes) & set(Scope))),  # a later version of this package may have more
        None if row.models is None else frozenset(row.models),
        _limits(row.limits),
        row.created,
        row.expires,
        row.revoked,
        row.last_used,
    )


def _limits(stored: Mapping[str, Any]) -> Limits:
    """The limits of a row, without those that a later version of this package has added."""
    return Limits(**{name: value for name, value in stored.items() if name in Limits.__dataclass_fields__})


def _facts(record: KeyRecord) -> dict[str, Any]:
    models: Sequence[str] | None = None if record.models is None else sorted(record.models)
    return {
        "tenant": record.tenant,
        "name": record.name,
        "scopes": sorted(record.scopes),
        "models": models,
        "limits": to_json(record.limits),
        "expires": record.expires,
    }
