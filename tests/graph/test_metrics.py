"""`/metrics` against the counts of the clients, and its size against requests with made-up names."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.conftest import TracedService
from tests.graph.service import Service, http_client, stream_lines, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

# Requests of a run: 240 are 12 of each of the 20 kinds in `send`, enough that every counter moves and that the kinds
# overlap in time (24 run at once). A miscounted kind fails the test at its first request.
REQUESTS = [240, pytest.param(1000, marks=pytest.mark.long)]
# Requests with made-up names. One series for one of them fails the test; 1,600 are 200 of each kind and method.
JUNK = [1_600, pytest.param(20_000, marks=pytest.mark.long)]
SCRAPES = 100


@pytest.fixture
async def client(traced: TracedService) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(traced.service) as client:
        yield client


TOKENS = "serve_app_engine_generated_tokens_total"


@dataclass(frozen=True)
class Killed:
    """A replica that was killed: its id, the line of its counter of tokens, and the monotonic instant."""

    replica: str
    counter: str
    at: float


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
class ClientCounts:
    """What the clients counted. Every key is a series of the service."""

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
    client: httpx.AsyncClient, counted: ClientCounts, name: str, prompt: str, tokens: int, route: str
) -> None:
    """A request that is not streamed; it is answered or refused."""
    sent = encoded({"model": name, "prompt": prompt, "max_tokens": tokens})
    answer = await client.post(route, content=sent)
    counted.call(route, answer.status_code, len(sent), len(answer.content))
    if answer.status_code == 200:
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == tokens
        counted.request(name, "length", tokens, usage["prompt_tokens"])
    else:
        code = answer.json()["error"]["code"]
        counted.request(name, code)
        counted.error(code, name)


async def streamed(client: httpx.AsyncClient, counted: ClientCounts, name: str, tokens: int) -> None:
    """A stream that is read to its end, or to the error event in it."""
    sent = encoded({"model": name, "prompt": "abc", "max_tokens": tokens, "include_text": False})
    got, size, end = 0, 0, "length"
    async with client.stream("POST", "/generate_stream", content=sent) as response:
        async for line in response.aiter_lines():
            size += len(line) + 1
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                end = event["error"]["code"]
            else:
                got += 1
    counted.call("/generate_stream", response.status_code, len(sent), size)
    counted.request(name, end, got, 3)
    if end != "length":
        counted.error(end, name)
        counted.counts[series("truncated_requests_total", model=name)] += 1


async def cut(client: httpx.AsyncClient, counted: ClientCounts) -> None:
    """A stream that is cut after the first token. The number of tokens on their way is unknown."""
    sent = encoded({"model": "slow", "prompt": "abc", "max_tokens": 1000})
    async with client.stream("POST", "/generate_stream", content=sent) as response:
        assert response.status_code == 200
        async for line in stream_lines(response):
            if line.startswith("data: "):
                break
    counted.call("/generate_stream", 200, len(sent), None)
    counted.counts[series("requests_total", model="slow", outcome="cancelled")] += 1


async def invalid(client: httpx.AsyncClient, counted: ClientCounts, number: int) -> None:
    """A request that is refused before it reaches a model."""
    if number % 2:
        sent, code = encoded({"model": "only", "prompt": "x", "max_tokens": -1}), "invalid_request"
    else:
        sent, code = encoded({"model": f"made-up-{number}", "prompt": "x"}), "model_not_found"
    answer = await client.post("/generate", content=sent)
    counted.call("/generate", answer.status_code, len(sent), len(answer.content))
    counted.error(code, "")


async def embedded(client: httpx.AsyncClient, counted: ClientCounts) -> None:
    sent = encoded({"model": "only", "input": "hello"})
    answer = await client.post("/v1/embeddings", content=sent)
    counted.call("/v1/embeddings", answer.status_code, len(sent), len(answer.content))
    counted.request("only", "embedded", 0, 5)


async def failing(client: httpx.AsyncClient, counted: ClientCounts) -> None:
    """A step that fails, and one that does not: Ray would replace the replica after three failures in a row."""
    for prompt in ("bad", "good"):
        await whole(client, counted, "faulty", prompt, 3, "/generate")


@pytest.fixture(scope="session")
def killed(toy_service: Service) -> Killed:
    """Kills the replica of the model `victim`."""
    body = {"model": "victim", "prompt": "x", "max_tokens": 5}
    with httpx.Client(base_url=toy_service.url, timeout=20) as client:
        before = victims(client)  # replicas that earlier tests killed are on the page for a while
        assert client.post("/generate", json=body).status_code == 200
        end = time.monotonic() + 10
        while not (lines := [line for line in victims(client) - before if not line.endswith(" 0.0")]):
            assert time.monotonic() < end, "the replica did not report its tokens"
            time.sleep(0.1)
    (process,) = toy_service.find("ServeReplica:serve_app:model-victim")
    process.kill()
    (line,) = lines
    return Killed(line.split('replica="')[1].split('"')[0], line, time.monotonic())


def victims(client: httpx.Client) -> set[str]:
    """The lines with the tokens of the replicas of `victim`."""
    return {line for line in page(client) if line.startswith(f'{TOKENS}{{model="victim",replica=')}


def page(client: httpx.Client) -> list[str]:
    return client.get("/metrics").text.splitlines()


async def test_the_gauges_of_a_killed_replica_are_removed_and_its_counters_stay(
    toy_service: Service, killed: Killed
) -> None:
    """The counters stay for 35 s, so that two scrapes of Prometheus see the last requests."""
    async with http_client(toy_service) as client:
        gauge = f'serve_app_slots{{model="victim",replica="{killed.replica}"}}'
        await wait_until(lambda: absent(client, gauge), seconds=10)
        assert killed.counter in (await client.get("/metrics")).text


async def absent(client: httpx.AsyncClient, text: str) -> bool:
    return text not in (await client.get("/metrics")).text


@pytest.mark.parametrize("requests", REQUESTS)
async def test_counters_match_the_clients_counts(client: httpx.AsyncClient, requests: int) -> None:
    """Answers whole and streamed, refusals, failures, deadlines and disconnects, in random order."""
    rng, counted, concurrent, one = random.Random(7), ClientCounts(), asyncio.Semaphore(24), asyncio.Lock()
    before = await scrape(client)

    async def send(number: int) -> None:
        async with concurrent:
            match number % 20:
                case 0:
                    await cut(client, counted)
                case 1 if number < 240:
                    await streamed(client, counted, "slow", 1000)
                case 2 | 3:
                    await invalid(client, counted, number)
                case 4 | 5:
                    await whole(client, counted, "narrow", "abc", 10, "/generate")
                case 6:
                    async with one:
                        await failing(client, counted)
                case 7:
                    await embedded(client, counted)
                case rest:
                    await (
                        streamed(client, counted, "only", rng.randint(2, 20))
                        if rest % 2
                        else whole(client, counted, "only", "x" * rng.randint(1, 30), rng.randint(1, 20), "/generate")
                    )

    order = list(range(requests))
    rng.shuffle(order)
    await asyncio.gather(*(send(number) for number in order))
    outcomes = {dict(key[1])["outcome"] for key in counted.counts if key[0] == "requests_total"}
    assert outcomes == {"length", "embedded", "cancelled", "queue_full", "internal_error", "deadline_exceeded"}
    # The bytes of a cut stream are unknown.
    counted.counts.pop(series("http_sent_bytes_total", route="/generate_stream"), None)

    async def differences() -> list[str]:
        after = await scrape(client)
        grown = {key: after[key] - before.get(key, 0.0) for key in after}
        found = [
            f"{key}: {grown.get(key)} is not {number}"
            for key, number in counted.counts.items()
            if grown.get(key) != number
        ]
        complete = ("requests_total", "errors_total", "truncated_requests_total")
        return found + [
            f"{key}: {grown[key]}" for key in grown if key[0] in complete and grown[key] and key not in counted.counts
        ]

    unknown = {series("generated_tokens_total", model="slow"), series("prompt_tokens_total", model="slow")}
    for key in unknown:
        counted.counts.pop(key, None)

    async def same() -> bool:
        return not await differences()

    try:
        await wait_until(same, seconds=15, every_s=0.5)
    except AssertionError:
        raise AssertionError("\n".join(await differences())) from None


@pytest.mark.perf
async def test_quantiles_lie_within_one_bucket_of_the_clients(toy_service: Service) -> None:
    """Times to the first token of `slow`, whose step of 100 ms is much longer than the way between client and model."""
    limits, seen = httpx.Limits(max_connections=4, max_keepalive_connections=4), list[float]()
    async with httpx.AsyncClient(base_url=toy_service.url, timeout=60, limits=limits) as client:
        before = await scrape(client)

        async def send() -> None:
            for _ in range(10):
                began = time.monotonic()
                body = {"model": "slow", "prompt": "abc", "max_tokens": 2}
                async with client.stream("POST", "/generate_stream", json=body) as response:
                    lines = stream_lines(response)
                    await anext(lines)
                    seen.append(time.monotonic() - began)
                    async for _line in lines:
                        pass

        await asyncio.gather(*(send() for _ in range(4)))
        key = series("time_to_first_token_seconds_count", model="slow")
        await wait_until(lambda: has_value(client, key, before[key] + len(seen)), seconds=5)
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


async def test_metrics_by_opentelemetrys_names_have_the_same_values(client: httpx.AsyncClient) -> None:
    await client.post("/generate", json={"model": "only", "prompt": "x", "max_tokens": 2})

    async def same() -> bool:
        now = await scrape(client)
        ours = now[series("time_to_first_token_seconds_count", model="only")]
        labels = {"gen_ai_operation_name": "text_completion", "gen_ai_request_model": "only"}
        names = series("gen_ai_server_time_to_first_token_seconds_count", gen_ai_provider_name="serve_app", **labels)
        return now[names] == ours >= 1

    await wait_until(same, seconds=5)


async def test_the_time_to_wake_a_model_is_measured(client: httpx.AsyncClient) -> None:
    asleep = series("model_state", model="sleepy", state="asleep")
    await wait_until(lambda: has_value(client, asleep, 1), seconds=60, every_s=0.5)
    assert (await scrape(client))[series("ready_replicas", model="sleepy")] == 0
    answer = await client.post("/generate", json={"model": "sleepy", "prompt": "x", "max_tokens": 2})
    assert answer.status_code in (200, 504)  # it has 2 s
    await wait_until(lambda: has_value(client, series("model_wake_seconds_count", model="sleepy"), 1), seconds=30)
    total = (await scrape(client))[series("model_wake_seconds_sum", model="sleepy")]
    assert 1 <= total <= 30
    assert (await scrape(client))[series("model_load_seconds", model="sleepy")] >= 1


async def has_value(client: httpx.AsyncClient, key: Key, value: float) -> bool:
    return (await scrape(client)).get(key) == value


@pytest.mark.perf
@pytest.mark.parametrize("requests", JUNK)
async def test_made_up_names_create_no_series_and_a_scrape_takes_at_most_100_ms(
    traced: TracedService, requests: int
) -> None:
    """Paths, methods and models that do not exist."""
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=traced.service.url, timeout=60, limits=limits) as client:
        methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW", "LINK")
        for method in methods:
            assert (await client.request(method, "/junk/first")).status_code in (400, 404)
        for path in ("/generate", "/v1/chat/completions"):
            await client.post(path, json={"model": "junk", "prompt": "x"})
            await client.post(path, json={"model": "junk", "messages": [{"role": "user", "content": "x"}]})
        await client.get("/v1/models/junk")
        await scrape(client)  # makes the series of the route /metrics
        before = set(await scrape(client))

        async def junk(worker: int) -> None:
            for number in range(worker, requests, 16):
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


@pytest.mark.perf
async def test_the_counters_of_a_killed_replica_are_removed_after_35_s(toy_service: Service, killed: Killed) -> None:
    async with http_client(toy_service) as client:
        if time.monotonic() < killed.at + 25:
            assert killed.counter in (await client.get("/metrics")).text
        await wait_until(lambda: absent(client, killed.replica), seconds=max(1, killed.at + 45 - time.monotonic()))
