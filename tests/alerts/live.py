"""An outage from its beginning to its end, told by `python -m alerts monitor` with the timings that it ships with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from alerts.settings import DEAD_MAN_SILENCE_S
from tests.alerts.world import Json, Letter, Mail, Web, everybody, on_loopback, until
from tests.graph.house import ROOT, Program, Service, caller, model

VICTIM = "victim"
_START_S = 90
# Nobody waits longer for what the tests then judge.
_PAGE_S = 240
_RESOLVED_S = 420
_ALARM_S = 300


class Monitor(Program):
    """`python -m alerts monitor` of this service and its Ray, on ports of its own. `url` is Prometheus'."""

    def __init__(self, folder: Path, service: Service, settings: Path) -> None:
        options = ["--url", service.url, "--settings", str(settings), "--data", str(folder / "data")]
        for name in ("prometheus", "alertmanager", "history"):
            options += [f"--{name}-port", "0"]
        super().__init__(["alerts", "monitor", *options], RAY_TMPDIR=str(service.folder))

    @property
    def url(self) -> str:
        (url,) = re.findall(r"Prometheus +(http://[^/]+)/", self.said())
        return str(url)

    async def ask(self, client: httpx.AsyncClient, expression: str) -> dict[str, float]:
        """An instant query's values, by their labels' values."""
        answer = await client.get(f"{self.url}/api/v1/query", params={"query": expression})
        return {
            " ".join(value for _, value in sorted(one["metric"].items())): float(one["value"][1])
            for one in answer.json()["data"]["result"]
        }


@dataclass
class Told:
    """What came of one message: to whom, and how many seconds after the fault or its repair."""

    page: Json = field(default_factory=dict)
    slack: Json = field(default_factory=dict)
    letter: Letter | None = None
    after_s: dict[str, float] = field(default_factory=dict)

    @property
    def last_s(self) -> float:
        return max(self.after_s.values())


@dataclass
class Story:
    """`mttd_s` and `mttr_s` are the dashboard's, by severity, and `history` the receiver's table at that instant.

    `alarm_s` is when a dead-man's switch raised the alarm, in seconds after its Prometheus had stopped."""

    fired: Told
    resolved: Told | None = None
    others: list[str] = field(default_factory=list)
    ray: dict[str, float] = field(default_factory=dict)
    ready: Json = field(default_factory=dict)
    mttd_s: dict[str, float] = field(default_factory=dict)
    mttr_s: dict[str, float] = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    alarm_s: float | None = None
    firing_at_the_end: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """A service under load, what watches it, and whom it tells."""

    weights: Path
    service: Service
    monitor: Monitor
    client: httpx.AsyncClient
    web: Web
    mail: Mail

    def kill(self) -> float:
        """Every replica of the victim, for good: what it is loaded from is taken away as well. Returns when."""
        self.weights.rename(self.weights.with_suffix(".gone"))
        replicas = self.service.find(f"model-{VICTIM}")
        assert replicas
        for replica in replicas:
            replica.kill()
        return time.monotonic()

    async def repair(self) -> float:
        """Put back what was taken. Returns when callers are answered again."""
        self.weights.with_suffix(".gone").rename(self.weights)
        end = time.monotonic() + _START_S
        while (await _ask(self.client, VICTIM)) != 200:
            assert time.monotonic() < end, self.service.said()
            await asyncio.sleep(0.2)
        return time.monotonic()

    async def kept(self) -> list[Json]:
        """What the history has."""
        (url,) = re.findall(r"(http://[^/]+)/alerts\n", self.monitor.said().partition("History")[2])
        token = {"Authorization": "Bearer history-secret"}
        found: list[Json] = (await self.client.get(f"{url}/alerts", headers=token)).json()
        return found

    async def told(self, alert: str, action: str, since: float) -> Told:
        """Wait for all three to be told of this alert, and note when each was."""
        verb = {"trigger": "[FIRING", "resolve": "[RESOLVED"}[action]
        told = Told()

        def pages() -> list[Json]:
            return [p for p in self.web.pages if p["event_action"] == action and p["payload"]["class"] == alert]

        def posts() -> list[Json]:
            titles = ((one, one["attachments"][0]["title"]) for one in self.web.slack_critical)
            return [one for one, title in titles if title.startswith(verb) and f" {alert}" in title]

        def letters() -> list[Letter]:
            return [one for one in self.mail.letters if one.subject.startswith(verb) and f" {alert}" in one.subject]

        async def first(name: str, probe: Any) -> Any:
            within_s = (_PAGE_S if action == "trigger" else _RESOLVED_S) - (time.monotonic() - since)
            (found, *_) = await until(probe, f"{alert} at {name}", within_s)
            told.after_s[name] = time.monotonic() - since
            return found

        told.page, told.slack, told.letter = await asyncio.gather(
            first("PagerDuty", pages), first("Slack", posts), first("mail", letters)
        )
        return told


@contextlib.asynccontextmanager
async def stage(folder: Path, fused: bool) -> AsyncIterator[Stage]:
    """Everything up, scraped, and under a steady trickle of requests."""
    weights = folder / "weights"
    weights.mkdir(parents=True)
    # The toy's log stands for weights: it cannot be loaded without the folder.
    models = [model(VICTIM, f"builtin:toy?step_ms=5&log={weights / 'tokens'}")]
    if not fused:
        models.append(model("other", "builtin:toy?step_ms=5"))
    mail = everybody()
    async with Web().open() as web, mail.open():
        settings = on_loopback(folder, web, mail)
        with Service(models, fused=fused) as service:
            await asyncio.to_thread(service.wait_for, "answers on", _START_S)
            with Monitor(folder, service, settings) as monitor:
                await asyncio.to_thread(monitor.wait_for, "the service is up", _START_S)
                await asyncio.to_thread(monitor.wait_for, "Ray is up", _START_S)
                async with caller(service) as client, _trickle(client, [one["name"] for one in models]):
                    await until(lambda: web.at("/dead-man"), "the first sign of life", 60)
                    await asyncio.sleep(20)  # a scrape of the service under load
                    yield Stage(weights, service, monitor, client, web, mail)


@contextlib.asynccontextmanager
async def _trickle(client: httpx.AsyncClient, models: list[str]) -> AsyncIterator[None]:
    """Two requests a second for each model."""

    async def ask_for_ever(name: str) -> None:
        while True:
            await _ask(client, name)
            await asyncio.sleep(0.5)

    tasks = [asyncio.create_task(ask_for_ever(name)) for name in models]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _ask(client: httpx.AsyncClient, name: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        body = {"model": name, "prompt": "abc", "max_tokens": 8}
        return (await client.post("/generate", json=body, timeout=10)).status_code
    return 0


async def outage_of_a_model(folder: Path) -> Story:
    """With an ingress apart: the model's replicas are killed, and come back when its weights do."""
    async with stage(folder, fused=False) as here:
        killed = here.kill()
        story = Story(await here.told("NoReadyReplicas", "trigger", killed))
        story.ready = (await here.client.get("/ready")).json()
        story.ray = await here.monitor.ask(here.client, "max by (deployment) (ray_serve_deployment_status)")
        story.resolved = await here.told("NoReadyReplicas", "resolve", await here.repair())
        story.others = sorted({page["payload"]["class"] for page in here.web.pages} - {"NoReadyReplicas"})
        story.mttd_s, story.mttr_s = await _panel(here, "MTTD"), await _panel(here, "MTTR")
        story.history = await here.kept()
        story.firing_at_the_end = sorted(
            await here.monitor.ask(here.client, 'count by (alertname) (ALERTS{alertstate="firing"})')
        )
        return story


def _dashboard(title: str) -> str:
    """What the alerting dashboard's panel asks, over the last day."""
    panels = json.loads((ROOT / "cluster/monitoring/grafana/dashboards/serve-app-alerting.json").read_text())["panels"]
    (target,) = next(panel["targets"] for panel in _flat(panels) if panel["title"] == title)
    return str(target["expr"]).replace("$__range", "1d")


def _flat(panels: list[Json]) -> Iterator[Json]:
    for panel in panels:
        yield panel
        yield from panel.get("panels", ())


async def _panel(here: Stage, title: str) -> dict[str, float]:
    """By severity, once the history has been scraped after the incident."""
    end = time.monotonic() + 45
    while "critical" not in (found := await here.monitor.ask(here.client, _dashboard(title))):
        assert time.monotonic() < end, found
        await asyncio.sleep(0.5)
    return found


async def outage_of_the_service_and_then_of_prometheus(folder: Path) -> Story:
    """With a fused ingress: the replicas are killed; and after the page Prometheus hangs."""
    async with stage(folder, fused=True) as here:
        alarm = asyncio.create_task(_alarm(here.web))
        story = Story(await here.told("ServiceDown", "trigger", here.kill()))
        story.others = sorted({page["payload"]["class"] for page in here.web.pages} - {"ServiceDown"})
        assert not alarm.done(), "the dead-man's switch heard nothing although all was well"
        (prometheus,) = here.monitor.find("--storage.tsdb.path")
        prometheus.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        story.alarm_s = await asyncio.wait_for(alarm, _ALARM_S) - stopped
        return story


async def _alarm(web: Web) -> float:
    """A dead-man's switch, set as the settings' example says: when it has heard nothing for so long."""
    heard, at = 0, time.monotonic()
    while time.monotonic() - at < DEAD_MAN_SILENCE_S:
        if len(web.at("/dead-man")) > heard:
            heard, at = len(web.at("/dead-man")), time.monotonic()
        await asyncio.sleep(0.05)
    return time.monotonic()


def both(folder: Path) -> tuple[Story, Story]:
    """At the same time, since most of it is waiting."""

    async def run() -> tuple[Story, Story]:
        return await asyncio.gather(
            outage_of_a_model(folder / "apart"), outage_of_the_service_and_then_of_prometheus(folder / "fused")
        )

    return asyncio.run(run())
