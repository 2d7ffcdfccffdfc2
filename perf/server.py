"""The server as seen over HTTP: whether it is reachable, its name and models, and its counters."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from perf.client import Client


class Unreachable(Exception):
    """No usable server at the address; the message says what to do."""


@dataclass(frozen=True)
class ServerCounters:
    """Names of a server's counters on /metrics; values are summed over all labels. None: the server has none."""

    server: str
    prefix: str  # of all its metrics; identifies the server before its counters exist
    tokens: str
    prompt_tokens: str
    requests: str | None
    others: dict[str, str] = field(default_factory=dict)


# Sources of the names: serve_app/deployments/metrics.py; vLLM v1/metrics/loggers.py; llama.cpp
# tools/server/README.md; TGI router/src/server.rs.
KNOWN_SERVERS = (
    ServerCounters(
        "serve_app",
        "serve_app_",
        "serve_app_generated_tokens_total",
        "serve_app_prompt_tokens_total",
        "serve_app_requests_total",
        {
            "steps": "serve_app_engine_steps_total",
            "rows": "serve_app_engine_rows_total",
            "busy_s": "serve_app_engine_busy_seconds_total",
            "preemptions": "serve_app_engine_preemptions_total",
            "cached_prompt_tokens": "serve_app_prefix_cache_hit_tokens_total",
            "queue_s": "serve_app_queue_seconds_sum",
            "queued": "serve_app_queue_seconds_count",
            "errors": "serve_app_errors_total",
        },
    ),
    ServerCounters(
        "vLLM",
        "vllm:",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
        {
            "preemptions": "vllm:num_preemptions_total",
            "queue_s": "vllm:request_queue_time_seconds_sum",
            "queued": "vllm:request_queue_time_seconds_count",
        },
    ),
    ServerCounters("llama.cpp", "llamacpp:", "llamacpp:tokens_predicted_total", "llamacpp:prompt_tokens_total", None),
    ServerCounters(
        "TGI",
        "tgi_",
        "tgi_request_generated_tokens_sum",
        "tgi_request_input_length_sum",
        "tgi_request_success_total",
        {"queue_s": "tgi_request_queue_duration_sum", "queued": "tgi_request_queue_duration_count"},
    ),
)


@dataclass(frozen=True)
class CounterValues:
    """The counters of a server at one time."""

    names: ServerCounters
    values: dict[str, float]

    def since(self, before: CounterValues) -> dict[str, float]:
        return {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}


async def read(client: Client) -> CounterValues | None:
    """None if the server has no metrics or none that are known here."""
    try:
        status, text = await client.get("/metrics")
    except (OSError, TimeoutError, aiohttp.ClientError):
        return None
    return parse(text) if status == 200 else None


def parse(text: str) -> CounterValues | None:
    """Parses Prometheus text; None if it is invalid or from an unknown server."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError:
        return None
    for server in KNOWN_SERVERS:
        if any(name.startswith(server.prefix) for name in sums):
            names = {"tokens": server.tokens, "prompt_tokens": server.prompt_tokens, **server.others}
            if server.requests is not None:
                names["requests"] = server.requests
            return CounterValues(server, {ours: sums.get(theirs, 0.0) for ours, theirs in names.items()})
    return None


async def read_after(
    client: Client, before: CounterValues, tokens: int, timeout_s: float = 3.0
) -> CounterValues | None:
    """Reads until the server has counted `tokens` tokens, at most `timeout_s`: /metrics lags behind the responses."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    while True:
        after = await read(client)
        if after is None or after.since(before)["tokens"] >= tokens or clock() >= deadline:
            return after
        await asyncio.sleep(0.2)


@dataclass(frozen=True)
class ServerInfo:
    """`models` are those of /v1/models; the first one is the default."""

    name: str
    models: list[str]
    counters: CounterValues | None


async def identify(client: Client, url: str) -> ServerInfo:
    """Raises Unreachable."""
    try:
        status, text = await client.get("/v1/models")
    except (OSError, TimeoutError, aiohttp.ClientError) as error:
        raise Unreachable(
            f"no server answers at {url} ({error or type(error).__name__}); start the service with `make serve`, or "
            "give another address with --url"
        ) from None
    if status in (401, 403):
        raise Unreachable(f"{url} requires an API key ({status}); give its file with --api-key-file")
    counters = await read(client)
    return ServerInfo(counters.names.server if counters is not None else "unknown", _models(text), counters)


async def quantization(client: Client, model: str | None) -> str | None:
    """The quantization of the model's weights, as `/info` has it; None if the server does not report it."""
    try:
        status, text = await client.get("/info" if model is None else f"/info?{urlencode({'model': model})}")
        found = json.loads(text)["quantization"] if status == 200 else None
    except (OSError, TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _models(text: str) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(text)["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def is_local(url: str) -> bool:
    """Whether the address belongs to this machine."""
    host = urlsplit(url).hostname or ""
    if re.fullmatch(r"localhost|127\..*|::1", host):
        return True
    try:
        remote = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    local = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(remote & local)
