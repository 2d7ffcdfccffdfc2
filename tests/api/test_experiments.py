"""Experiments in the HTTP API: who gets which variant, what the answer says, feedback and the report."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.experiments import Caller, Feedback, Reports
from serve_app.core.queries import Tokenize
from serve_app.core.requests import Adapter, ChatPrompt
from serve_app.experiment_config import parse_experiments
from serve_app.gateway.assignment import place, variant_at
from serve_app.gateway.experiment_report import report
from serve_app.gateway.experiment_state import ExperimentState
from serve_app.gateway.experiments import Experiments
from tests.gateway.test_experiments import NOW, KeptCounts

from .scripted import POSTS, ScriptedEngine, ScriptedTelemetry, app_config, assert_invalid, error_of

CONFIG: dict[str, Any] = {
    "experiments": [
        {
            "name": "chat",
            "unit": "user",
            "variants": [
                {"name": "control", "model": "small"},
                {
                    "name": "warm",
                    "model": "org/large",
                    "percent": 50,
                    "sampling_defaults": {"temperature": 0.9, "top_p": 0.8},
                    "chat_template": "builtin:chatml_tools",
                },
            ],
        },
        {
            "name": "small",
            "unit": "session",
            "variants": [
                {"name": "control", "model": "small"},
                {"name": "adapted", "model": "small", "adapter": "support", "percent": 100},
            ],
        },
        {"name": "keyed", "unit": "key", "variants": [{"name": name, "model": "small"} for name in ("a", "b")]},
    ]
}


@dataclass
class LocalExperiments:
    """The experiments of one process without others."""

    stage: Experiments
    state: ExperimentState
    callers: list[Caller] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)

    def names(self) -> tuple[str, ...]:
        return self.stage.names()

    def choose(self, name: str, caller: Caller) -> Any:
        self.callers.append(caller)
        return self.stage.choose(name, caller)

    def called(self, *about: Any) -> None:
        self.stage.called(*about)

    async def take_feedback(self, feedback: Feedback) -> bool:
        self.comments.append(feedback.comment)
        return self.stage.take_feedback(feedback)

    async def reports(self) -> Reports:
        return Reports(tuple(report(one.experiment, found, why, NOW) for one, found, why in self.state.measured()))


@pytest.fixture
def experiments(engine: ScriptedEngine) -> LocalExperiments:
    state = ExperimentState("i", time.time)
    state.configure(parse_experiments(CONFIG))
    adapters = AdapterDirectory({"small": [Adapter("support", "/adapters/support")]})
    return LocalExperiments(Experiments(engine, state, KeptCounts(), adapters.find), state)


@pytest.fixture
async def client(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, experiments: LocalExperiments
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(experiments.stage, telemetry, app_config(), experiments=experiments)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def user_of(variant: str, experiment: int = 0) -> str:
    """A user of this variant."""
    chosen = parse_experiments(CONFIG).experiments[experiment]
    names = (f"user-{number}" for number in range(1000))
    return next(name for name in names if variant_at(chosen, 1.0, place(chosen.name, name)) == variant)


USERS = {variant: user_of(variant) for variant in ("control", "warm")}
CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
ANTHROPIC: dict[str, Any] = {**CHAT, "max_tokens": 5}
NAMING: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [{"user": "{}"}, {"safety_identifier": "{}"}, {"metadata": {"user_id": "{}"}}],
    "/v1/completions": [{"user": "{}"}],
    "/v1/responses": [{"user": "{}"}, {"safety_identifier": "{}"}, {"metadata": {"user_id": "{}"}}],
    "/v1/messages": [{"metadata": {"user_id": "{}"}}],
    "/v1/embeddings": [{"user": "{}"}],
}
BODIES: dict[str, dict[str, Any]] = {
    **{path: {"model": "chat", **POSTS[path]} for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")},
    "/v1/messages": ANTHROPIC,
    "/v1/embeddings": {"model": "chat", "input": "a"},
}


@pytest.mark.parametrize(("path", "naming"), [(path, one) for path, all_ in NAMING.items() for one in all_])
async def test_the_user_of_a_body_decides_the_variant(
    client: httpx.AsyncClient, experiments: LocalExperiments, path: str, naming: dict[str, Any]
) -> None:
    for variant, user in USERS.items():
        named = json.loads(json.dumps(naming).replace("{}", user))
        answer = await client.post(path, json={**BODIES[path], **named})
        assert answer.headers["x-variant"] == variant
        assert experiments.callers[-1].user == user


async def test_the_answer_has_the_name_that_the_client_asked_for(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        body = {**BODIES[path], **json.loads(json.dumps(NAMING[path][0]).replace("{}", USERS["warm"]))}
        whole = await client.post(path, json=body)
        assert whole.json()["model"] == "chat"
        stream = await client.post(path, json={**body, "stream": True})
        assert stream.headers["x-variant"] == "warm"
        assert '"model":"chat"' in stream.text.replace('"model": "', '"model":"')
    assert {request.model for request in engine.requests} == {"org/large"}


async def test_a_variant_brings_its_sampling_defaults_and_its_chat_template(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for user, more in (("warm", {}), ("warm", {"temperature": 0.1}), ("control", {})):
        await client.post("/v1/chat/completions", json={**CHAT, "user": USERS[user], **more})
    params = [(request.params.temperature, request.params.top_p) for request in engine.requests]
    assert params == [(0.9, 0.8), (0.1, 0.8), (0.2, 0.9)]
    prompts = [request.prompt for request in engine.requests]
    templates = [bool(prompt.template) for prompt in prompts if isinstance(prompt, ChatPrompt)]
    assert templates == [True, True, False]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens"])
async def test_tokens_are_counted_with_the_chat_template_of_the_variant(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    for variant, has_template in (("warm", True), ("control", False)):
        await client.post(path, json=CHAT, headers={"x-variant": variant})
        query = next(query for _, query in reversed(engine.queries) if isinstance(query, Tokenize))
        assert isinstance(query.prompt, ChatPrompt)
        assert bool(query.prompt.template) == has_template


async def test_an_experiment_with_the_name_of_a_model_takes_its_requests(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """Also those without a name, which are for the first model. Without a session the control answers."""
    headers = {"x-session-id": "s1"}
    for body in ({"prompt": "hi", "model": "small"}, {"prompt": "hi"}):
        answer = await client.post("/generate", json=body, headers=headers)
        assert (answer.headers["x-variant"], answer.json()["model"]) == ("adapted", "small")
    assert [request.adapter and request.adapter.name for request in engine.requests] == ["support", "support"]
    answer = await client.post("/generate", json={"prompt": "hi"})
    assert answer.headers["x-variant"] == "control"
    assert engine.requests[-1].adapter is None


async def test_items_of_a_batch_and_tgi_and_a_query_get_variants_too(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    headers = {"x-session-id": "s1"}
    await client.post("/generate_batch", json={"prompts": ["a"], "model": "small"}, headers=headers)
    await client.post("/generate", json={"inputs": "a"}, headers=headers)
    await client.post("/generate?model=small", json={"prompt": "a"}, headers=headers)
    assert [request.served_name for request in engine.requests] == ["small"] * 3
    assert [request.assignment and request.assignment.variant for request in engine.requests] == ["adapted"] * 3


async def test_of_an_api_key_only_a_digest_is_used(client: httpx.AsyncClient, experiments: LocalExperiments) -> None:
    for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "Bearer secret"}, {"x-api-key": "other"}):
        await client.post("/v1/completions", json={"model": "keyed", "prompt": "a"}, headers=headers)
    first, second, other = (caller.key for caller in experiments.callers)
    assert first == second != other
    assert "secret" not in repr(experiments.callers)


async def test_the_header_x_variant_chooses_the_variant(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = {**CHAT, "user": USERS["control"]}
    answer = await client.post("/v1/chat/completions", json=body, headers={"x-variant": "warm"})
    assert (answer.headers["x-variant"], engine.requests[-1].model) == ("warm", "org/large")
    for name, variant, words in (
        ("chat", "cold", "the variants of chat are control, warm"),
        ("org/large", "warm", "Model 'org/large' has no variants"),
    ):
        headers = {"x-variant": variant}
        answer = await client.post("/v1/completions", json={"model": name, "prompt": "a"}, headers=headers)
        assert_invalid(answer)
        assert words in error_of(answer)["message"]
        assert error_of(answer)["param"] == "x-variant"


async def test_experiments_are_listed_as_models(client: httpx.AsyncClient) -> None:
    ids = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert ids == ["small", "org/large", "support", "chat", "keyed"]
    assert (await client.get("/v1/models/chat")).json()["root"] == "small"
    message = error_of(await client.post("/v1/completions", json={"model": "none", "prompt": "a"}))["message"]
    assert "Known models: small, org/large, chat, keyed." in message


async def test_an_error_names_the_variant_too(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "user": USERS["warm"], "min_tokens": 9, "max_tokens": 1}
    answer = await client.post("/v1/chat/completions", json=body)
    assert_invalid(answer)
    assert answer.headers["x-variant"] == "warm"
    assert "x-variant" not in (await client.post("/v1/completions", json={"model": "org/large", "prompt": "a"})).headers


# Feedback.


async def answered(client: httpx.AsyncClient, **body: Any) -> str:
    answer = await client.post("/v1/completions", json={"prompt": "a", **body}, headers={"x-request-id": "mine"})
    return answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "score"),
    [({"rating": "up"}, 1.0), ({"rating": "down"}, 0.0), ({"score": 0.25}, 0.25), ({"score": 1}, 1.0)],
)
async def test_feedback_is_counted(
    client: httpx.AsyncClient, experiments: LocalExperiments, fields: dict[str, Any], score: float
) -> None:
    request_id = await answered(client, model="chat", user=USERS["warm"])
    answer = await client.post("/v1/feedback", json={"request_id": request_id, "comment": "so so", **fields})
    assert (answer.status_code, answer.json()) == (200, {"request_id": "mine", "score": score})
    (chat, *_) = (await client.get("/experiments")).json()["experiments"]
    assert chat["variants"][1]["metrics"]["feedback"]["value"] == score
    assert experiments.comments == ["so so"]


async def test_feedback_on_an_answer_of_a_model_is_taken_too(client: httpx.AsyncClient) -> None:
    request_id = await answered(client, model="org/large")
    assert (await client.post("/v1/feedback", json={"request_id": request_id, "rating": "up"})).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"rating": "up"},
        {"request_id": "mine"},
        {"request_id": "mine", "rating": "up", "score": 1},
        {"request_id": "mine", "rating": "great"},
        {"request_id": "mine", "score": 1.1},
        {"request_id": "mine", "score": -0.1},
        {"request_id": "mine", "score": True},
        {"request_id": "mine", "score": "1"},
        {"request_id": "", "score": 1},
        {"request_id": "x" * 129, "score": 1},
        {"request_id": 7, "score": 1},
        {"request_id": "mine", "score": 1, "comment": "x" * 2001},
        {"request_id": "mine", "score": 1, "stars": 5},
        [],
    ],
    ids=json.dumps,
)
async def test_feedback_that_is_wrong_is_refused(client: httpx.AsyncClient, body: Any) -> None:
    await answered(client)
    assert_invalid(await client.post("/v1/feedback", json=body))


async def test_feedback_on_an_unknown_request_is_a_404(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/feedback", json={"request_id": "unknown", "rating": "up"})
    assert answer.status_code == 404
    assert error_of(answer)["param"] == "request_id"


async def test_the_report_has_the_documented_form(client: httpx.AsyncClient) -> None:
    """Every number of a report is finite or null, also without any request."""
    body = (await client.get("/experiments")).json()
    assert body["error"] == ""
    assert [one["name"] for one in body["experiments"]] == ["chat", "small", "keyed"]
    chat = body["experiments"][0]
    assert (chat["verdict"], chat["unit"], chat["confidence"]) == ("not enough data yet", "user", 0.95)
    assert [one["percent"] for one in chat["variants"]] == [50, 50]
    assert chat["variants"][0]["differences"] == {}
    assert set(chat["variants"][1]["differences"]) == {*chat["variants"][1]["metrics"]}


async def test_a_service_without_experiments_has_an_empty_report(engine: ScriptedEngine) -> None:
    app = create_app(engine, ScriptedTelemetry(), app_config())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.get("/experiments")).json() == {"experiments": [], "error": ""}
        assert (await client.post("/v1/feedback", json={"request_id": "a", "rating": "up"})).status_code == 404
