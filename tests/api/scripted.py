"""An engine that plays a script, a telemetry that keeps what it counts, and both ends of an ASGI connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import httpx
import pytest

from serve_app.api.app import create_app
from serve_app.config import AppConfig, Deployment, Ingress, Limits, Lora, LoraAdapter, Model, SamplingDefaults
from serve_app.core.engine import EngineLoad
from serve_app.core.events import Chunk, FinishReason, Logprobs, TextToken, TokenEvent, TokenLogprob
from serve_app.core.http import HttpCall
from serve_app.core.queries import (
    A,
    AddedToken,
    Detokenize,
    GetModelInfo,
    GetTokenizerInfo,
    LoadAdapter,
    ModelInfo,
    ModelState,
    ModelStatus,
    Query,
    Tokenize,
    TokenizerInfo,
)
from serve_app.core.requests import GenerationRequest, TextPrompt
from serve_app.errors import ServeAppError

# The shortest valid body of every generating path.
POSTS: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "hi"},
    "/generate_stream": {"prompt": "hi"},
    "/generate_batch": {"prompts": ["hi"]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}

# The results of queries.
RESULTS: dict[type[Query[Any]], Any] = {
    GetModelInfo: ModelInfo(context=2048, vocabulary=300, special_ids=frozenset({2})),
    Tokenize: (TextToken(5, "so", 0, 2), TextToken(6, "me", 2, 4)),
    Detokenize: "some",
    LoadAdapter: "0" * 32,
    GetTokenizerInfo: TokenizerInfo("Scripted", {2: AddedToken("<end>")}, eos_token="<end>", chat_template="{{ 1 }}"),
}


class Beat(Enum):
    """A step that waits until the stream has written a heartbeat, for which it calls `health`."""

    BEAT = auto()


BEAT = Beat.BEAT

# Marks a test of the fixture `client` whose script contains BEAT.
with_heartbeats = pytest.mark.parametrize("heartbeat_s", [0.02])

# A chunk is yielded, an exception is raised, a number is a time to sleep in seconds; None waits for ever.
Step = Chunk | BaseException | float | Beat | None
Script = Callable[[GenerationRequest], Iterable[Step]]


def tokens(texts: Sequence[str], finish: FinishReason | None = FinishReason.STOP, start: int = 0) -> list[TokenEvent]:
    """Events every 10 ms; the first one after 50 ms."""
    last = len(texts) - 1
    return [
        TokenEvent(
            token_id=start + i,
            text=text,
            elapsed_s=0.05 + 0.01 * (start + i),
            finish_reason=finish if i == last else None,
            logprobs=Logprobs(TokenLogprob(start + i, text, -0.5), (TokenLogprob(99, "é", float("-inf")),)),
        )
        for i, text in enumerate(texts)
    ]


def chunk(texts: Sequence[str], finish: FinishReason | None = FinishReason.STOP, start: int = 0) -> Chunk:
    return Chunk(tuple(tokens(texts, finish, start)), prompt_tokens=3, queue_s=0.002)


def echo(request: GenerationRequest) -> list[Step]:
    """The words of the prompt, the first one in a chunk of its own."""
    prompt = request.prompt
    words = prompt.text.split(" ") if isinstance(prompt, TextPrompt) else ["some", " words"]
    if len(words) == 1:
        return [chunk(words)]
    return [chunk(words[:1], None), chunk(words[1:], start=1)]


@dataclass
class ScriptedEngine:
    """Plays a script for each request, and keeps requests and queries.

    `reached` is set when `awaited` requests run at the same time. A model without an entry in `statuses` is ready.
    """

    script: Script = echo
    statuses: dict[str, ModelStatus] = field(default_factory=dict)
    results: dict[type[Query[Any]], Any] = field(default_factory=lambda: dict(RESULTS))
    requests: list[GenerationRequest] = field(default_factory=list)
    queries: list[tuple[str, Query[Any]]] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    completed: int = 0
    running: int = 0
    max_running: int = 0
    awaited: int = 1
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    heartbeat: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        if self.running >= self.awaited:
            self.reached.set()
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Chunk):
                    yield step
                elif isinstance(step, Beat):
                    self.heartbeat.clear()
                    await self.heartbeat.wait()
                else:
                    await asyncio.sleep(3600 if step is None else step)
            self.completed += 1
        finally:
            self.running -= 1
            self.closed.append(request.id)

    async def query(self, model: str, query: Query[A], deadline: float) -> A:
        self.queries.append((model, query))
        self.deadlines.append(deadline)
        result = self.results[type(query)]
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]

    def health(self, model: str) -> ModelStatus:
        self.heartbeat.set()
        return self.statuses.get(model, ModelStatus(model, ModelState.READY))

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(self.running, 0, 64)

    def plays(self, *steps: Step) -> None:
        """Play these steps for every request."""
        self.script = lambda request: steps


@dataclass
class ScriptedTelemetry:
    """Keeps the errors with the model of each, the calls that have ended, and what is stored.

    `stored` is the number of stored responses, and their size in bytes. `keys` are the outcomes of requests with an
    idempotency key.
    """

    errors: list[tuple[ServeAppError, str | None]] = field(default_factory=list)
    calls: list[HttpCall] = field(default_factory=list)
    open_calls: int = 0
    stored: tuple[int, int] = (0, 0)
    auth_refusals: list[str] = field(default_factory=list)
    removed: int = 0
    keys: list[str] = field(default_factory=list)
    kept_bytes: int = 0

    def refused(self, error: ServeAppError, model: str | None) -> None:
        self.errors.append((error, model))

    def auth_refused(self, reason: str) -> None:
        self.auth_refusals.append(reason)

    def call_began(self) -> None:
        self.open_calls += 1

    def call_ended(self, call: HttpCall) -> None:
        self.open_calls -= 1
        self.calls.append(call)

    def responses_stored(self, count: int, size: int, removed: int) -> None:
        self.stored = (count, size)
        self.removed += removed

    def key_used(self, outcome: str) -> None:
        self.keys.append(outcome)

    def answers_kept(self, size: int) -> None:
        self.kept_bytes = size

    async def exposition(self) -> bytes:
        return b"up 1\n"


@dataclass
class Clock:
    """Monotonic seconds that advance only when a test advances them."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def app_config(**limits: Any) -> AppConfig:
    deployment = Deployment(max_ongoing_requests=64, max_queued_requests=8, num_replicas=1)
    return AppConfig(
        models=(
            Model(
                name="small",
                source="toy",
                deployment=deployment,
                sampling_defaults=SamplingDefaults(temperature=0.2, top_p=0.9),
                embeddings=True,
                lora=Lora(adapters=(LoraAdapter(name="support", source="/adapters/support"),), allow=("/adapters",)),
            ),
            Model(
                name="org/large", source="toy", deployment=deployment, sampling_defaults=SamplingDefaults(temperature=0)
            ),
        ),
        ingress=Ingress(deployment=deployment),
        limits=Limits(**limits),
    )


@dataclass
class Connection:
    """The server's side of one POST. The client disconnects when `disconnect` is set.

    `fail_at` is the number of the message whose write fails. `written` is set when a part of the body was written.
    """

    path: str
    body: Any
    fail_at: int | None = None
    parts: list[bytes] | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)
    disconnect: asyncio.Event = field(default_factory=asyncio.Event)
    written: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": "POST",
            "path": self.path,
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "query_string": b"",
            "headers": self.headers,
        }

    async def receive(self) -> Any:
        if self.parts is None:
            self.parts = [json.dumps(self.body).encode()]
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.fail_at is not None and len(self.sent) >= self.fail_at:
            raise OSError("broken pipe")
        self.sent.append(message)
        if message.get("body"):
            self.written.set()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def serve(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, connection: Connection, **limits: Any
) -> asyncio.Task[None]:
    """The application at work on one connection."""
    app = create_app(engine, telemetry, app_config(**limits))
    return asyncio.create_task(app(connection.scope, connection.receive, connection.send))


def events_of(text: str) -> list[Any]:
    """The data of every event, parsed as strictly as a browser does, without the comments."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(data) <= 1
        found += [one if one == "[DONE]" else json.loads(one) for one in data]
    return found


def anthropic_error_of(answer: httpx.Response) -> tuple[str, str]:
    """The type and the message of an error, checked to be complete."""
    body = answer.json()
    return check_anthropic_error(body, answer.headers["x-request-id"])


def check_anthropic_error(body: Any, request_id: str) -> tuple[str, str]:
    assert body == {"type": "error", "error": body["error"], "request_id": request_id}
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def assert_invalid(answer: httpx.Response) -> None:
    """OpenAI's clients know 400 as the status of a wrong request."""
    assert answer.status_code == (400 if answer.request.url.path.startswith("/v1") else 422), answer.text


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, checked to be complete in the dialect of its path."""
    return check_error(answer.request.url.path, answer.json(), answer.headers["x-request-id"])


def check_error(path: str, body: Any, request_id: str) -> dict[str, Any]:
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    if path.startswith("/v1"):
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    else:
        assert set(error) == {"code", "message", "param", "request_id"}
        assert error["request_id"] == request_id
    assert error["message"]
    return error


def tgi_error_of(answer: httpx.Response) -> tuple[str, str]:
    """The message and the type of an error, checked to be complete."""
    body = answer.json()
    assert set(body) == {"error", "error_type"}
    return body["error"], body["error_type"]
