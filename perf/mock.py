"""A mock LLM server whose token times are known, for tests of load generators.

Token i of a response is due `ttft + i * itl` after its request arrived or got a slot. Times count from that instant
and not from the token before, so that delays do not add up. The server has all three APIs, fails as configured, and
counts on /metrics what it sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeAlias

from aiohttp import web

from perf import loop
from perf.exits import Exit

Json: TypeAlias = dict[str, Any]

ERROR_KINDS = ("429", "500", "in-band", "cut", "hang")


@dataclass(frozen=True)
class MockConfig:
    """Times in seconds. `slots`: requests that are answered at a time, others wait; None: no limit.

    The server stalls once, for `stall_s` seconds, `stall_at_s` after its first request. `errors` maps ERROR_KINDS to
    the share of requests that fail so, drawn by `seed`.
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


class MockServer:
    """`app()` is the server. It counts all tokens that it sent, also to clients that disconnected."""

    def __init__(self, config: MockConfig) -> None:
        self.config = config
        self.requests = self.tokens = self.prompt_tokens = 0
        self._slots = asyncio.Semaphore(config.slots) if config.slots is not None else None
        self._random = random.Random(config.seed)
        self._first_request_at: float | None = None

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
            size = body["parameters"]["max_new_tokens"], _words(body["inputs"])
            encoder = _tgi(*size)
        else:
            size = body["max_tokens"], _words(body["prompt"])
            encoder = _native(*size)
        return await self._respond(http, *size, encoder, streaming=http.path == "/generate_stream")

    async def _native_batch(self, http: web.Request) -> web.StreamResponse:
        """A batch takes one place in the queue; its prompts run in parallel, as many at a time as there are slots."""
        body = await http.json()
        count, prompts = body["max_tokens"], body["prompts"]
        words = sum(map(_words, prompts))
        return await self._respond(http, count, words, _native_batch(count, words, len(prompts)), prompts=len(prompts))

    async def _openai(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        size = body["max_tokens"], sum(map(_words, prompts))
        encoder = _openai(*size, len(prompts))
        streaming = body.get("stream", False)
        return await self._respond(http, *size, encoder, prompts=len(prompts), streaming=streaming)

    async def _respond(
        self,
        http: web.Request,
        count: int,
        words: int,
        encoder: ResponseEncoder,
        prompts: int = 1,
        streaming: bool = False,
    ) -> web.StreamResponse:
        self._first_request_at = self._first_request_at or self._now()
        self.requests += 1
        error = self._draw_error()
        if error in ("429", "500"):
            return web.json_response({"error": {"code": error, "message": "as configured"}}, status=int(error))
        async with self._slot() as start:
            if error == "hang":
                await asyncio.sleep(3600)
            self.prompt_tokens += words
            if streaming:
                return await self._stream(http, start, count, encoder, error)
            rounds = ceil(prompts / self.config.slots) if self.config.slots is not None else 1
            await self._sleep_until(start + rounds * (self.config.ttft_s + (count - 1) * self.config.itl_s))
            self.tokens += count * prompts
            return web.json_response(encoder.response)

    async def _stream(
        self, http: web.Request, start: float, count: int, encoder: ResponseEncoder, error: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(http)
        for token in range(0, count, self.config.tokens_per_chunk):
            if error is not None and token >= count // 2:
                if error == "in-band":
                    await response.write(encoder.error)
                elif http.transport is not None:
                    http.transport.abort()
                return response
            chunk = range(token, min(token + self.config.tokens_per_chunk, count))
            await self._sleep_until(start + self.config.ttft_s + token * self.config.itl_s)
            await response.write(b"".join(map(encoder.event, chunk)))
            self.tokens += len(chunk)
        await response.write_eof(encoder.end)
        return response

    def _draw_error(self) -> str | None:
        drawn = self._random.random()
        for kind, share in self.config.errors.items():
            drawn -= share
            if drawn < 0:
                return kind
        return None

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[float]:
        """Yields the time at which a slot is free."""
        async with self._slots or nullcontext():
            yield self._now()

    async def _sleep_until(self, due: float) -> None:
        """A time within the stall is moved to its end."""
        if self.config.stall_s and self._first_request_at is not None:
            stall_start = self._first_request_at + self.config.stall_at_s
            if stall_start <= due < stall_start + self.config.stall_s:
                due = stall_start + self.config.stall_s
        if (delay := due - self._now()) > 0:
            await asyncio.sleep(delay)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.config.model, "object": "model"}]})

    async def _health(self, http: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _metrics(self, http: web.Request) -> web.Response:
        counts = {"requests": self.requests, "prompt_tokens": self.prompt_tokens, "generated_tokens": self.tokens}
        lines = [
            f'# TYPE serve_app_{name} counter\nserve_app_{name}_total{{model="{self.config.model}"}} {value}\n'
            for name, value in counts.items()
        ]
        return web.Response(text="".join(lines))


@dataclass(frozen=True)
class ResponseEncoder:
    """The parts of a response in one API: the event of a token by its index, the end of a stream, an error in band."""

    event: Callable[[int], bytes]
    end: bytes
    error: bytes
    response: Any


def _data(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _usage(count: int, words: int, prompts: int = 1) -> Json:
    return {"prompt_tokens": words, "completion_tokens": count * prompts, "total_tokens": words + count * prompts}


def _native(count: int, words: int) -> ResponseEncoder:
    plain = _data({"token": " a", "finished": False})
    last = _data({"token": " a", "finished": True, "finish_reason": "length", "usage": _usage(count, words)})
    error = _data({"error": {"code": "internal", "message": "as configured"}, "finished": True})
    response = {"text": " a" * count, "usage": _usage(count, words)}
    return ResponseEncoder(
        lambda token: last if token == count - 1 else plain, b"", b"event: error\n" + error, response
    )


def _native_batch(count: int, words: int, prompts: int) -> ResponseEncoder:
    one = {"text": " a" * count, "usage": _usage(count, words // prompts)}
    response = {"results": [one] * prompts, "usage": _usage(count, words, prompts)}
    return ResponseEncoder(lambda token: b"", b"", b"", response)


def _openai(count: int, words: int, prompts: int) -> ResponseEncoder:
    usage = _usage(count, words, prompts)
    plain = _data({"choices": [{"index": 0, "text": " a", "finish_reason": None}]})
    last = _data({"choices": [{"index": 0, "text": " a", "finish_reason": "length"}]})
    end = _data({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    error = _data({"error": {"code": "internal", "message": "as configured"}}) + b"data: [DONE]\n\n"
    response = {"choices": [{"index": i, "text": " a" * count} for i in range(prompts)], "usage": usage}
    return ResponseEncoder(lambda token: last if token == count - 1 else plain, end, error, response)


def _tgi(count: int, words: int) -> ResponseEncoder:
    details = {"finish_reason": "length", "generated_tokens": count, "input_length": words}
    plain = _data({"token": {"text": " a"}, "details": None})
    last = _data({"token": {"text": " a"}, "generated_text": " a" * count, "details": details})
    error = _data({"error": "as configured", "error_type": "generation"})
    prefill = [{"text": " a"}] * words
    response = {"generated_text": " a" * count, "details": {**details, "prefill": prefill}}
    return ResponseEncoder(lambda token: last if token == count - 1 else plain, b"", error, response)


def _words(prompt: str) -> int:
    return len(prompt.split())


def _error_shares(text: str) -> dict[str, float]:
    shares = {kind: float(share) for kind, _, share in (part.partition(":") for part in text.split(","))}
    if not set(shares) <= set(ERROR_KINDS) or not 0 <= sum(shares.values()) <= 1:
        raise ValueError
    return shares


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.mock", description=__doc__)
    default = MockConfig()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="0 chooses a free port and prints it (default: 8001)")
    parser.add_argument("--ttft-ms", type=float, default=default.ttft_s * 1e3, help="default: %(default)g")
    parser.add_argument("--itl-ms", type=float, default=default.itl_s * 1e3, help="default: %(default)g")
    parser.add_argument("--tokens-per-chunk", type=int, default=1, help="tokens per write (default: 1)")
    parser.add_argument("--slots", type=int, help="requests answered at a time (default: no limit)")
    parser.add_argument("--stall-ms", type=float, default=0, help="length of the single stall (default: none)")
    parser.add_argument("--stall-at-s", type=float, default=0, help="start of the stall after the first request")
    parser.add_argument(
        "--errors",
        type=_error_shares,
        default={},
        metavar="KIND:SHARE,...",
        help=f"shares of failing requests; kinds: {', '.join(ERROR_KINDS)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the errors (default: 0)")
    return parser


@asynccontextmanager
async def running(config: MockConfig, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Runs the server in this event loop; yields its URL."""
    runner = web.AppRunner(MockServer(config).app(), access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def _serve(config: MockConfig, host: str, port: int) -> None:
    """Prints the URL and serves until it is cancelled."""
    async with running(config, host, port) as url:
        print(f"listening on {url}", flush=True)
        await asyncio.Event().wait()


@contextmanager
def mock_server(*options: str) -> Iterator[str]:
    """Runs the server with these command line options in another process; yields its URL."""
    command = [sys.executable, "-m", "perf.mock", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("listening on ").strip()
        finally:
            process.terminate()


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    config = MockConfig(
        ttft_s=args.ttft_ms / 1e3,
        itl_s=args.itl_ms / 1e3,
        tokens_per_chunk=args.tokens_per_chunk,
        slots=args.slots,
        stall_s=args.stall_ms / 1e3,
        stall_at_s=args.stall_at_s,
        errors=args.errors,
        seed=args.seed,
    )
    try:
        loop.run(_serve(config, args.host, args.port))
    except KeyboardInterrupt:
        return Exit.OK
    except OSError as error:
        print(f"cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return Exit.USAGE
    return Exit.OK


if __name__ == "__main__":
    sys.exit(main())
