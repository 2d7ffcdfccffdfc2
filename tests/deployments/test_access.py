"""Who may use an ingress, and the audit log of its administrators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.config import AppConfig
from serve_app.core.tenants import ANYONE, Identity, Tenant
from serve_app.database import open_database
from serve_app.deployments.access import SERVICE, Access
from serve_app.tenants.audit_log import recent_actions
from serve_app.tenants.store import NewKey, TenantStore
from tests.configs import app_args


class Telemetry:
    """Keeps what it is told to watch."""

    watched: Callable[[], float | None] | None = None

    def watch_keys(self, age_s: Callable[[], float | None]) -> None:
        self.watched = age_s


def config(folder: Path, **changes: object) -> AppConfig:
    return AppConfig(**{**app_args(), "database": {"url": f"sqlite:///{folder / 'test.db'}"}, **changes})


async def test_actions_are_in_the_database(tmp_path: Path) -> None:
    options = config(tmp_path)
    access = Access(options, Telemetry())
    await access.audit(Identity("acme", "k1", frozenset()), "adapters.load", "legal", {"model": "m"})
    await access.audit(ANYONE, "adapters.unload", "legal", {})
    await access.audit(SERVICE, "experiments.stop", "chat", {"reason": "slow"})
    await access.stop()
    database = open_database(options.database)
    found = [(one.actor, one.action, one.target, one.details) for one in reversed(recent_actions(database, 10))]
    database.dispose()
    assert found == [
        ("k1", "adapters.load", "legal", {"model": "m"}),
        ("anyone", "adapters.unload", "legal", {}),
        ("service", "experiments.stop", "chat", {"reason": "slow"}),
    ]


async def test_an_action_is_logged_if_the_database_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    access = Access(config(tmp_path / "missing"), Telemetry())
    with caplog.at_level(logging.INFO):
        await access.audit(ANYONE, "adapters.unload", "legal", {})
    assert "Audit: adapters.unload 'legal' by anyone: {}. The database has no entry." in caplog.text


@pytest.mark.parametrize("auth", [None, {"allow_anonymous": True}])
def test_without_keys_there_is_no_authenticator(tmp_path: Path, auth: object) -> None:
    telemetry = Telemetry()
    access = Access(config(tmp_path, auth=auth), telemetry)
    assert (access.authenticator, telemetry.watched) == (None, None)
    assert access.tenants.tenant("x") == Tenant("x")


async def test_the_tenants_are_those_of_the_keys(tmp_path: Path) -> None:
    options, telemetry = config(tmp_path, auth={}), Telemetry()
    store = TenantStore(open_database(options.database))
    store.set_tenant("acme", 2.0)
    key, _ = store.create_key(NewKey("acme"))
    store.close()
    access = Access(options, telemetry)
    assert access.authenticator is not None
    access.authenticator.start()
    assert access.tenants.tenant("acme") == Tenant("acme", 2.0)
    assert (await access.authenticator.authenticate(str(key))).tenant == "acme"
    assert telemetry.watched is not None
    age = telemetry.watched()
    assert age is not None
    assert age < 5
    await access.stop()
