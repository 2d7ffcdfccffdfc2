"""A live story: a Prometheus with a short scrape interval watches the service under a varied load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from alerts.dashboards.promql import RULES
from alerts.history import Receiver, Store
from alerts.programs import Child
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.metrics import gpu
from tests.alerts.live import HEALTHY, LiveService
from tests.alerts.receivers import alerting_stack, executable
from tests.graph.service import free_port

LOAD_S = 75  # the error budgets are sampled once per minute
DRILL_S = 30


@dataclass(frozen=True)
class Watched:
    """The address of Prometheus, the time range in which it watched the load, and the last /metrics of the service."""

    url: str
    began: float
    ended: float
    page: str

    def get(self, path: str, **parameters: str) -> Any:
        document = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False).json()
        assert document["status"] == "success", (parameters, document)
        return document["data"]

    def values(self, expression: str, instant: bool) -> list[float]:
        """All values of a query except NaN, which is the result of 0 / 0."""
        if instant:
            found = self.get("query", query=expression, time=str(self.ended))
            samples = [series["value"] for series in found["result"]]
        else:
            span = {"start": str(self.began), "end": str(self.ended), "step": "5"}
            found = self.get("query_range", query=expression, **span)
            samples = [sample for series in found["result"] for sample in series["values"]]
        return [value for _, text in samples if not math.isnan(value := float(text))]


async def watch_dashboards(live: LiveService) -> Watched:
    """The returned Prometheus runs until the end of the session."""
    folder = live.folder("watched")
    async with contextlib.AsyncExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(folder / "alerts.sqlite")))
        history = await stack.enter_async_context(TestServer(Receiver(store, None, 86400).app()))
        card = await stack.enter_async_context(TestServer(graphics_card()))
        alerting = await stack.enter_async_context(alerting_stack(folder, str(history.make_url("/webhook"))))
        await live.ready
        targets = {
            "serve_app": f"127.0.0.1:{live.service.port}",
            "gpu": f"127.0.0.1:{card.port}",
            "alertmanager": alerting.url.removeprefix("http://"),
            "alert_history": f"127.0.0.1:{history.port}",
        }
        began = time.time()
        url = await asyncio.to_thread(start_prometheus, live, folder, targets)
        await asyncio.gather(*load(live.service.url))
        async with aiohttp.ClientSession() as client, client.get(f"{live.service.url}/metrics") as response:
            page = await response.text()
        return Watched(url, began, time.time(), page)


def graphics_card() -> web.Application:
    """The metrics of a GPU with half of its memory in use, from a replica and from Ray's agent, which reports MiB."""
    families = gpu()
    for name, value in (("memory_used_bytes", 12e9), ("memory_total_bytes", 24e9), ("utilization_ratio", 0.5)):
        families[name].add_metric([HEALTHY, "r", "node-1", "GPU-1"], value)
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


def start_prometheus(live: LiveService, folder: Path, targets: dict[str, str]) -> str:
    """Its address. It scrapes every 2 s and has two alerts in addition to the rules: one that ends and one that does
    not."""
    address = f"127.0.0.1:{free_port()}"
    begins = time.time() + 10  # Prometheus has found the Alertmanager by then
    limited = f"(vector(time()) > {begins:.0f}) < {begins + DRILL_S:.0f}"
    drills = [
        {"alert": "DrillThatEnds", "expr": limited, "labels": {"severity": "critical"}},
        {"alert": "DrillThatGoesOn", "expr": f"vector(time()) > {begins:.0f}", "labels": {"severity": "warning"}},
    ]
    (folder / "drill.yml").write_text(yaml.safe_dump({"groups": [{"name": "drill", "rules": drills}]}))
    static = {"prometheus": address, **targets}
    jobs = [{"job_name": name, "static_configs": [{"targets": [target]}]} for name, target in static.items()]
    ray = live.service.folder / "ray/prom_metrics_service_discovery.json"
    config = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [f"{RULES}/*.yml", "drill.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [targets["alertmanager"]]}]}]},
        "scrape_configs": [*jobs, {"job_name": "ray", "file_sd_configs": [{"files": [str(ray)]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        executable("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
        "--rules.alert.resend-delay=15s",
    ]
    prometheus = Child("Prometheus", command, folder / "prometheus.log")
    live.background.keep.callback(prometheus.stop)
    prometheus.wait_until_ready(f"http://{address}/-/ready")
    return f"http://{address}"


def load(url: str) -> list[Coroutine[Any, Any, None]]:
    """Clients of all kinds for LOAD_S: valid and invalid requests, an experiment, disconnects, a full queue, a model at
    zero replicas."""
    end = time.monotonic() + LOAD_S
    text = "repeated text gives accepted draft tokens; " * 3
    stream = {"model": HEALTHY, "prompt": text, "max_tokens": 60}

    async def repeat(request: Any, pause_s: float, first_s: float = 0) -> None:
        await asyncio.sleep(first_s)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while time.monotonic() < end:
                await request(client)
                await asyncio.sleep(pause_s)

    def post(path: str, **body: Any) -> Any:
        return lambda client: client.post(path, json=body)

    async def disconnect(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/generate_stream", json={**stream, "max_tokens": 400}) as answer:
            await anext(answer.aiter_lines())

    async def fill_queue(client: httpx.AsyncClient) -> None:
        one = post("/generate", model="narrow", prompt="abc", max_tokens=20)
        await asyncio.gather(*(one(client) for _ in range(6)))

    return [
        *(repeat(post("/generate_stream", **stream), 0.05) for _ in range(2)),
        repeat(post("/v1/completions", **{**stream, "max_tokens": 20}), 0.2),
        repeat(post("/v1/embeddings", model=HEALTHY, input=[text, "b"]), 0.5),
        repeat(post("/generate_stream", **{**stream, "model": "trial", "max_tokens": 20}), 0.5),
        repeat(disconnect, 0.5),
        repeat(fill_queue, 2),
        repeat(post("/generate", model=HEALTHY, prompt="a", max_tokens=0), 1),
        repeat(post("/generate", model="unknown", prompt="a"), 1),
        repeat(lambda client: client.get("/unknown"), 1),
        repeat(lambda client: client.get("/health"), 1),
        # Some scrapes later, because Prometheus cannot see the first increase of a new counter.
        repeat(post("/generate_stream", model="sleepy", prompt="good morning", max_tokens=10), 5, first_s=10),
    ]
