"""The endpoint /v1/usage: who sees what, the parameters, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope as AsgiScope, Send

from serve_app.api.app import create_app
from serve_app.core.tenants import Identity, Scope
from serve_app.core.usage import MOST_ROWS, Group, UsageQuery
from serve_app.errors import NotReady

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config

ROW = {
    "requests": 2,
    "prompt_tokens": 10,
    "cached_tokens": 4,
    "output_tokens": 5,
    "reasoning_tokens": 1,
    "nanodollars": 1_500_000_001,
}
USER = Identity("acme", "k1", frozenset({Scope.INFERENCE}))
ADMIN = Identity("ops", "k2", frozenset({Scope.ADMIN}))


class As:
    """Sets the identity of the caller, as the middleware of the keys does."""

    def __init__(self, app: ASGIApp, identity: Identity) -> None:
        self.app = app
        self.identity = identity

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["identity"] = self.identity
        await self.app(scope, receive, send)


@dataclass
class ScriptedReports:
    rows: list[dict[str, Any]] = field(default_factory=list)
    queries: list[UsageQuery] = field(default_factory=list)
    error: Exception | None = None

    async def report(self, query: UsageQuery) -> list[dict[str, Any]]:
        self.queries.append(query)
        if self.error is not None:
            raise self.error
        return self.rows


Get = Callable[..., Awaitable[httpx.Response]]


@asynccontextmanager
async def opened(reports: ScriptedReports | None, identity: Identity = USER) -> AsyncIterator[Get]:
    app = create_app(
        ScriptedEngine(), ScriptedTelemetry(), app_config(), around=[Middleware(As, identity=identity)], usage=reports
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def get(headers: dict[str, str] | None = None, **parameters: Any) -> httpx.Response:
            return await client.get("/v1/usage", params=parameters, headers=headers)

        yield get


async def test_a_key_sees_its_own_tenant() -> None:
    reports = ScriptedReports([{"day": "2026-11-30", **ROW}])
    async with opened(reports) as get:
        answer = await get()
        assert answer.status_code == 200
        expected = {name: value for name, value in ROW.items() if name != "nanodollars"}
        assert answer.json() == {
            "object": "list",
            "data": [{"day": "2026-11-30", **expected, "cost_dollars": 1.500000001}],
        }
        assert (await get(tenant="acme")).status_code == 200
        other = await get(tenant="other")
        assert (other.status_code, other.json()["error"]["param"]) == (400, "tenant")
    assert [query.tenant for query in reports.queries] == ["acme", "acme"]
    assert reports.queries[0].groups == (Group.DAY,)
    begin = datetime.fromtimestamp(reports.queries[0].begin or 0, UTC)
    assert (begin.day, begin.hour) == (1, 0)


async def test_an_admin_sees_all_tenants() -> None:
    reports = ScriptedReports()
    async with opened(reports, ADMIN) as get:
        await get(group_by="tenant,model,tenant")
        await get(tenant="acme", key="k1", model="m")
    assert reports.queries[0].tenant is None
    assert reports.queries[0].groups == (Group.TENANT, Group.MODEL)
    last = reports.queries[1]
    assert (last.tenant, last.key, last.model) == ("acme", "k1", "m")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2026-11-30", 1_795_996_800),
        ("2026-11-30T12:00:00Z", 1_796_040_000),
        ("2026-11-30T12:00:00+01:00", 1_796_036_400),
        ("1796040000", 1_796_040_000),
        ("1796040000.5", 1_796_040_000.5),
    ],
)
async def test_instants(given: str, expected: float) -> None:
    reports = ScriptedReports()
    async with opened(reports) as get:
        assert (await get(**{"from": given, "to": given})).status_code == 200
    assert (reports.queries[0].begin, reports.queries[0].end) == (expected, expected)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("from", "yesterday"),
        ("to", "-1"),
        ("from", "1e400"),
        ("from", "inf"),
        ("to", "9" * 400),
        ("from", "٣"),
        ("group_by", "user"),
        ("format", "xml"),
        ("since", "1"),
    ],
)
async def test_a_wrong_parameter_is_refused(parameter: str, value: str) -> None:
    async with opened(ScriptedReports()) as get:
        answer = await get(**{parameter: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, parameter)


@pytest.mark.parametrize("by", ["format", "accept"])
async def test_csv(by: str) -> None:
    rows = [{"key": 'a,"b"', **ROW}, {"key": "c", **ROW}]
    async with opened(ScriptedReports(rows)) as get:
        how: dict[str, Any] = {"format": "csv"} if by == "format" else {"headers": {"accept": "text/csv"}}
        answer = await get(group_by="key", **how)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    found = list(csv.reader(io.StringIO(answer.text)))
    assert found[0] == [
        *("key", "requests", "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_dollars"),
    ]
    assert found[1] == ['a,"b"', "2", "10", "4", "5", "1", "1.500000001"]
    assert len(found) == 3


async def test_too_many_rows_are_refused() -> None:
    async with opened(ScriptedReports([{"day": "x", **ROW}] * (MOST_ROWS + 1))) as get:
        answer = await get()
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "group_by")


async def test_without_keys_there_is_no_usage() -> None:
    async with opened(None) as get:
        assert (await get()).status_code == 404


async def test_a_database_that_is_away_is_a_503() -> None:
    async with opened(ScriptedReports(error=NotReady("away", retry_after_s=5))) as get:
        answer = await get()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
