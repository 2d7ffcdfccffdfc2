"""Live tests of alerting: one real service, faults by real signals, and the monitoring that `make monitor` starts.

The stories take minutes, and nearly all of this time is waiting. They run at the same time, in one event loop in a
background thread, while other tests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer

from alerts.dashboards import write
from alerts.settings import DEAD_MAN_SILENCE_S
from tests.alerts.receivers import Email, Json, MailServer, WebhookServer, loopback_settings, mail_server, until
from tests.graph.service import Program, Service, http_client, model_config, zero_scaled_model_config

VICTIM, HEALTHY = "victim", "toy"
_START_S = 120
# Upper limits for waiting. The tests check the promised times.
_PAGE_S = 240
_RESOLVED_S = 420
_ALARM_S = 300

T = TypeVar("T")
P = TypeVar("P", bound=Program)
Story = Callable[["LiveService"], Awaitable[Any]]


class Background:
    """Runs stories with one live service in a background thread. The first call of `start` decides which stories
    run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keep = contextlib.ExitStack()  # closed at the end of the session
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._results: Future[dict[str, Any]] | None = None

    def start(self, stories: dict[str, Story]) -> None:
        if self._results is None and stories:
            self._thread.start()
            self._results = asyncio.run_coroutine_threadsafe(_run(self, stories), self._loop)

    def result(self, name: str) -> Any:
        """The result of a story, when all stories have ended. Raises the exception of the story."""
        assert self._results is not None
        found = self._results.result()[name]
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        if self._results is not None:
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self.keep.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _run(background: Background, stories: dict[str, Story]) -> dict[str, Any]:
    live = LiveService(background)
    try:
        results = await asyncio.gather(*(story(live) for story in stories.values()), return_exceptions=True)
    finally:
        await live.stop()
    return dict(zip(stories, results, strict=True))


@contextlib.asynccontextmanager
async def running(program: P) -> AsyncIterator[P]:
    """Stop the program at the end, in a thread, because stopping takes seconds."""
    try:
        yield program
    finally:
        await asyncio.to_thread(program.__exit__, None, None, None)


# Both variants are the same model. Every request of the control is mirrored.
TRIAL = {
    "name": "trial",
    "unit": "request",
    "variants": [{"name": "control", "model": HEALTHY}, {"name": "candidate", "model": HEALTHY, "percent": 50}],
    "shadow": {"variant": "candidate", "percent": 100},
}


class LiveService:
    """The service that the stories share. The first use of `service` starts it; `ready` ends when it answers."""

    def __init__(self, background: Background) -> None:
        self.background = background
        self._weights = background.folder / "weights"

    @cached_property
    def service(self) -> Service:
        self._weights.mkdir()
        one_request = {"max_ongoing_requests": 1, "max_queued_requests": 1}
        return Service(
            [
                model_config(
                    HEALTHY, "builtin:toy?step_ms=5", engine={"draft_tokens": 4, "max_running": 8}, embeddings=True
                ),
                model_config("narrow", "builtin:toy?step_ms=20", deployment=one_request),
                zero_scaled_model_config("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=600),
                # The log folder takes the place of weights: the toy engine cannot load without it.
                model_config(VICTIM, f"builtin:toy?step_ms=5&log={self._weights / 'tokens'}"),
            ],
            *("--ray-address", "local"),  # with the dashboard, which lists Ray's nodes for Prometheus
            experiments=[TRIAL],
        )

    @cached_property
    def ready(self) -> asyncio.Task[str]:
        return asyncio.create_task(asyncio.to_thread(self.service.wait_for_output, "answers on", _START_S))

    async def stop(self) -> None:
        if "service" in self.__dict__:
            await asyncio.to_thread(self.service.__exit__, None, None, None)

    def folder(self, name: str) -> Path:
        folder = self.background.folder / name
        folder.mkdir()
        return folder

    def kill_victim(self) -> float:
        """Kill all replicas of the victim and remove its weights. Returns the time."""
        self._weights.rename(self._weights.with_suffix(".removed"))
        replicas = self.service.find(f"model-{VICTIM}")
        assert replicas
        for replica in replicas:
            replica.kill()
        return time.monotonic()

    async def repair_victim(self, client: httpx.AsyncClient) -> float:
        """Restore the weights. Returns the time at which the victim answers again."""
        self._weights.with_suffix(".removed").rename(self._weights)
        end = time.monotonic() + _START_S
        while (await _generate(client, VICTIM)) != 200:
            assert time.monotonic() < end, self.service.output()
            await asyncio.sleep(0.2)
        return time.monotonic()


class Monitor(Program):
    """`python -m alerts monitor` for an address of the service and for its Ray, on free ports. `url` is Prometheus."""

    def __init__(self, folder: Path, url: str, ray: Service, settings: Path) -> None:
        options = ["--url", url, "--settings", str(settings), "--data", str(folder / "data")]
        for name in ("prometheus", "alertmanager", "history"):
            options += [f"--{name}-port", "0"]
        super().__init__(["alerts", "monitor", *options], RAY_TMPDIR=str(ray.folder))

    @property
    def url(self) -> str:
        (url,) = re.findall(r"Prometheus +(http://[^/]+)/", self.output())
        return str(url)


@dataclass
class Notified:
    """The notifications of one alert, and the seconds after the fault or its repair at which each arrived."""

    page: Json
    slack: Json
    email: Email
    after_s: dict[str, float]

    @property
    def last_s(self) -> float:
        return max(self.after_s.values())


@dataclass
class Watch:
    """A monitor with its receivers and a client of the service."""

    monitor: Monitor
    client: httpx.AsyncClient
    webhooks: WebhookServer
    mail: MailServer

    async def query(self, expression: str) -> dict[str, float]:
        """The values of an instant query by label values."""
        answer = await self.client.get(f"{self.monitor.url}/api/v1/query", params={"query": expression})
        return {
            " ".join(value for _, value in sorted(one["metric"].items())): float(one["value"][1])
            for one in answer.json()["data"]["result"]
        }

    async def query_until(self, expression: str, key: str = "", within_s: float = 60) -> dict[str, float]:
        """The values of an instant query, as soon as `key` is among them."""
        end = time.monotonic() + within_s
        while key not in (found := await self.query(expression)):
            assert time.monotonic() < end, f"{expression}: {found}"
            await asyncio.sleep(0.5)
        return found

    async def history(self) -> list[Json]:
        (url,) = re.findall(r"(http://[^/]+)/alerts\n", self.monitor.output().partition("History")[2])
        token = {"Authorization": "Bearer history-secret"}
        found: list[Json] = (await self.client.get(f"{url}/alerts", headers=token)).json()
        return found

    def pages(self) -> set[tuple[str, str]]:
        """Name and model of all alerts that paged."""
        payloads = [page["payload"] for page in self.webhooks.pages]
        return {(payload["class"], payload.get("component", "")) for payload in payloads}

    async def notified(self, alert: str, action: str, since: float) -> Notified:
        """Wait until all three receivers have been notified of this alert, and record when each was."""
        verb = {"trigger": "[FIRING", "resolve": "[RESOLVED"}[action]
        after_s = dict[str, float]()

        def pages() -> list[Json]:
            return [
                page
                for page in self.webhooks.pages
                if page["event_action"] == action and page["payload"]["class"] == alert
            ]

        def posts() -> list[Json]:
            titles = ((one, one["attachments"][0]["title"]) for one in self.webhooks.slack_critical)
            return [one for one, title in titles if title.startswith(verb) and f" {alert}" in title]

        def emails() -> list[Email]:
            return [one for one in self.mail.emails if one.subject.startswith(verb) and f" {alert}" in one.subject]

        async def first(name: str, probe: Callable[[], list[T]]) -> T:
            within_s = (_PAGE_S if action == "trigger" else _RESOLVED_S) - (time.monotonic() - since)
            found = await until(probe, f"{alert} at {name}", within_s)
            after_s[name] = time.monotonic() - since
            return found[0]

        page, slack, email = await asyncio.gather(
            first("PagerDuty", pages), first("Slack", posts), first("email", emails)
        )
        return Notified(page, slack, email, after_s)


@contextlib.asynccontextmanager
async def watch(live: LiveService, folder: Path, url: str) -> AsyncIterator[Watch]:
    """A monitor of the service at `url`, when it has scraped a service that serves requests."""
    mail = mail_server()
    async with WebhookServer().open() as webhooks, mail.open(), http_client(live.service) as client:
        settings = loopback_settings(folder, webhooks, mail)
        await live.ready  # otherwise a slow start of the service would cause ServiceDown
        async with running(Monitor(folder, url, live.service, settings)) as monitor:
            for text in ("the service is up", "Ray is up"):
                await asyncio.to_thread(monitor.wait_for_output, text, _START_S)
            await until(lambda: webhooks.at("/dead-man"), "the first message to the dead man's switch", 60)
            yield Watch(monitor, client, webhooks, mail)


@contextlib.asynccontextmanager
async def trickle(client: httpx.AsyncClient, models: tuple[str, ...]) -> AsyncIterator[None]:
    """Two requests per second to each model."""

    async def requests(name: str) -> None:
        while True:
            await _generate(client, name)
            await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(requests(name)) for name in models]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _generate(client: httpx.AsyncClient, name: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        body = {"model": name, "prompt": "abc", "max_tokens": 8}
        return (await client.post("/generate", json=body, timeout=10)).status_code
    return 0


@dataclass
class ModelOutage:
    """`mttd_s` and `mttr_s` are the values of the dashboard by severity, `history` is the alert history at that
    time."""

    fired: Notified
    ready: Json
    ray: dict[str, float]
    resolved: Notified
    pages: set[tuple[str, str]]
    mttd_s: dict[str, float]
    mttr_s: dict[str, float]
    history: list[Json]
    firing_at_the_end: set[str]


async def model_outage(live: LiveService) -> ModelOutage:
    """All replicas of a model are killed. They cannot load until its weights are restored."""
    async with watch(live, live.folder("model"), live.service.url) as watched:
        async with trickle(watched.client, (VICTIM, HEALTHY)):
            await watched.query_until(f'sum by (model) (serve_app_requests_total{{model="{VICTIM}"}}) > 0', VICTIM)
            await watched.query_until(f'max by (model) (serve_app_ready_replicas{{model="{VICTIM}"}}) > 0', VICTIM)
            killed = live.kill_victim()
            fired = await watched.notified("NoReadyReplicas", "trigger", killed)
            ready = (await watched.client.get("/ready")).json()
            ray = await watched.query("max by (deployment) (ray_serve_deployment_status)")
            repaired = await live.repair_victim(watched.client)
            resolved = await watched.notified("NoReadyReplicas", "resolve", repaired)
            return ModelOutage(
                fired,
                ready,
                ray,
                resolved,
                watched.pages(),
                mttd_s=await watched.query_until(_panel("MTTD"), "critical"),
                mttr_s=await watched.query_until(_panel("MTTR"), "critical"),
                history=await watched.history(),
                firing_at_the_end=set(await watched.query('count by (alertname) (ALERTS{alertstate="firing"})')),
            )


def _panel(title: str) -> str:
    """The query of a panel of the alerting dashboard, over the last day."""
    panels = json.loads(write.files()["grafana/dashboards/serve-app-alerting.json"])["panels"]
    (target,) = next(panel["targets"] for panel in _flat(panels) if panel["title"] == title)
    return str(target["expr"]).replace("$__range", "1d")


def _flat(panels: list[Json]) -> Iterator[Json]:
    for panel in panels:
        yield panel
        yield from panel.get("panels", ())


@dataclass
class ServiceOutage:
    """`alarm_s` is the time from the stop of Prometheus to the alarm of a dead man's switch."""

    fired: Notified
    pages: set[tuple[str, str]]
    alarm_s: float


async def service_outage(live: LiveService) -> ServiceOutage:
    """The address of the service closes. After the page, Prometheus hangs."""
    async with aiohttp.ClientSession() as session:

        async def metrics(request: web.Request) -> web.Response:
            async with session.get(f"{live.service.url}/metrics") as response:
                return web.Response(text=await response.text())

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        async with TestServer(app) as address:
            url = f"http://127.0.0.1:{address.port}"
            async with watch(live, live.folder("service"), url) as watched:
                alarm = asyncio.create_task(_alarm(watched.webhooks))
                closed = time.monotonic()
                await address.close()
                fired = await watched.notified("ServiceDown", "trigger", closed)
                pages = watched.pages()
                assert not alarm.done(), "the dead man's switch received nothing although Prometheus worked"
                (prometheus,) = watched.monitor.find("--storage.tsdb.path")
                prometheus.send_signal(signal.SIGSTOP)
                stopped = time.monotonic()
                try:
                    return ServiceOutage(fired, pages, await asyncio.wait_for(alarm, _ALARM_S) - stopped)
                finally:
                    prometheus.send_signal(signal.SIGCONT)


async def _alarm(webhooks: WebhookServer) -> float:
    """A dead man's switch with the patience of the example settings. Returns the time of its alarm."""
    received, at = 0, time.monotonic()
    while time.monotonic() - at < DEAD_MAN_SILENCE_S:
        if len(webhooks.at("/dead-man")) > received:
            received, at = len(webhooks.at("/dead-man")), time.monotonic()
        await asyncio.sleep(0.05)
    return time.monotonic()
