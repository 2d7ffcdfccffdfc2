"""A golden server: it answers at known instants, so that whoever measures it can be judged.

Token i of an answer is due `ttft + i * itl` after its request arrived, or after a slot came free for it: from that
instant, not from the token before, so that lateness does not add up. It speaks all three dialects, fails as it is told,
and counts on /metrics what it sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeAlias

from aiohttp import web

from perf import loop
from perf.exits import Exit

Json: TypeAlias = dict[str, Any]

KINDS = ("429", "500", "in-band", "cut", "hang")


@dataclass(frozen=True)
class Plan:
    """Seconds. `slots` requests are answered at a time, the others wait in line; None: everybody at once.

    `stall_s` is a pause of the whole server, once, `stall_at_s` after its first request. `errors` is the share of
    requests that fail, by KINDS, drawn by `seed`.
    """

    ttft_s: float = 0.05
    itl_s: float = 0.01
    tokens_per_chunk: int = 1
    slots: int | None = None
    stall_s: float = 0.0
    stall_at_s: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    model: str = "mock"


class Golden:
    """`app()` is the server. Its counts are of what was sent, to clients who left as well."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests = self.tokens = self.prompt_tokens = 0
        self._slots = asyncio.Semaphore(plan.slots) if plan.slots is not None else None
        self._random = random.Random(plan.seed)
        self._first_at: float | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self._native)
        app.router.add_post("/generate_stream", self._native)
        app.router.add_post("/generate_batch", self._native_batch)
        app.router.add_post("/v1/completions", self._openai)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _native(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        if "inputs" in body:
            asked = body["parameters"]["max_new_tokens"], _words(body["inputs"])
            writer = _tgi(*asked)
        else:
            asked = body["max_tokens"], _words(body["prompt"])
            writer = _native(*asked)
        return await self._answer(http, *asked, writer, streaming=http.path == "/generate_stream")

    async def _native_batch(self, http: web.Request) -> web.StreamResponse:
        """One place in line; its prompts are answered beside each other, as many at a time as there are slots."""
        body = await http.json()
        count, prompts = body["max_tokens"], body["prompts"]
        words = sum(map(_words, prompts))
        return await self._answer(http, count, words, _native_batch(count, words, len(prompts)), times=len(prompts))

    async def _openai(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        asked = body["max_tokens"], sum(map(_words, prompts))
        writer = _openai(*asked, len(prompts))
        return await self._answer(http, *asked, writer, times=len(prompts), streaming=body.get("stream", False))

    async def _answer(
        self, http: web.Request, count: int, words: int, writer: Writer, times: int = 1, streaming: bool = False
    ) -> web.StreamResponse:
        arrived = self._now()
        self._first_at = self._first_at or arrived
        self.requests += 1
        fault = self._fault()
        if fault in ("429", "500"):
            return web.json_response({"error": {"code": fault, "message": "as planned"}}, status=int(fault))
        async with self._slot() as began:
            if fault == "hang":
                await asyncio.sleep(3600)
            self.prompt_tokens += words
            if streaming:
                return await self._stream(http, began, count, writer, fault)
            rounds = ceil(times / self.plan.slots) if self.plan.slots is not None else 1
            await self._until(began + rounds * (self.plan.ttft_s + (count - 1) * self.plan.itl_s))
            self.tokens += count * times
            return web.json_response(writer.whole)

    async def _stream(
        self, http: web.Request, began: float, count: int, writer: Writer, fault: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(http)
        for token in range(0, count, self.plan.tokens_per_chunk):
            if fault is not None and token >= count // 2:
                if fault == "in-band":
                    await response.write(writer.failure)
                elif http.transport is not None:
                    http.transport.abort()
                return response
            together = range(token, min(token + self.plan.tokens_per_chunk, count))
            await self._until(began + self.plan.ttft_s + token * self.plan.itl_s)
            await response.write(b"".join(map(writer.event, together)))
            self.tokens += len(together)
        await response.write_eof(writer.end)
        return response

    def _fault(self) -> str | None:
        drawn = self._random.random()
        for kind, share in self.plan.errors.items():
            drawn -= share
            if drawn < 0:
                return kind
        return None

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[float]:
        """Yields the instant at which one is free."""
        async with self._slots or nullcontext():
            yield self._now()

    async def _until(self, due: float) -> None:
        """With the server's one pause in it, if that falls there."""
        if self.plan.stall_s and self._first_at is not None:
            begins = self._first_at + self.plan.stall_at_s
            if begins <= due < begins + self.plan.stall_s:
                due = begins + self.plan.stall_s
        if (delay := due - self._now()) > 0:
            await asyncio.sleep(delay)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.plan.model, "object": "model"}]})

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _metrics(self, http: web.Request) -> web.Response:
        counts = {"requests": self.requests, "prompt_tokens": self.prompt_tokens, "generated_tokens": self.tokens}
        lines = [
            f'# TYPE serve_app_{name} counter\nserve_app_{name}_total{{model="{self.plan.model}"}} {value}\n'
            for name, value in counts.items()
        ]
        return web.Response(text="".join(lines))


@dataclass(frozen=True)
class Writer:
    """The parts of an answer in one dialect."""

    event: Callable[[int], bytes]
    end: bytes
    failure: bytes
    whole: Any


def _data(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _usage(count: int, words: int, times: int = 1) -> Json:
    return {"prompt_tokens": words, "completion_tokens": count * times, "total_tokens": words + count * times}


def _native(count: int, words: int) -> Writer:
    plain = _data({"token": " a", "finished": False})
    last = _data({"token": " a", "finished": True, "finish_reason": "length", "usage": _usage(count, words)})
    failure = _data({"error": {"code": "internal", "message": "as planned"}, "finished": True})
    whole = {"text": " a" * count, "usage": _usage(count, words)}
    return Writer(lambda token: last if token == count - 1 else plain, b"", b"event: error\n" + failure, whole)


def _native_batch(count: int, words: int, times: int) -> Writer:
    one = {"text": " a" * count, "usage": _usage(count, words // times)}
    whole = {"results": [one] * times, "usage": _usage(count, words, times)}
    return Writer(lambda token: b"", b"", b"", whole)


def _openai(count: int, words: int, times: int) -> Writer:
    usage = _usage(count, words, times)
    plain = _data({"choices": [{"index": 0, "text": " a", "finish_reason": None}]})
    last = _data({"choices": [{"index": 0, "text": " a", "finish_reason": "length"}]})
    end = _data({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    failure = _data({"error": {"code": "internal", "message": "as planned"}}) + b"data: [DONE]\n\n"
    whole = {"choices": [{"index": i, "text": " a" * count} for i in range(times)], "usage": usage}
    return Writer(lambda token: last if token == count - 1 else plain, end, failure, whole)


def _tgi(count: int, words: int) -> Writer:
    details = {"finish_reason": "length", "generated_tokens": count, "input_length": words}
    plain = _data({"token": {"text": " a"}, "details": None})
    last = _data({"token": {"text": " a"}, "generated_text": " a" * count, "details": details})
    failure = _data({"error": "as planned", "error_type": "generation"})
    prefill = [{"text": " a"}] * words
    whole = {"generated_text": " a" * count, "details": {**details, "prefill": prefill}}
    return Writer(lambda token: last if token == count - 1 else plain, b"", failure, whole)


def _words(prompt: str) -> int:
    return len(prompt.split())


def _errors(text: str) -> dict[str, float]:
    shares = {kind: float(share) for kind, _, share in (part.partition(":") for part in text.split(","))}
    if not set(shares) <= set(KINDS) or not 0 <= sum(shares.values()) <= 1:
        raise ValueError
    return shares


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.mock", description=__doc__)
    plan = Plan()
    parser.add_argument("--host", default="127.0.0.1", help="where it listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="0 picks a free one, and says which")
    parser.add_argument("--ttft-ms", type=float, default=plan.ttft_s * 1e3, help="default: %(default)g")
    parser.add_argument("--itl-ms", type=float, default=plan.itl_s * 1e3, help="default: %(default)g")
    parser.add_argument("--tokens-per-chunk", type=int, default=1, help="tokens sent at once (default: 1)")
    parser.add_argument("--slots", type=int, help="requests at a time (default: any number)")
    parser.add_argument("--stall-ms", type=float, default=0, help="length of the one pause (default: none)")
    parser.add_argument("--stall-at-s", type=float, default=0, help="when it begins, since the first request")
    parser.add_argument(
        "--errors", type=_errors, default={}, metavar="KIND:SHARE,...", help=f"kinds: {', '.join(KINDS)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the errors")
    return parser


async def serve(plan: Plan, host: str, port: int) -> None:
    """Until cancelled; prints the address."""
    runner = web.AppRunner(Golden(plan).app(), access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=4096)
        await site.start()
        host, port = runner.addresses[0][:2]
        print(f"answers on http://{host}:{port}", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(arguments)
    plan = Plan(
        ttft_s=asked.ttft_ms / 1e3,
        itl_s=asked.itl_ms / 1e3,
        tokens_per_chunk=asked.tokens_per_chunk,
        slots=asked.slots,
        stall_s=asked.stall_ms / 1e3,
        stall_at_s=asked.stall_at_s,
        errors=asked.errors,
        seed=asked.seed,
    )
    try:
        loop.run(serve(plan, asked.host, asked.port))
    except KeyboardInterrupt:
        return Exit.OK
    except OSError as error:
        print(f"cannot listen on {asked.host}:{asked.port}: {error.strerror}", file=sys.stderr)
        return Exit.USAGE
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
