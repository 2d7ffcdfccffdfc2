"""The view of tenants and keys in a process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine

from serve_app.core.tenants import CredentialsRefused, Identity, Limits, Scope, Tenant, Tenants
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.directory import Directory
from serve_app.tenants.store import NewKey, TenantStore
from tests.postgres_server import PostgresServer

REFRESH_S = 0.05


@pytest.fixture
def directory(store: TenantStore) -> Iterator[Directory]:
    directory = Directory(lambda: store, REFRESH_S)
    directory.start()
    yield directory
    directory.stop()


def eventually(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


def reason(directory: Directory, key: str) -> str:
    """Why a key is refused; "" if it is not."""
    try:
        directory.identify(key)
    except CredentialsRefused as error:
        return error.reason
    return ""


def test_a_change_is_known_soon(store: TenantStore, directory: Directory) -> None:
    view: Tenants = directory
    store.set_tenant("acme", 2.0, {"tokens_per_day": 5})
    key, record = store.create_key(NewKey("acme", models=frozenset({"small"}), limits=Limits(concurrent_requests=3)))
    eventually(lambda: not reason(directory, str(key)))
    identity = Identity("acme", record.id, frozenset({Scope.INFERENCE}), frozenset({"small"}))
    assert directory.identify(str(key)) == identity
    assert view.tenant("acme") == Tenant("acme", 2.0, Limits(tokens_per_day=5))
    assert view.key_limits(record.id) == Limits(concurrent_requests=3)
    store.revoke_key(record.id)
    eventually(lambda: reason(directory, str(key)) == "revoked")


def test_unknown_names_have_no_limits(directory: Directory) -> None:
    assert directory.tenant("") == Tenant("")
    assert directory.tenant("other") == Tenant("other")
    assert directory.key_limits("other") == Limits()


def test_wrong_keys(store: TenantStore) -> None:
    key, record = store.create_key(NewKey())
    directory = Directory(lambda: store, REFRESH_S)
    directory.start()
    try:
        wrong = str(key)[:-1] + ("b" if str(key)[-1] == "a" else "a")
        unknown = str(key).replace(record.id, "0" * 12)
        for text in ("", "sk-serve-", wrong, unknown, str(key).upper(), str(key).lower(), f" {key}", f"{key}\n", "é"):
            assert reason(directory, text) == "invalid", text
        assert reason(directory, str(key)) == ""
    finally:
        directory.stop()


def test_the_secret_of_an_expired_key_must_be_right(store: TenantStore) -> None:
    key, record = store.create_key(NewKey(ttl_s=60))
    directory = Directory(lambda: store, REFRESH_S, clock=lambda: record.created + 60)
    directory.start()
    try:
        assert reason(directory, str(key)) == "expired"
        assert reason(directory, f"sk-serve-{key.id}-{'0' * 43}") == "invalid"
    finally:
        directory.stop()


def test_no_key_is_the_key_of_an_unknown_id(directory: Directory) -> None:
    assert reason(directory, f"sk-serve-{'0' * 12}-{'0' * 43}") == "invalid"


def test_the_last_use_is_written(store: TenantStore, database: Engine) -> None:
    key, record = store.create_key(NewKey())
    directory = Directory(lambda: store, REFRESH_S)
    directory.start()
    directory.identify(str(key))
    assert store.list_keys()[0].last_used is None
    directory.stop()
    used = store.list_keys()[0].last_used
    assert used is not None
    assert used >= record.created


@pytest.mark.slow
def test_the_last_state_stays_while_the_database_is_away() -> None:
    server = PostgresServer()
    directory = None
    options = DatabaseOptions(url=server.create_database(), timeout_s=1)
    store = TenantStore(open_database(options))
    try:
        key, record = store.create_key(NewKey())
        directory = Directory(lambda: TenantStore(open_database(options)), REFRESH_S)
        directory.start()
        store.close()
        server.stop()
        time.sleep(10 * REFRESH_S)
        age = directory.age_s()
        assert age is not None
        assert age > 5 * REFRESH_S
        assert reason(directory, str(key)) == ""
        server.start()
        store.revoke_key(record.id)
        eventually(lambda: reason(directory, str(key)) == "revoked")
        assert directory.age_s() is not None
    finally:
        if directory is not None:
            directory.stop()
        store.close()
        server.close()


def test_a_database_that_is_away_at_the_start(database_options: DatabaseOptions) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none"
    urls = [url, url, str(database_options.url)]
    opened = lambda: TenantStore(open_database(DatabaseOptions(url=urls.pop(0) if len(urls) > 1 else urls[0])))  # noqa: E731
    directory = Directory(opened, REFRESH_S)
    directory.start()
    try:
        assert directory.age_s() is None
        eventually(lambda: directory.age_s() is not None)
    finally:
        directory.stop()
