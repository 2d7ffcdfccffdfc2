"""The time of the check: the same for an unknown id and a wrong secret, and short."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_ind

from serve_app.api.app import create_app
from serve_app.auth_config import AuthOptions
from serve_app.core.tenants import ANYONE, Identity
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.tenants.api_key import ApiKey, new_key
from serve_app.tenants.authenticator import KeyAuthenticator
from serve_app.tenants.store import NewKey, TenantStore
from tests.api.scripted import ScriptedEngine, ScriptedTelemetry, app_config

pytestmark = pytest.mark.perf

SAMPLES = 10_000
# A test of means at p = 0.01 fails one time in a hundred without any difference; three times, once in a million.
TRIES = 3
KEYS = 1000


class Everyone:
    """An authenticator without a check."""

    async def authenticate(self, credentials: str) -> Identity:
        return ANYONE


@pytest.fixture(scope="module")
def keys() -> list[ApiKey]:
    return []


@pytest.fixture(scope="module")
def authenticator(tmp_path_factory: pytest.TempPathFactory, keys: list[ApiKey]) -> Iterator[KeyAuthenticator]:
    """One with KEYS keys."""
    folder: Path = tmp_path_factory.mktemp("timing")
    options = DatabaseOptions(url=f"sqlite:///{folder / 'keys.db'}")
    store = TenantStore(open_database(options))
    keys += [store.create_key(NewKey())[0] for _ in range(KEYS)]
    store.close()
    authenticator = KeyAuthenticator(AuthOptions(refresh_s=60), options)
    authenticator.start()
    yield authenticator
    authenticator.stop()


class Calls:
    """Sends GET /version to an application without a socket."""

    def __init__(self, authenticator: Any) -> None:
        self._app = create_app(ScriptedEngine(), ScriptedTelemetry(), app_config(), authenticator=authenticator)
        self.status = 0

    async def seconds(self, key: str) -> float:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/version",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "query_string": b"",
            "headers": [(b"host", b"test"), (b"authorization", f"Bearer {key}".encode()), (b"x-request-id", b"a")],
        }
        began = time.perf_counter()
        await self._app(scope, self._receive, self._send)
        return time.perf_counter() - began

    async def _receive(self) -> Any:
        await asyncio.Event().wait()

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


@pytest.mark.long
async def test_an_unknown_id_takes_as_long_as_a_wrong_secret(
    authenticator: KeyAuthenticator, keys: list[ApiKey]
) -> None:
    calls = Calls(authenticator)
    found = []
    for _ in range(TRIES):
        unknown: list[float] = []
        wrong: list[float] = []
        gc.disable()
        for number in range(SAMPLES):
            secret = new_key().secret
            pair = [(str(ApiKey(keys[number % KEYS].id, secret)), wrong), (str(ApiKey(new_key().id, secret)), unknown)]
            for key, samples in pair if number % 2 else reversed(pair):
                samples.append(await calls.seconds(key))
                assert calls.status == 401
        gc.enable()
        found.append(float(ttest_ind(unknown, wrong, equal_var=False).pvalue))
        print(
            f"mean {statistics.mean(unknown) * 1e6:.2f} and {statistics.mean(wrong) * 1e6:.2f} us, p = {found[-1]:.3f}"
        )
        if found[-1] > 0.01:
            return
    pytest.fail(f"p = {found}")


async def test_a_check_takes_at_most_a_tenth_of_a_millisecond(
    authenticator: KeyAuthenticator, keys: list[ApiKey]
) -> None:
    """The difference to an application whose authenticator takes no time, and to one without any check."""
    applications = {"with keys": Calls(authenticator), "without a check": Calls(Everyone()), "without": Calls(None)}
    times: dict[str, list[float]] = {name: [] for name in applications}
    key = str(keys[0])
    for _ in range(3000):
        for name, calls in applications.items():
            times[name].append(await calls.seconds(key))
            assert calls.status == 200
    medians = {name: statistics.median(found) for name, found in times.items()}
    print({name: f"{one * 1e6:.1f} us" for name, one in medians.items()})
    assert medians["with keys"] - medians["without"] < 100e-6
