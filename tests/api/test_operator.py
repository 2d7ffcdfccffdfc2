from __future__ import annotations

import httpx
import pytest

from serve_app.types import ModelState, ModelStatus

from .scripted import ScriptedGateway

READY = ModelStatus("small", ModelState.READY)


async def test_the_door_is_alive_whatever_its_models_do(client: httpx.AsyncClient, gateway: ScriptedGateway) -> None:
    gateway.states = [ModelStatus("small", ModelState.FAILED, "no such file")]
    answer = await client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("other", [ModelState.READY, ModelState.ASLEEP])
async def test_ready_when_every_model_can_answer_or_be_woken(
    client: httpx.AsyncClient, gateway: ScriptedGateway, other: ModelState
) -> None:
    gateway.states = [READY, ModelStatus("org/large", other, "as it should be")]
    answer = await client.get("/ready")
    assert answer.status_code == 200
    assert "retry-after" not in answer.headers
    assert answer.json() == {
        "status": "ready",
        "models": [
            {"name": "small", "state": "ready", "detail": ""},
            {"name": "org/large", "state": other, "detail": "as it should be"},
        ],
    }


@pytest.mark.parametrize("other", [ModelState.LOADING, ModelState.FAILED])
async def test_not_ready_says_which_model_and_why(
    client: httpx.AsyncClient, gateway: ScriptedGateway, other: ModelState
) -> None:
    gateway.states = [READY, ModelStatus("org/large", other, "reading weights")]
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["status"] == "not ready"
    assert answer.json()["models"][1] == {"name": "org/large", "state": other, "detail": "reading weights"}
    assert gateway.refusals == []


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == "up 1\n"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
async def test_a_probe_may_ask_for_the_headers_alone(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200
