"""Tenants and keys in the database: SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import Engine, text

from serve_app.core.tenants import Limits, Scope, Tenant
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.api_key import parse_key
from serve_app.tenants.audit_log import recent_actions
from serve_app.tenants.store import DEFAULT_TENANT, NewKey, TenantStore, UnknownName

LIMITS = Limits(requests_per_minute=60, dollars_per_day=1.5)


def test_a_key_has_what_it_was_created_with(store: TenantStore) -> None:
    store.set_tenant("acme")
    wanted = NewKey("acme", "web", frozenset(Scope), frozenset({"small", "org/large"}), LIMITS, ttl_s=60)
    key, record = store.create_key(wanted)
    assert store.list_keys() == [record]
    assert (record.tenant, record.name, record.scopes, record.models, record.limits) == (
        wanted.tenant, wanted.name, wanted.scopes, wanted.models, wanted.limits
    )  # fmt: skip
    assert record.expires == record.created + 60
    assert parse_key(str(key)) == key
    assert record.digest == key.digest


def test_the_secret_is_nowhere_in_the_database(store: TenantStore, database: Engine) -> None:
    key, _ = store.create_key(NewKey())
    with database.connect() as connection:
        for table in ("tenants", "api_keys", "audit_log", "tenants_revision"):
            assert key.secret not in repr(connection.execute(text(f"SELECT * FROM {table}")).all())
    assert key.secret not in repr(key)


def test_only_the_default_tenant_need_not_exist(store: TenantStore) -> None:
    assert store.create_key(NewKey())[1].tenant == DEFAULT_TENANT
    assert store.create_key(NewKey())[1].tenant == DEFAULT_TENANT
    with pytest.raises(UnknownName, match="tenant 'acme' does not exist"):
        store.create_key(NewKey("acme"))
    assert store.list_tenants() == [Tenant(DEFAULT_TENANT)]


def test_a_tenant_changes_only_in_what_is_given(store: TenantStore) -> None:
    assert store.set_tenant("acme", 2.0, {"tokens_per_day": 5}) == Tenant("acme", 2.0, Limits(tokens_per_day=5))
    store.set_tenant("acme", limits={"requests_per_minute": 7})
    assert store.list_tenants() == [Tenant("acme", 2.0, Limits(requests_per_minute=7, tokens_per_day=5))]
    store.set_tenant("acme", 3.0, {"tokens_per_day": None})
    assert store.list_tenants() == [Tenant("acme", 3.0, Limits(requests_per_minute=7))]


def test_a_tenant_with_keys_is_not_deleted(store: TenantStore) -> None:
    store.set_tenant("acme")
    store.set_tenant("empty")
    store.create_key(NewKey("acme"))
    with pytest.raises(UnknownName, match="has keys"):
        store.delete_tenant("acme")
    store.delete_tenant("empty")
    with pytest.raises(UnknownName, match="does not exist"):
        store.delete_tenant("empty")
    assert [tenant.name for tenant in store.list_tenants()] == ["acme"]


def test_a_revoked_key_stays_revoked(store: TenantStore) -> None:
    _, record = store.create_key(NewKey())
    store.revoke_key(record.id)
    assert store.list_keys()[0].state(record.created) == "revoked"
    for change in (store.revoke_key, lambda key: store.rotate_key(key, 60)):
        with pytest.raises(UnknownName, match="revoked"):
            change(record.id)
    with pytest.raises(UnknownName, match="does not exist"):
        store.revoke_key("f" * 12)


def test_a_rotated_key_is_valid_for_the_grace_period(database: Engine) -> None:
    now = 1000.0
    store = TenantStore(database, clock=lambda: now)
    _, old = store.create_key(NewKey(name="web", models=frozenset({"small"}), limits=LIMITS, ttl_s=500))
    now = 1100.0
    key, new = store.rotate_key(old.id, grace_s=30)
    assert new == replace(old, id=key.id, digest=key.digest, created=1100.0, expires=1600.0)
    found = {record.id: record for record in store.list_keys()}
    assert found[old.id].expires == 1130.0
    assert [found[old.id].state(at) for at in (1129.9, 1130.0)] == ["active", "expired"]


def test_a_rotation_does_not_extend_the_old_key(database: Engine) -> None:
    store = TenantStore(database, clock=lambda: 1000.0)
    _, old = store.create_key(NewKey(ttl_s=10))
    store.rotate_key(old.id, grace_s=60)
    assert {record.id: record for record in store.list_keys()}[old.id].expires == 1010.0


def test_every_change_is_in_the_audit_log_and_counts(store: TenantStore, database: Engine) -> None:
    revisions = [store.revision()]
    store.set_tenant("acme")
    revisions.append(store.revision())
    _, record = store.create_key(NewKey("acme", "web"))
    revisions.append(store.revision())
    store.rotate_key(record.id, 5)
    store.revoke_key(record.id)
    revisions.append(store.revision())
    assert revisions == [0, 1, 2, 4]
    actions = recent_actions(database, 10)
    assert [one.action for one in actions] == ["keys.revoke", "keys.rotate", "keys.create", "tenants.set"]
    assert {one.actor for one in actions} == {"tester"}
    assert actions[2].details["name"] == "web"


def test_a_failed_change_leaves_no_trace(store: TenantStore, database: Engine) -> None:
    with pytest.raises(UnknownName):
        store.create_key(NewKey("acme"))
    assert (store.revision(), recent_actions(database, 10)) == (0, [])


def test_the_last_use_only_grows(store: TenantStore) -> None:
    _, record = store.create_key(NewKey())
    before = store.revision()
    store.used({record.id: 50.0})
    store.used({record.id: 40.0, "f" * 12: 1.0})
    assert store.list_keys()[0].last_used == 50.0
    assert store.revision() == before


def test_changes_of_several_processes_do_not_lose_each_other(
    store: TenantStore, database_options: DatabaseOptions
) -> None:
    """As many connections as processes, each with its own engine."""
    store.set_tenant("acme")
    others = [TenantStore(open_database(database_options)) for _ in range(4)]

    def create(other: TenantStore) -> None:
        for _ in range(5):
            other.create_key(NewKey("acme"))

    threads = [threading.Thread(target=create, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for other in others:
        other.close()
    assert len(store.list_keys("acme")) == 20
    assert store.revision() == 21


def test_several_processes_create_the_tables_at_once(database_options: DatabaseOptions) -> None:
    """Each with its own engine, as the ingresses of a new cluster."""
    barrier, failures = threading.Barrier(8), []

    def create() -> None:
        barrier.wait(10)
        try:
            TenantStore(open_database(database_options)).close()
        except Exception as error:  # noqa: BLE001 - reported by the assertion
            failures.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
