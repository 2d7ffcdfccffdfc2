"""The server seen from outside: whether it is there, what it is, and what its counters say."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from perf.client import Client


class Unreachable(Exception):
    """Nothing answers there, or not with what is needed; the sentence says what to do."""


@dataclass(frozen=True)
class Counters:
    """What a kind of server calls its counters; sums over all labels. None: it has no such."""

    server: str
    prefix: str  # of all names of its metrics; a counter may not be there before the first request
    tokens: str
    prompt_tokens: str
    requests: str | None
    others: dict[str, str] = field(default_factory=dict)


# By the names in their sources: serve_app/deployments/metrics.py; vLLM v1/metrics/loggers.py; llama.cpp
# tools/server/README.md; TGI router/src/server.rs.
KNOWN = (
    Counters(
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
    Counters(
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
    Counters("llama.cpp", "llamacpp:", "llamacpp:tokens_predicted_total", "llamacpp:prompt_tokens_total", None),
    Counters(
        "TGI",
        "tgi_",
        "tgi_request_generated_tokens_sum",
        "tgi_request_input_length_sum",
        "tgi_request_success_total",
        {"queue_s": "tgi_request_queue_duration_sum", "queued": "tgi_request_queue_duration_count"},
    ),
)


@dataclass(frozen=True)
class Reading:
    """Counters at one instant."""

    known: Counters
    values: dict[str, float]

    def since(self, before: Reading) -> dict[str, float]:
        return {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}


async def read(client: Client) -> Reading | None:
    """None: no metrics, or of a server that is not known here."""
    try:
        status, text = await client.get("/metrics")
    except (OSError, TimeoutError, aiohttp.ClientError):
        return None
    return parse(text) if status == 200 else None


def parse(text: str) -> Reading | None:
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError:
        return None
    for known in KNOWN:
        if any(name.startswith(known.prefix) for name in sums):
            names = {"tokens": known.tokens, "prompt_tokens": known.prompt_tokens, **known.others}
            if known.requests is not None:
                names["requests"] = known.requests
            return Reading(known, {ours: sums.get(theirs, 0.0) for ours, theirs in names.items()})
    return None


async def read_after(client: Client, before: Reading, tokens: int, patience_s: float = 3.0) -> Reading | None:
    """Once it has counted as many tokens as the client, or has had time to: counters come late to /metrics."""
    clock = asyncio.get_running_loop().time
    until = clock() + patience_s
    while True:
        after = await read(client)
        if after is None or after.since(before)["tokens"] >= tokens or clock() >= until:
            return after
        await asyncio.sleep(0.2)


@dataclass(frozen=True)
class Identity:
    """What it says that it is; `models` are those of its list, the first is the default."""

    name: str
    models: list[str]
    metrics: Reading | None


async def identify(client: Client, url: str) -> Identity:
    """Raises Unreachable."""
    try:
        status, text = await client.get("/v1/models")
    except (OSError, TimeoutError, aiohttp.ClientError) as error:
        raise Unreachable(
            f"nothing answers at {url} ({error or type(error).__name__}); start the service with `make serve`, or give "
            "the address of another with --url"
        ) from None
    if status in (401, 403):
        raise Unreachable(f"{url} wants a key ({status}); give the file that holds it with --api-key-file")
    reading = await read(client)
    return Identity(reading.known.server if reading is not None else "unknown", _models(text), reading)


def _models(text: str) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(text)["data"]]
    except (ValueError, LookupError, TypeError):
        return []


def is_here(url: str) -> bool:
    """Whether the address is one of this machine's."""
    host = urlsplit(url).hostname or ""
    if re.fullmatch(r"localhost|127\..*|::1", host):
        return True
    try:
        theirs = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    ours = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(theirs & ours)
