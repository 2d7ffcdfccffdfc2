from __future__ import annotations

import httpx
import pytest

from serve_app.core.queries import ModelState, ModelStatus

from .scripted import ScriptedEngine, ScriptedTelemetry


def set_statuses(engine: ScriptedEngine, *statuses: ModelStatus) -> None:
    engine.statuses = {status.name: status for status in statuses}


async def test_health_does_not_depend_on_models(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    set_statuses(engine, ModelStatus("small", ModelState.FAILED, "no such file"))
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("other", ModelState)
async def test_ready_if_any_model_can_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, other: ModelState
) -> None:
    set_statuses(engine, ModelStatus("org/large", other, "the reason"))
    answer = await client.get("/ready")
    assert answer.status_code == 200
    assert "retry-after" not in answer.headers
    assert answer.json() == {
        "status": "ready",
        "models": [
            {"name": "small", "state": "ready", "detail": ""},
            {"name": "org/large", "state": other, "detail": "the reason"},
        ],
    }


async def test_a_model_that_is_scaled_to_zero_is_ready(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    set_statuses(engine, ModelStatus("small", ModelState.ASLEEP), ModelStatus("org/large", ModelState.FAILED))
    assert (await client.get("/ready")).status_code == 200


async def test_not_ready_lists_the_models_with_reasons(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    failed = ModelStatus("small", ModelState.FAILED, "no such file")
    set_statuses(engine, failed, ModelStatus("org/large", ModelState.LOADING, "reading weights"))
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json() == {
        "status": "not ready",
        "models": [
            {"name": "small", "state": "failed", "detail": "no such file"},
            {"name": "org/large", "state": "loading", "detail": "reading weights"},
        ],
    }
    assert telemetry.errors == []


async def test_readiness_of_one_model(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    set_statuses(engine, ModelStatus("org/large", ModelState.LOADING, "reading weights"))
    assert (await client.get("/ready?model=small")).status_code == 200
    waiting = await client.get("/ready", params={"model": "org/large"})
    assert waiting.status_code == 503
    assert [model["name"] for model in waiting.json()["models"]] == ["org/large"]
    assert (await client.get("/ready?model=unknown")).status_code == 404


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == "up 1\n"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
async def test_head_requests_are_answered(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200
