"""The header `Idempotency-Key`: equal requests run once, in one process and in several."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware

from serve_app.api.app import create_app
from serve_app.database_config import DatabaseOptions
from serve_app.errors import InternalError, QueueFull
from serve_app.jobs.shared_answers import SharedAnswers
from serve_app.jobs.store import JobStore
from serve_app.jobs_config import IdempotencyOptions
from tests.api.scripted import Clock, Connection, ScriptedEngine, ScriptedTelemetry, app_config, chunk, events_of

from .test_batches import _Tenant

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


@dataclass
class Ingress:
    client: httpx.AsyncClient
    engine: ScriptedEngine
    telemetry: ScriptedTelemetry

    async def ask(self, key: str, body: Any = CHAT, path: str = PATH, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=body, headers={"idempotency-key": key, **headers})


@asynccontextmanager
async def ingress(
    database: DatabaseOptions | None = None, owner: str = "one", clock: Clock | None = None, **options: Any
) -> AsyncIterator[Ingress]:
    """An ingress with its own memory of answers, or with the answers in a database."""
    engine, telemetry = ScriptedEngine(), ScriptedTelemetry()
    keys = IdempotencyOptions(**options)
    config = app_config(max_body_bytes=20_000).model_copy(update={"idempotency": keys})
    store = None if database is None else JobStore(database)
    clock = clock or Clock()
    answers = None if store is None else SharedAnswers(store, keys, owner, clock)
    app = create_app(engine, telemetry, config, clock, around=[Middleware(_Tenant)], answers=answers)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield Ingress(client, engine, telemetry)
    if answers is not None and store is not None:
        await answers.close()
        await store.close()


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
async def one(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ingress]:
    database = None
    if request.param == "sqlite":
        database = DatabaseOptions(url=f"sqlite:///{tmp_path}/keys.db")
    elif request.param == "postgresql":
        database = DatabaseOptions(url=request.getfixturevalue("postgres").create_database())
    async with ingress(database) as found:
        yield found


async def test_a_later_duplicate_gets_the_identical_answer_and_runs_nothing(one: Ingress) -> None:
    first = await one.ask("k1")
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    again = await one.ask("k1")
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(one.engine.requests) == 1
    assert (await one.ask("k2")).content != first.content
    assert one.telemetry.keys == ["executed", "replayed", "executed"]


async def test_concurrent_duplicates_run_once(one: Ingress) -> None:
    one.engine.plays(0.2, chunk(["ok"]))
    answers = await asyncio.gather(*(one.ask("k") for _ in range(20)))
    assert len(one.engine.requests) == 1
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19


async def test_a_key_with_another_request_is_refused(one: Ingress) -> None:
    await one.ask("k")
    other = {"messages": [{"role": "user", "content": "ho"}]}
    for answer in (
        await one.ask("k", other),
        await one.ask("k", {"prompt": "hi"}, "/v1/completions"),
        await one.ask("k", CHAT, f"{PATH}?x=1"),
    ):
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "idempotency_key_reused"
    one.engine.plays(0.2, chunk(["ok"]))
    running, refused = await asyncio.gather(one.ask("j"), one.ask("j", other))
    assert (running.status_code, refused.status_code) == (200, 422)
    assert len(one.engine.requests) == 2


async def test_tenants_have_keys_of_their_own(one: Ingress) -> None:
    first, second = await one.ask("k", **{"x-tenant": "a"}), await one.ask("k", **{"x-tenant": "b"})
    assert first.content != second.content
    assert len(one.engine.requests) == 2


@pytest.mark.parametrize("error", [QueueFull("full", retry_after_s=1), InternalError("broken")])
async def test_a_failed_request_is_not_kept(one: Ingress, error: Exception) -> None:
    one.engine.plays(error)
    assert (await one.ask("k")).status_code in (429, 500)
    one.engine.plays(chunk(["ok"]))
    again = await one.ask("k")
    assert again.status_code == 200
    assert "idempotent-replayed" not in again.headers


async def test_a_wrong_request_is_not_kept_so_that_it_can_be_corrected(one: Ingress) -> None:
    assert (await one.ask("k", {"messages": "hi"})).status_code == 400
    assert (await one.ask("k")).status_code == 200


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "with space", "ü"])
async def test_a_key_that_is_none_is_refused(one: Ingress, key: str) -> None:
    answer = await one.client.post(PATH, json=CHAT, headers={b"idempotency-key": key.encode()})
    assert answer.status_code == 400
    assert one.engine.requests == []


async def test_a_stream_ignores_the_key(one: Ingress) -> None:
    for _ in range(2):
        answer = await one.ask("k", {**CHAT, "stream": True})
        assert events_of(answer.text)[-1] == "[DONE]"
        assert (await one.ask("k", {"prompt": "hi"}, "/generate_stream")).status_code == 200
    assert len(one.engine.requests) == 4
    assert one.telemetry.keys == []


async def test_a_body_that_cannot_be_read_is_answered_as_without_a_key(one: Ingress) -> None:
    headers = {"idempotency-key": "k"}
    large = await one.client.post(PATH, content=b"x" * 30_000, headers=headers)
    assert large.status_code == 413
    coded = await one.client.post(PATH, content=b"{}", headers={**headers, "content-encoding": "gzip"})
    assert coded.status_code == 400
    assert (await one.client.post(PATH, content=b"{", headers=headers)).status_code == 400


async def test_a_request_goes_on_when_its_client_has_left(one: Ingress) -> None:
    """The client asks again, and gets the answer that was computed meanwhile."""
    one.engine.plays(0.1, chunk(["ok"]))
    connection = Connection(PATH, CHAT, headers=[(b"idempotency-key", b"k")])
    app = one.client._transport.app  # type: ignore[attr-defined]
    leaving = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
    await asyncio.wait_for(one.engine.reached.wait(), 5)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    again = await one.client.post(PATH, content=json.dumps(CHAT), headers={"idempotency-key": "k"})
    assert again.status_code == 200
    assert len(one.engine.requests) == 1


async def test_memory_has_limits_of_number_size_and_age() -> None:
    clock = Clock()
    async with ingress(clock=clock, max_kept=2, ttl_s=10) as one:
        for key in ("a", "b", "c"):
            await one.ask(key)
        assert "idempotent-replayed" in (await one.ask("c")).headers
        assert "idempotent-replayed" not in (await one.ask("a")).headers
        clock.now += 11
        assert "idempotent-replayed" not in (await one.ask("c")).headers
    async with ingress(max_kept_bytes=1024) as one:
        one.engine.plays(chunk(["x" * 500]))
        for key in ("a", "b", "c"):
            await one.ask(key)
            assert 0 < one.telemetry.kept_bytes <= 1024
        assert "idempotent-replayed" in (await one.ask("c")).headers
        assert "idempotent-replayed" not in (await one.ask("a")).headers


async def test_the_database_has_the_same_limits(database_options: DatabaseOptions) -> None:
    clock = Clock()
    async with ingress(database_options, clock=clock, max_kept=2, ttl_s=10) as one:
        for key in ("a", "b", "c"):
            await one.ask(key)
            clock.now += 1
        assert "idempotent-replayed" in (await one.ask("c")).headers
        assert "idempotent-replayed" not in (await one.ask("a")).headers
        clock.now += 11
        assert "idempotent-replayed" not in (await one.ask("c")).headers


async def test_no_answer_is_kept_without_room_for_one() -> None:
    async with ingress(max_kept=0) as one:
        for _ in range(2):
            assert "idempotent-replayed" not in (await one.ask("k")).headers
        assert len(one.engine.requests) == 2


async def test_ingresses_share_answers_over_the_database(database_options: DatabaseOptions) -> None:
    async with ingress(database_options, "one") as one, ingress(database_options, "two") as two:
        for each in (one, two):
            each.engine.plays(0.2, chunk(["ok"]))
        answers = await asyncio.gather(*(each.ask("k") for each in (one, two) for _ in range(5)))
        assert len({answer.content for answer in answers}) == 1
        assert len(one.engine.requests) + len(two.engine.requests) == 1
        assert (await two.ask("k", {"messages": [{"role": "user", "content": "ho"}]})).status_code == 422


async def test_the_key_of_a_lost_ingress_is_free_when_its_lease_ends(database_options: DatabaseOptions) -> None:
    clock = Clock()
    async with ingress(database_options, "one", clock) as one, ingress(database_options, "two", clock) as two:
        one.engine.plays(None)
        lost = asyncio.create_task(one.ask("k"))
        await asyncio.wait_for(one.engine.reached.wait(), 5)
        waiting = asyncio.create_task(two.ask("k"))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert two.engine.requests == []
        clock.now += 16
        assert (await asyncio.wait_for(waiting, 5)).status_code == 200
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
