"""The endpoint /info of Text Generation Inference."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve_app import __version__
from serve_app.api.app import create_app
from serve_app.core.queries import GetModelInfo, ModelInfo, ModelState, ModelStatus
from serve_app.errors import NotReady

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config


async def test_info_describes_the_model(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await client.get("/info")).json() == {
        "model_id": "small",
        "model_sha": None,
        "model_dtype": None,
        "model_device_type": "cpu",
        "quantization": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 64 + 8,
        "max_best_of": 16,
        "max_stop_sequences": 16,
        "max_input_tokens": 2047,
        "max_total_tokens": 2048,
        "max_client_batch_size": 50,
        "router": "serve_app",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    assert (await client.get("/info?model=org/large")).json()["model_id"] == "org/large"
    assert (await client.get("/info?model=unknown")).status_code == 404


@pytest.mark.parametrize("state", [state for state in ModelState if state is not ModelState.READY])
async def test_info_does_not_wake_a_model(client: httpx.AsyncClient, engine: ScriptedEngine, state: ModelState) -> None:
    engine.statuses["small"] = ModelStatus("small", state)
    answer = (await client.get("/info")).json()
    assert (answer["max_input_tokens"], answer["max_total_tokens"], engine.queries) == (None, None, [])
    engine.statuses["small"] = ModelStatus("small", ModelState.READY)
    engine.results[GetModelInfo] = NotReady("The replica was lost.")
    assert (await client.get("/info")).json()["max_total_tokens"] is None
    engine.results[GetModelInfo] = ModelInfo(99, 300, frozenset())
    assert (await client.get("/info")).json()["max_total_tokens"] == 99
    engine.statuses["small"] = ModelStatus("small", state)
    assert (await client.get("/info")).json()["max_total_tokens"] == 99, "the result of the earlier query is kept"


async def test_info_reports_what_auto_became(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.results[GetModelInfo] = ModelInfo(99, 300, frozenset(), quantization="int8", dtype="float32")
    answer = (await client.get("/info")).json()
    assert (answer["quantization"], answer["model_dtype"]) == ("int8", "torch.float32")


async def test_info_follows_the_configuration() -> None:
    config = app_config()
    sha, scaled = "0e9e39f249a16976918f6564b8830bc894c89659", {"max_replicas": 3, "min_replicas": 1}
    changes: list[tuple[dict[str, Any], dict[str, object]]] = [
        (
            {"revision": sha, "dtype": "bfloat16", "device": "cpu"},
            {"model_sha": sha, "model_dtype": "torch.bfloat16", "model_device_type": "cpu"},
        ),
        (
            {"revision": "main", "resources": {"num_gpus": 0.5}, "quantization": "int4"},
            {"model_sha": None, "model_dtype": None, "model_device_type": "cuda", "quantization": "int4"},
        ),
        (
            {"deployment": {"max_ongoing_requests": 33, "max_queued_requests": 5, "autoscaling": scaled}},
            {"max_concurrent_requests": 104},
        ),
    ]
    for fields, expected in changes:
        model = type(config.models[0]).model_validate(config.models[0].model_dump() | fields)
        app = create_app(ScriptedEngine(), ScriptedTelemetry(), config.model_copy(update={"models": (model,)}))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = (await client.get("/info")).json()
        assert {name: answer[name] for name in expected} == expected
