"""Every question of every dashboard, asked of a real Prometheus that watches the real service under load.

Nothing may be empty. What a quiet service without GPUs would not show is brought about: callers who leave, a queue that
is full, a model that wakes, guesses that are right, an alert that begins and ends. A GPU is the one thing that is made
up: its figures come from a page of their own, written by the code that writes them where NVML is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client.parser import text_string_to_metric_families

from alerts.dashboards.promql import RULES
from alerts.history import Receiver, Store
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.metrics import gpu
from tests.alerts.test_dashboards import BOARDS, UNUSED, family, filled, panels, questions, used
from tests.alerts.test_rules import BY_NAME, exported
from tests.alerts.world import program, running, world
from tests.graph.house import Service, free_port, model, sleeper

pytestmark = [pytest.mark.system, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

LOAD_S = 75  # budgets are looked at each minute
DRILL_S = 30
MODELS = [
    model("toy", "builtin:toy?step_ms=5", engine={"draft_tokens": 4, "max_running": 8}, embeddings=True),
    model("narrow", "builtin:toy?step_ms=20", deployment={"max_ongoing_requests": 1, "max_queued_requests": 1}),
    sleeper("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=600),
]


@dataclass(frozen=True)
class Watched:
    """Prometheus' address, from when to when it watched, and what the service's /metrics said in the end."""

    client: aiohttp.ClientSession
    url: str
    began: float
    ended: float
    page: str

    async def ask(self, path: str, **parameters: str) -> Any:
        async with self.client.get(f"{self.url}/api/v1/{path}", params=parameters) as answer:
            document = await answer.json()
        assert document["status"] == "success", (parameters, document)
        return document["data"]

    async def values(self, expression: str, instant: bool) -> list[float]:
        """All that are numbers. Prometheus divides 0 by 0 as well."""
        if instant:
            found = await self.ask("query", query=expression, time=str(self.ended))
            samples = [series["value"] for series in found["result"]]
        else:
            span = {"start": str(self.began), "end": str(self.ended), "step": "5"}
            found = await self.ask("query_range", query=expression, **span)
            samples = [sample for series in found["result"] for sample in series["values"]]
        return [value for _, text in samples if not math.isnan(value := float(text))]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    async with contextlib.AsyncExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(folder / "alerts.sqlite")))
        history = await stack.enter_async_context(TestServer(Receiver(store, None, 86400).app()))
        card = await stack.enter_async_context(TestServer(graphics_card()))
        alerting = await stack.enter_async_context(world(folder, str(history.make_url("/webhook"))))
        service = stack.enter_context(Service(MODELS))
        await asyncio.to_thread(service.wait_for, "answers on")
        ray = service.folder / "ray/prom_metrics_service_discovery.json"
        targets = {
            "serve_app": f"127.0.0.1:{service.port}",
            "gpu": f"127.0.0.1:{card.port}",
            "alertmanager": alerting.url.removeprefix("http://"),
            "alert_history": f"127.0.0.1:{history.port}",
        }
        client = alerting.client
        began = time.time()
        url = await stack.enter_async_context(prometheus(folder, client, targets, ray))
        await asyncio.gather(*callers(service.url))
        async with client.get(f"{service.url}/metrics") as answer:
            page = await answer.text()
        yield Watched(client, url, began, time.time(), page)


def graphics_card() -> web.Application:
    """What a replica and Ray's agent say of a GPU that is half used. Ray's figures are MiB."""
    families = gpu()
    for name, value in (("memory_used_bytes", 12e9), ("memory_total_bytes", 24e9), ("utilization_ratio", 0.5)):
        families[name].add_metric(["toy", "r", "node-1", "GPU-1"], value)
    labels = '{ip="127.0.0.1", GpuIndex="0"}'
    by_ray = "".join(
        f"ray_node_{name}{labels} {value}\n"
        for name, value in (("gram_used", 12000), ("gram_available", 12000), ("gpus_utilization", 50))
    )

    async def scrape(request: web.Request) -> web.Response:
        return web.Response(text=exposition([], families.values()).decode() + by_ray)

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    return app


@contextlib.asynccontextmanager
async def prometheus(
    folder: Path, client: aiohttp.ClientSession, targets: dict[str, str], ray: Path
) -> AsyncIterator[str]:
    """Its address. It looks every 2 s, and has a drill beside the rules: an alert that ends, and one that goes on."""
    address = f"127.0.0.1:{free_port()}"
    begins = time.time() + 10  # by when it knows the Alertmanager
    some_time = f"(vector(time()) > {begins:.0f}) < {begins + DRILL_S:.0f}"
    drills = [
        {"alert": "DrillThatEnds", "expr": some_time, "labels": {"severity": "critical"}},
        {"alert": "DrillThatGoesOn", "expr": f"vector(time()) > {begins:.0f}", "labels": {"severity": "warning"}},
    ]
    (folder / "drill.yml").write_text(yaml.safe_dump({"groups": [{"name": "drill", "rules": drills}]}))
    static = {"prometheus": address, **targets}
    jobs = [{"job_name": name, "static_configs": [{"targets": [target]}]} for name, target in static.items()]
    config = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [f"{RULES}/*.yml", "drill.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [targets["alertmanager"]]}]}]},
        "scrape_configs": [*jobs, {"job_name": "ray", "file_sd_configs": [{"files": [str(ray)]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--rules.alert.resend-delay=15s",
    ]
    async with running("Prometheus", command, f"http://{address}", client) as url:
        yield url


def callers(url: str) -> list[Any]:
    """Everybody who uses the service, good and bad, for LOAD_S."""
    end = time.monotonic() + LOAD_S
    text = "what repeats itself is guessed ahead; " * 3
    stream = {"model": "toy", "prompt": text, "max_tokens": 60}

    async def again(what: Any, pause_s: float, first_s: float = 0) -> None:
        await asyncio.sleep(first_s)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while time.monotonic() < end:
                await what(client)
                await asyncio.sleep(pause_s)

    def post(path: str, **body: Any) -> Any:
        return lambda client: client.post(path, json=body)

    async def leave(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/generate_stream", json={**stream, "max_tokens": 400}) as answer:
            await anext(answer.aiter_lines())

    async def crowd(client: httpx.AsyncClient) -> None:
        one = post("/generate", model="narrow", prompt="abc", max_tokens=20)
        await asyncio.gather(*(one(client) for _ in range(6)))

    return [
        *(again(post("/generate_stream", **stream), 0.05) for _ in range(2)),
        again(post("/v1/completions", **{**stream, "max_tokens": 20}), 0.2),
        again(post("/v1/embeddings", model="toy", input=[text, "b"]), 0.5),
        again(leave, 0.5),
        again(crowd, 2),
        again(post("/generate", model="toy", prompt="a", max_tokens=0), 1),
        again(post("/generate", model="nobody", prompt="a"), 1),
        again(lambda client: client.get("/nowhere"), 1),
        again(lambda client: client.get("/health"), 1),
        # Some scrapes later, or its first increase could not be seen.
        again(post("/generate_stream", model="sleepy", prompt="good morning", max_tokens=10), 5, first_s=10),
    ]


async def test_every_question_has_an_answer(watched: Watched) -> None:
    empty = [one for one in questions() if not await watched.values(filled(one.expression), one.instant)]
    listed = "\n".join(f"{one.board}: {one.panel}: {one.expression}" for one in empty)
    assert not empty, f"{len(empty)} of {len(questions())}:\n{listed}"


async def test_shares_are_between_none_and_all(watched: Watched) -> None:
    """Sums that count something twice, or divide by another sum, show here first."""
    shares = {
        (uid, panel["title"])
        for uid, board in BOARDS.items()
        for panel in panels(board)
        if panel["fieldConfig"]["defaults"]["unit"] == "percentunit" and "budget" not in panel["title"].lower()
    }
    assert len(shares) > 20
    for one in questions():
        if (one.board, one.panel) in shares:
            values = await watched.values(filled(one.expression), one.instant)
            most = 1.1 if one.panel == "Busy" else 1 + 1e-9  # time is pushed each second, or a little later
            assert all(-1e-9 <= value <= most for value in values), (one, min(values), max(values))


async def test_the_readers_choices_are_there_and_work(watched: Watched) -> None:
    choices = {"model": "toy", "deployment": "model-toy", "node": "127.0.0.1"}
    seen = set[str]()
    for board in BOARDS.values():
        for variable in board["templating"]["list"][1:]:
            asked, found = variable["query"], set[str]()
            if asked.startswith("label_values("):
                name, label = asked.removeprefix("label_values(").removesuffix(")").split(", ")
                found = {str(one[label]) for one in await watched.ask("series", **{"match[]": name})}
            else:
                query = asked.removeprefix("query_result(").removesuffix(")")
                found = {one["metric"]["node"] for one in (await watched.ask("query", query=query))["result"]}
                assert "node-1" in found  # NVML's name of it, which alerts about GPUs know
            assert choices[variable["name"]] in found, variable["name"]
            seen.add(variable["name"])
    assert seen == choices.keys()
    for one in questions():
        if "$model" in one.expression or "$deployment" in one.expression:
            narrowed = await watched.values(filled(one.expression, model="toy", deployment="model-.*"), one.instant)
            asleep = one.panel in {"Waking", "Turned away"}  # which is not toy's
            assert narrowed or asleep, one


async def test_each_name_of_a_node_leads_to_it(watched: Watched) -> None:
    """Ray's panels know it by its address, with a port and without."""
    (place,) = {one["instance"] for one in await watched.ask("series", **{"match[]": "ray_node_mem_total"})}
    of_nodes = [one for one in questions() if "$node" in one.expression and "ray_" in one.expression]
    assert len(of_nodes) > 8
    for one in of_nodes:
        # The made-up GPU reports from elsewhere.
        for node in {"127.0.0.1"} if "gram" in one.expression else {place, "127.0.0.1"}:
            assert await watched.values(filled(one.expression, node=node), one.instant), (one, node)
        assert not await watched.values(filled(one.expression, node="elsewhere"), one.instant), one


async def test_mttd_and_mttr_are_those_of_the_drill(watched: Watched) -> None:
    (mttd,) = {one.expression for one in questions() if one.panel == "MTTD"}
    (mttr,) = {one.expression for one in questions() if one.panel == "MTTR"}
    assert all(0 <= value < 10 for value in await watched.values(filled(mttd), True))
    (resolution,) = await watched.values(filled(mttr), True)
    assert DRILL_S - 10 < resolution < DRILL_S + 10


async def test_the_service_exports_what_the_static_tests_believe(watched: Watched) -> None:
    there = {sample.name for one in text_string_to_metric_families(watched.page) for sample in one.samples}
    graphics = {one.name for one in gpu().values()}
    assert {family(name) for name in there} == {family(name) for name in exported()} - graphics
    assert {family(name) for name in there} - {family(name) for name in used()} <= UNUSED.keys()


async def test_no_rule_failed_and_nothing_fired_that_should_not(watched: Watched) -> None:
    failures = await watched.values("sum(prometheus_rule_evaluation_failures_total)", True)
    assert failures == [0]
    firing = (await watched.ask("query", query='ALERTS{alertstate="firing"}', time=str(watched.ended)))["result"]
    names = {one["metric"]["alertname"] for one in firing}
    assert {"Watchdog", "DrillThatGoesOn"} <= names
    assert names <= BY_NAME.keys() | {"DrillThatGoesOn", "DrillThatEnds"}
