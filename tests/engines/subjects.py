"""The engines of the contract, with the same limits, and short ways to use them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any

from serve_app.config import Model
from serve_app.core.events import TokenEvent
from serve_app.core.requests import GenerationRequest, SamplingParams, TextPrompt, TokenPrompt
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.protocol import ReplicaEngine
from serve_app.engines.stream import TokenStream
from serve_app.engines.toy import ToyRunner
from serve_app.errors import ServeAppError
from tests.models.concurrent_load import read

MAX_RUNNING, MAX_WAITING, CONTEXT = 4, 4, 512
ONCE = TextPrompt("Once upon a time, in a small village")
LONG = TokenPrompt(tuple(number % 200 for number in range(300)))
DEPLOYMENT = {"num_replicas": 1, "max_ongoing_requests": 64, "max_queued_requests": 64}
LIMITS = {"max_running": MAX_RUNNING, "max_waiting": MAX_WAITING, "max_context": CONTEXT}


class Subject:
    """An engine and short ways to use it. All tests share its event loop."""

    def __init__(self, kind: str, engine: ReplicaEngine) -> None:
        self.kind = kind
        self.engine = engine

    def stream(self, prompt: Any = ONCE, *, timeout_s: float = 300, **changes: Any) -> TokenStream:
        """The stream of a greedy request for 16 tokens, with other fields and parameters as given."""
        ours = {name: changes.pop(name) for name in list(changes) if name in GenerationRequest.__slots__}
        params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **changes})
        now = time.monotonic()
        return TokenStream(replace(GenerationRequest("id", "m", prompt, params, now, now + timeout_s), **ours))

    async def admit(self, *streams: TokenStream) -> list[ServeAppError | None]:
        return await asyncio.to_thread(self.engine.admit, list(streams))

    async def events(self, prompt: Any = ONCE, **changes: Any) -> list[TokenEvent]:
        """The events of the answer to one request."""
        (events,) = await self.all_events(self.stream(prompt, **changes))
        return events

    async def all_events(self, *streams: TokenStream) -> list[list[TokenEvent]]:
        """The events of requests that are admitted together."""
        assert await self.admit(*streams) == [None] * len(streams)
        return list(await asyncio.gather(*(read(stream) for stream in streams)))

    async def refusal(self, prompt: Any = ONCE, **changes: Any) -> ServeAppError | None:
        (refusal,) = await self.admit(self.stream(prompt, **changes))
        return refusal


def model(kind: str, **more: Any) -> Model:
    engine: dict[str, Any] = {"kind": kind, **LIMITS}
    if kind == "vllm":
        engine |= {"enforce_eager": True, "kv_memory_bytes": 2**29}
    else:
        engine |= {"threads": 1}
        more |= {"quantization": "int8"}
    fields: dict[str, Any] = {"name": "m", "source": "builtin:smollm2-135m", "dtype": "float32", **more}
    return Model(**fields, chat_template="builtin:chatml_tools", engine=engine, deployment=DEPLOYMENT)


def make_engine(kind: str, **more: Any) -> ReplicaEngine:
    """An engine of this kind; vLLM's with more keys of the model."""
    if kind == "vllm":
        from serve_app.engines.vllm.engine import VllmEngine

        return VllmEngine(model(kind, **more), lambda stage: None)
    options = model("native").native_options
    if kind == "toy":
        return NativeEngine(partial(ToyRunner, options, step_ms=5), options)
    from serve_app.engines.native.runner import TorchRunner

    return NativeEngine(partial(TorchRunner.from_config, model("native"), lambda stage: None), options)
