from __future__ import annotations

import httpx
import pytest

from serve_app.core.queries import ModelState, ModelStatus

from .scripted import ScriptedGateway

READY = ModelStatus("small", ModelState.READY)


async def test_the_door_is_alive_whatever_its_models_do(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.states = [ModelStatus("small", ModelState.FAILED, "no such file")]
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("other", ModelState)
async def test_ready_while_any_model_can_answer_and_told_about_the_others(
    client: httpx.AsyncClient, gateway: ScriptedGateway, other: ModelState
) -> None:
    gateway.states = [READY, ModelStatus("org/large", other, "as it may be")]
    answer = await client.get("/ready")
    assert answer.status_code == 200
    assert "retry-after" not in answer.headers
    assert answer.json() == {
        "status": "ready",
        "models": [
            {"name": "small", "state": "ready", "detail": ""},
            {"name": "org/large", "state": other, "detail": "as it may be"},
        ],
    }


async def test_a_model_that_sleeps_by_intent_is_ready(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.states = [ModelStatus("small", ModelState.ASLEEP)]
    assert (await client.get("/ready")).status_code == 200


async def test_not_ready_says_which_models_and_why(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.states = [
        ModelStatus("small", ModelState.FAILED, "no such file"),
        ModelStatus("org/large", ModelState.LOADING, "reading weights"),
    ]
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
    assert gateway.refusals == []


async def test_one_model_can_be_asked_for(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.states = [READY, ModelStatus("org/large", ModelState.LOADING, "reading weights")]
    assert (await client.get("/ready?model=small")).status_code == 200
    waiting = await client.get("/ready", params={"model": "org/large"})
    assert waiting.status_code == 503
    assert [model["name"] for model in waiting.json()["models"]] == ["org/large"]
    assert (await client.get("/ready?model=nobody")).status_code == 404


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == "up 1\n"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
async def test_a_probe_may_ask_for_the_headers_alone(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200
