"""A gateway that plays a script, and the two ends of an ASGI connection written by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import httpx

from serve_app.config import AppConfig, Deployment, Ingress, Limits, Model, SamplingDefaults
from serve_app.core.events import Chunk, FinishReason, Logprobs, TextToken, TokenEvent, TokenLogprob
from serve_app.core.http import HttpCall
from serve_app.core.queries import A, Detokenize, GetModelInfo, ModelInfo, ModelState, ModelStatus, Query, Tokenize
from serve_app.core.requests import GenerationRequest, TextPrompt
from serve_app.errors import ServeAppError

# The shortest good body of every route that takes one.
POSTS: dict[str, dict[str, object]] = {
    "/generate": {"prompt": "hi"},
    "/generate_stream": {"prompt": "hi"},
    "/generate_batch": {"prompts": ["hi"]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


# What a model says when it is asked.
ANSWERS: dict[type[Query[Any]], Any] = {
    GetModelInfo: ModelInfo(context=2048, vocabulary=300, special_ids=frozenset({2})),
    Tokenize: (TextToken(5, "so", 0, 2), TextToken(6, "me", 2, 4)),
    Detokenize: "some",
}


class Beat(Enum):
    """Silence until the stream has asked what it waits for, as it does for every heartbeat."""

    BEAT = auto()


BEAT = Beat.BEAT

# A chunk is yielded, an exception raised, a number slept; None waits for ever.
Step = Chunk | BaseException | float | Beat | None
Script = Callable[[GenerationRequest], Iterable[Step]]


def tokens(texts: Sequence[str], finish: FinishReason | None = FinishReason.STOP, start: int = 0) -> list[TokenEvent]:
    """Events 10 ms apart, the first after 50 ms."""
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
    prompt = request.prompt
    words = prompt.text.split(" ") if isinstance(prompt, TextPrompt) else ["some", " words"]
    if len(words) == 1:
        return [chunk(words)]
    return [chunk(words[:1], None), chunk(words[1:], start=1)]


@dataclass
class ScriptedGateway:
    """Keeps what it was asked. `crowded` is set once `crowd` requests run at the same time."""

    script: Script = echo
    states: list[ModelStatus] = field(default_factory=lambda: [ModelStatus("small", ModelState.READY)])
    word: str = "warming"
    requests: list[GenerationRequest] = field(default_factory=list)
    warm_waits: list[float | None] = field(default_factory=list)
    refusals: list[tuple[ServeAppError, str | None]] = field(default_factory=list)
    questions: list[tuple[str, Query[Any]]] = field(default_factory=list)
    answers: dict[type[Query[Any]], Any] = field(default_factory=lambda: dict(ANSWERS))
    closed: list[str] = field(default_factory=list)
    calls: list[HttpCall] = field(default_factory=list)
    open_calls: int = 0
    completed: int = 0
    running: int = 0
    most_running: int = 0
    crowd: int = 1
    crowded: asyncio.Event = field(default_factory=asyncio.Event)
    beaten: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(self, request: GenerationRequest, warm_wait_s: float | None = None) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        self.warm_waits.append(warm_wait_s)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.running >= self.crowd:
            self.crowded.set()
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Chunk):
                    yield step
                elif isinstance(step, Beat):
                    self.beaten.clear()
                    await self.beaten.wait()
                else:
                    await asyncio.sleep(3600 if step is None else step)
            self.completed += 1
        finally:
            self.running -= 1
            self.closed.append(request.id)

    async def query(self, model: str, question: Query[A], warm_wait_s: float) -> A:
        self.questions.append((model, question))
        answer = self.answers[type(question)]
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def waiting_on(self, model: str) -> str:
        self.beaten.set()
        return self.word

    async def models(self) -> list[ModelStatus]:
        return self.states

    async def metrics(self) -> bytes:
        return b"up 1\n"

    def refused(self, error: ServeAppError, model: str | None) -> None:
        self.refusals.append((error, model))

    def call_began(self) -> None:
        self.open_calls += 1

    def call_ended(self, call: HttpCall) -> None:
        self.open_calls -= 1
        self.calls.append(call)

    def plays(self, *steps: Step) -> None:
        self.script = lambda request: steps


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
            ),
            Model(
                name="org/large", source="toy", deployment=deployment, sampling_defaults=SamplingDefaults(temperature=0)
            ),
        ),
        ingress=Ingress(deployment=deployment),
        limits=Limits(**limits),
    )


@dataclass
class Wire:
    """The server's side of one POST: `leave` is the client hanging up; `fail_at` makes that send raise OSError."""

    path: str
    body: Any
    fail_at: int | None = None
    parts: list[bytes] | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    wrote: asyncio.Event = field(default_factory=asyncio.Event)

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
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.fail_at is not None and len(self.sent) >= self.fail_at:
            raise OSError("broken pipe")
        self.sent.append(message)
        if message.get("body"):
            self.wrote.set()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def frames(text: str) -> list[Any]:
    """The data of every frame, parsed as strictly as a browser does; comments are left out."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(data) <= 1
        found += [one if one == "[DONE]" else json.loads(one) for one in data]
    return found


def told(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, checked to be whole in the dialect of its path."""
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    if answer.request.url.path.startswith("/v1"):
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    else:
        assert set(error) == {"code", "message", "param", "request_id"}
        assert error["request_id"] == answer.headers["x-request-id"]
    assert error["message"]
    return error
