"""`/metrics` against what clients counted themselves, and what nobody can do to it."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.house import Service, caller, lines, model, sleeper, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

REQUESTS = 1000
JUNK = 20_000
SCRAPES = 200
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    narrow = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    models = [
        model("toy", "builtin:toy?step_ms=2", embeddings=True),
        model("slow", "builtin:toy?step_ms=50"),
        model("narrow", "builtin:toy?step_ms=20", deployment=narrow),
        model("faulty", "builtin:toy?fails_on=bad", deployment={"max_ongoing_requests": 1}),
        model("victim", "builtin:toy"),
        sleeper("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=1),
    ]
    telemetry = {"opentelemetry_metrics": True}
    with Service(models, telemetry=telemetry, request_timeout_s=TIMEOUT_S, max_body_bytes=65_536) as service:
        service.wait_for("answers on")
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with caller(service) as client:
        yield client


Key = tuple[str, frozenset[tuple[str, str]]]


async def scrape(client: httpx.AsyncClient) -> dict[Key, float]:
    """The sum over processes of every series."""
    totals: dict[Key, float] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            labels = frozenset(item for item in sample.labels.items() if item[0] != "replica")
            key = sample.name.removeprefix("serve_app_"), labels
            totals[key] = totals.get(key, 0.0) + sample.value
    return totals


def series(name: str, **labels: str) -> Key:
    return name, frozenset(labels.items())


@dataclass
class CompletionState:
    """What clients saw. Every key is a series of the service's."""

    counts: Counter[Key] = field(default_factory=Counter)

    def request(self, model: str, outcome: str, tokens: int = 0, prompt: int = 0) -> None:
        self.counts[series("requests_total", model=model, outcome=outcome)] += 1
        self.counts[series("generated_tokens_total", model=model)] += tokens
        self.counts[series("prompt_tokens_total", model=model)] += prompt

    def call(self, route: str, status: int, sent: int, received: int | None) -> None:
        self.counts[series("http_requests_total", route=route, method="POST", status=f"{status // 100}xx")] += 1
        self.counts[series("http_received_bytes_total", route=route)] += sent
        if received is not None:
            self.counts[series("http_sent_bytes_total", route=route)] += received

    def error(self, code: str, model: str) -> None:
        self.counts[series("errors_total", model=model, code=code)] += 1


def encoded(body: dict[str, object]) -> bytes:
    return json.dumps(body).encode()


async def whole(
    client: httpx.AsyncClient, tally: CompletionState, name: str, prompt: str, tokens: int, route: str
) -> None:
    """One answer that is not streamed, or its refusal."""
    sent = encoded({"model": name, "prompt": prompt, "max_tokens": tokens})
    answer = await client.post(route, content=sent)
    tally.call(route, answer.status_code, len(sent), len(answer.content))
    if answer.status_code == 200:
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == tokens
        tally.request(name, "length", tokens, usage["prompt_tokens"])
    else:
        code = answer.json()["error"]["code"]
        tally.request(name, code)
        tally.error(code, name)


async def streamed(client: httpx.AsyncClient, tally: CompletionState, name: str, tokens: int) -> None:
    """To its end, or to the error in it."""
    sent = encoded({"model": name, "prompt": "abc", "max_tokens": tokens, "include_text": False})
    got, size, end = 0, 0, "length"
    async with client.stream("POST", "/generate_stream", content=sent) as response:
        async for line in response.aiter_lines():
            size += len(line) + 1
            if not line.startswith("data: "):
                continue
            said = json.loads(line.removeprefix("data: "))
            if "error" in said:
                end = said["error"]["code"]
            else:
                got += 1
    tally.call("/generate_stream", response.status_code, len(sent), size)
    tally.request(name, end, got, 3)
    if end != "length":
        tally.error(end, name)
        tally.counts[series("truncated_requests_total", model=name)] += 1


async def left(client: httpx.AsyncClient, tally: CompletionState) -> None:
    """After the first token. How many more were on their way, nobody can tell."""
    sent = encoded({"model": "slow", "prompt": "abc", "max_tokens": 1000})
    async with client.stream("POST", "/generate_stream", content=sent) as response:
        assert response.status_code == 200
        async for line in lines(response):
            if line.startswith("data: "):
                break
    tally.call("/generate_stream", 200, len(sent), None)
    tally.counts[series("requests_total", model="slow", outcome="cancelled")] += 1


async def wrong(client: httpx.AsyncClient, tally: CompletionState, number: int) -> None:
    """Refused before there is a request to a model."""
    if number % 2:
        sent, code = encoded({"model": "toy", "prompt": "x", "max_tokens": -1}), "invalid_request"
    else:
        sent, code = encoded({"model": f"made-up-{number}", "prompt": "x"}), "model_not_found"
    answer = await client.post("/generate", content=sent)
    tally.call("/generate", answer.status_code, len(sent), len(answer.content))
    tally.error(code, "")


async def embedded(client: httpx.AsyncClient, tally: CompletionState) -> None:
    sent = encoded({"model": "toy", "input": "hello"})
    answer = await client.post("/v1/embeddings", content=sent)
    tally.call("/v1/embeddings", answer.status_code, len(sent), len(answer.content))
    tally.request("toy", "embedded", 0, 5)


async def failing(client: httpx.AsyncClient, tally: CompletionState) -> None:
    """A step that fails, and one that does not: three in a row would have the replica replaced."""
    for prompt in ("bad", "good"):
        await whole(client, tally, "faulty", prompt, 3, "/generate")


async def test_counters_are_what_clients_counted(client: httpx.AsyncClient) -> None:
    """1,000 requests: whole, streamed, refused, failing, out of time, left, in any order, 24 at a time."""
    rng, tally, together, one = random.Random(7), CompletionState(), asyncio.Semaphore(24), asyncio.Lock()
    before = await scrape(client)

    async def ask(number: int) -> None:
        async with together:
            match number % 20:
                case 0:
                    await left(client, tally)
                case 1 if number < 400:
                    await streamed(client, tally, "slow", 1000)
                case 2 | 3:
                    await wrong(client, tally, number)
                case 4 | 5:
                    await whole(client, tally, "narrow", "abc", 10, "/generate")
                case 6:
                    async with one:
                        await failing(client, tally)
                case 7:
                    await embedded(client, tally)
                case rest:
                    await (
                        streamed(client, tally, "toy", rng.randint(2, 20))
                        if rest % 2
                        else whole(client, tally, "toy", "x" * rng.randint(1, 30), rng.randint(1, 20), "/generate")
                    )

    order = list(range(REQUESTS))
    rng.shuffle(order)
    await asyncio.gather(*(ask(number) for number in order))
    outcomes = {dict(key[1])["outcome"] for key in tally.counts if key[0] == "requests_total"}
    assert outcomes == {"length", "embedded", "cancelled", "queue_full", "internal_error", "deadline_exceeded"}
    # Of a stream that was left nobody knows the bytes.
    tally.counts.pop(series("http_sent_bytes_total", route="/generate_stream"), None)

    async def differences() -> list[str]:
        after = await scrape(client)
        grown = {key: after[key] - before.get(key, 0.0) for key in after}
        found = [
            f"{key}: {grown.get(key)} is not {told}" for key, told in tally.counts.items() if grown.get(key) != told
        ]
        silent = ("requests_total", "errors_total", "truncated_requests_total")
        return found + [
            f"{key}: {grown[key]}" for key in grown if key[0] in silent and grown[key] and key not in tally.counts
        ]

    unknown = {series("generated_tokens_total", model="slow"), series("prompt_tokens_total", model="slow")}
    for key in unknown:
        tally.counts.pop(key, None)

    async def same() -> bool:
        return not await differences()

    try:
        await until(same, seconds=15, every_s=0.5)
    except AssertionError:
        raise AssertionError("\n".join(await differences())) from None


async def test_quantiles_lie_within_one_bucket_of_the_clients(service: Service) -> None:
    """Times to the first token of streams to `slow`, whose step of 50 ms outweighs what lies between here and there."""
    limits, seen = httpx.Limits(max_connections=4, max_keepalive_connections=4), list[float]()
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as client:
        before = await scrape(client)

        async def ask() -> None:
            for _ in range(25):
                began = time.monotonic()
                body = {"model": "slow", "prompt": "abc", "max_tokens": 2}
                async with client.stream("POST", "/generate_stream", json=body) as response:
                    first = True
                    async for _line in lines(response):
                        if first:
                            seen.append(time.monotonic() - began)
                        first = False

        await asyncio.gather(*(ask() for _ in range(4)))
        key = series("time_to_first_token_seconds_count", model="slow")
        await until(lambda: _is(client, key, before[key] + len(seen)), seconds=5)
        after = await scrape(client)
    buckets = {}
    for name, labels in after:
        if name == "time_to_first_token_seconds_bucket" and dict(labels)["model"] == "slow":
            buckets[float(dict(labels)["le"])] = after[name, labels] - before[name, labels]
    bounds = sorted(buckets)
    for share in (0.5, 0.9):
        theirs = statistics.quantiles(seen, n=100)[int(share * 100) - 1]
        ours = next(bound for bound in bounds if buckets[bound] >= share * len(seen))
        assert abs(bounds.index(ours) - bisect_left(bounds, theirs)) <= 1, (share, ours, theirs)


async def test_opentelemetrys_names_count_the_same(client: httpx.AsyncClient) -> None:
    await client.post("/generate", json={"model": "toy", "prompt": "x", "max_tokens": 2})

    async def same() -> bool:
        now = await scrape(client)
        ours = now[series("time_to_first_token_seconds_count", model="toy")]
        labels = {"gen_ai_operation_name": "text_completion", "gen_ai_request_model": "toy"}
        names = series("gen_ai_server_time_to_first_token_seconds_count", gen_ai_provider_name="serve_app", **labels)
        return now[names] == ours >= 1

    await until(same, seconds=5)


async def test_a_model_that_wakes_is_timed(client: httpx.AsyncClient) -> None:
    asleep = series("model_state", model="sleepy", state="asleep")
    await until(lambda: _is(client, asleep, 1), seconds=60, every_s=0.5)
    assert (await scrape(client))[series("ready_replicas", model="sleepy")] == 0
    answer = await client.post("/generate", json={"model": "sleepy", "prompt": "x", "max_tokens": 2})
    assert answer.status_code in (200, 504)  # it has 2 s
    await until(lambda: _is(client, series("model_wake_seconds_count", model="sleepy"), 1), seconds=30)
    total = (await scrape(client))[series("model_wake_seconds_sum", model="sleepy")]
    assert 1 <= total <= 30
    assert (await scrape(client))[series("model_load_seconds", model="sleepy")] >= 1


async def _is(client: httpx.AsyncClient, key: Key, value: float) -> bool:
    return (await scrape(client)).get(key) == value


async def test_a_replica_that_died_leaves_with_all_it_counted(client: httpx.AsyncClient, service: Service) -> None:
    await client.post("/generate", json={"model": "victim", "prompt": "x", "max_tokens": 5})
    counted = 'serve_app_engine_generated_tokens_total{model="victim",replica='
    (old,) = await until(lambda: _with(client, counted, " 5.0"), seconds=5)
    replica = old.split('replica="')[1].split('"')[0]
    (process,) = service.find("ServeReplica:serve_app:model-victim")
    process.kill()
    killed = time.monotonic()
    await until(lambda: _gone(client, f'serve_app_slots{{model="victim",replica="{replica}"}}'), seconds=10)
    assert await _with(client, f'{counted}"{replica}"', "") == [old], "its counts stay for two scrapes"
    await until(lambda: _gone(client, replica), seconds=45)
    assert 25 <= time.monotonic() - killed <= 45


async def _with(client: httpx.AsyncClient, begins: str, ends: str) -> list[str]:
    text = (await client.get("/metrics")).text
    return [line for line in text.splitlines() if line.startswith(begins) and line.endswith(ends)]


async def _gone(client: httpx.AsyncClient, text: str) -> bool:
    return text not in (await client.get("/metrics")).text


async def test_nobody_can_make_a_series_and_a_scrape_is_quick(service: Service) -> None:
    """20,000 paths, methods and models that do not exist."""
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as client:
        methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "LINK")
        for method in methods:
            assert (await client.request(method, "/junk/first")).status_code in (400, 404)
        for path in ("/generate", "/v1/chat/completions"):
            await client.post(path, json={"model": "junk", "prompt": "x"})
            await client.post(path, json={"model": "junk", "messages": [{"role": "user", "content": "x"}]})
        await client.get("/v1/models/junk")
        before = set(await scrape(client))

        async def junk(worker: int) -> None:
            for number in range(worker, JUNK, 16):
                match number % 4:
                    case 0:
                        await client.post("/generate", json={"model": f"junk{number}", "prompt": "x"})
                    case 1:
                        await client.get(f"/v1/models/junk{number}")
                    case _:
                        await client.request(methods[number % len(methods)], f"/junk/{number}/{random.random()}")

        await asyncio.gather(*(junk(worker) for worker in range(16)))
        assert set(await scrape(client)) - before == set()
        times, size = [], 0
        for _ in range(SCRAPES):
            began = time.monotonic()
            size = len((await client.get("/metrics")).content)
            times.append(time.monotonic() - began)
        p99 = statistics.quantiles(times, n=100)[98]
        print(f"scrape: median {statistics.median(times) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, {size} bytes")
        assert p99 <= 0.1
        assert size <= 1_000_000
