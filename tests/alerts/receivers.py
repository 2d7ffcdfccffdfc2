"""A real Alertmanager on loopback with fake receivers on real sockets: PagerDuty, Slack, email and webhooks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email
import email.policy
import shutil
import socket
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import aiohttp
import pytest
import yaml
from aiohttp import web

from alerts import render
from alerts.settings import load

Json: TypeAlias = dict[str, Any]
T = TypeVar("T")

EVERY_DAY = {"location": "UTC", "days": ["sunday:saturday"], "start": "00:00", "end": "24:00"}


def closed_business_hours() -> Json:
    """Business hours that are closed yesterday, today and tomorrow."""
    day = (datetime.now(UTC) + timedelta(days=3)).strftime("%A").lower()
    return {**EVERY_DAY, "days": [day]}


def executable(*names: str) -> str:
    """The path of the first executable that is installed."""
    found = [path for name in names if (path := shutil.which(name)) is not None]
    if not found:
        pytest.fail(f"{names[0]} is not installed; run {render.INSTALL}")
    return found[0]


def write_secrets(folder: Path, **texts: str) -> Path:
    """A folder with the secret files of `production_settings`. All except the password end with a newline."""
    folder.mkdir(exist_ok=True)
    all_texts = {
        "pagerduty_routing_key": "0123456789abcdef0123456789abcdef",
        "slack_critical_url": "https://hooks.slack.com/services/T0/B0/critical",
        "slack_warning_url": "https://hooks.slack.com/services/T0/B0/warning",
        "smtp_password": "mail secret",
        "dead_man_token": "dead-man-secret",
        "history_token": "history-secret",
    } | texts
    for name, text in all_texts.items():
        (folder / name).write_text(text if name == "smtp_password" else text + "\n")
        (folder / name).chmod(0o600)
    return folder


def production_settings(**changes: Any) -> Json:
    """Complete settings as a document. `changes` replace whole sections."""
    return {
        "runbooks_url": "https://llm.test/runbooks",
        "dashboards_url": "https://llm.test/d",
        "pagerduty": {"routing_key_file": "secrets/pagerduty_routing_key"},
        "slack": {
            "critical": {"channel": "#pages", "api_url_file": "secrets/slack_critical_url"},
            "warning": {"channel": "#warnings", "api_url_file": "secrets/slack_warning_url"},
        },
        "email": {
            "smarthost": "smtp.llm.test:587",
            "sender": "alerts@llm.test",
            "recipients": ["team@llm.test", "lead@llm.test"],
            "digest_recipients": ["digest@llm.test"],
            "username": "alerts",
            "password_file": "secrets/smtp_password",
        },
        "dead_man": {"url": "https://deadman.llm.test/ping", "token_file": "secrets/dead_man_token"},
        "history": {"url": "http://127.0.0.1:9099/webhook", "token_file": "secrets/history_token"},
        "business_hours": EVERY_DAY,
    } | changes


def write_settings(folder: Path, document: Mapping[str, Any]) -> Path:
    """Write the settings file and return its path."""
    path = folder / "settings.yml"
    path.write_text(yaml.safe_dump(dict(document)))
    return path


async def until(probe: Callable[[], T | None], what: str, within_s: float = 10) -> T:
    """Wait for the first true value of `probe` and return it."""
    deadline = time.monotonic() + within_s
    while not (found := probe()):
        assert time.monotonic() < deadline, f"timeout after {within_s} s: {what}"
        await asyncio.sleep(0.02)
    return found


@dataclass(frozen=True)
class ReceivedPost:
    path: str
    authorization: str | None
    body: Json


@dataclass
class WebhookServer:
    """All HTTP receivers: PagerDuty, two Slack webhooks, the dead man's switch and the history.

    Paths in `failing` answer with status 503.
    """

    posts: list[ReceivedPost] = field(default_factory=list)
    failing: set[str] = field(default_factory=set)
    url: str = ""

    async def take(self, request: web.Request) -> web.Response:
        self.posts.append(ReceivedPost(request.path, request.headers.get("Authorization"), await request.json()))
        status = 503 if request.path in self.failing else 202 if request.path == "/pagerduty" else 200
        return web.Response(status=status, text="ok")

    def at(self, path: str) -> list[Json]:
        return [post.body for post in self.posts if post.path == path]

    @property
    def pages(self) -> list[Json]:
        return self.at("/pagerduty")

    @property
    def slack_critical(self) -> list[Json]:
        return self.at("/slack/critical")

    @property
    def slack_warning(self) -> list[Json]:
        return self.at("/slack/warning")

    @property
    def history(self) -> list[Json]:
        return self.at("/history")

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[WebhookServer]:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.take)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


@dataclass(frozen=True)
class Email:
    recipients: list[str]
    message: EmailMessage

    @property
    def subject(self) -> str:
        return str(self.message["Subject"])

    @property
    def text(self) -> str:
        body = self.message.get_body(("plain",))
        assert body is not None
        return str(body.get_content()).replace("\r\n", "\n")


class MailServer:
    """An SMTP server that accepts emails after a login with `login`."""

    def __init__(self, login: tuple[str, str]) -> None:
        self.emails: list[Email] = []
        self.refused = 0
        self.port = 0
        self._login = base64.b64encode("\0".join(("", *login)).encode()).decode()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[MailServer]:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        known, recipients = False, list[str]()
        writer.write(b"220 mail.llm.test\r\n")
        while line := (await reader.readline()).decode().strip():
            verb = line.upper()
            if verb.startswith("EHLO"):
                writer.write(b"250-mail.llm.test\r\n250 AUTH PLAIN\r\n")
            elif verb.startswith("AUTH PLAIN"):
                known = line.split()[-1] == self._login
                writer.write(b"235 welcome\r\n" if known else b"535 wrong\r\n")
            elif not known:
                self.refused += 1
                writer.write(b"530 log in\r\n")
            elif verb.startswith("RCPT TO:"):
                recipients.append(line[8:].strip("<> "))
                writer.write(b"250 ok\r\n")
            elif verb == "DATA":
                writer.write(b"354 go on\r\n")
                data = await reader.readuntil(b"\r\n.\r\n")
                message = email.message_from_bytes(data[:-3], policy=email.policy.default)
                self.emails.append(Email(recipients, message))
                recipients = []
                writer.write(b"250 taken\r\n")
            elif verb == "QUIT":
                writer.write(b"221 bye\r\n")
                break
            else:
                writer.write(b"250 ok\r\n")
            await writer.drain()
        writer.close()


@dataclass
class AlertingStack:
    """An Alertmanager and its receivers. `url` is the address of Alertmanager."""

    url: str
    webhooks: WebhookServer
    mail: MailServer
    client: aiohttp.ClientSession

    async def fire(self, *alerts: Json) -> None:
        """Send alerts that start now. Alertmanager skips group_wait for an alert that started earlier."""
        for one in alerts:
            one.setdefault("startsAt", _now())
        async with self.client.post(f"{self.url}/api/v2/alerts", json=list(alerts)) as answer:
            assert answer.status == 200, await answer.text()

    async def resolve(self, *alerts: Json) -> None:
        await self.fire(*({**alert, "endsAt": _now()} for alert in alerts))

    async def states(self) -> dict[str, str]:
        """`active` or `suppressed` by name, severity and model of the alert."""
        async with self.client.get(f"{self.url}/api/v2/alerts") as answer:
            alerts = await answer.json()
        return {" ".join(_identity(alert["labels"])): alert["status"]["state"] for alert in alerts}


def _identity(labels: dict[str, str]) -> list[str]:
    return [labels[name] for name in ("alertname", "severity", "model") if name in labels]


def _now() -> str:
    return datetime.now(UTC).isoformat()


def alert(name: str, severity: str | None, annotations: dict[str, str] | None = None, **labels: str) -> Json:
    given = {"alertname": name, **({"severity": severity} if severity is not None else {}), **labels}
    return {"labels": given, "annotations": annotations or {}}


FAST = {"group_wait": "300ms", "group_interval": "500ms", "repeat_interval": "1h"}
TIMING = dict.fromkeys(("critical", "warning", "digest", "history"), FAST) | {"dead_man": "300ms"}


def loopback_settings(folder: Path, webhooks: WebhookServer, mail: MailServer, **changes: Any) -> Path:
    """Write complete settings whose receivers are on loopback, and return the path of the file."""
    places = {f"slack_{name}_url": f"{webhooks.url}/slack/{name}" for name in ("critical", "warning")}
    write_secrets(folder / "secrets", **places)
    document = production_settings(**changes)
    document["pagerduty"]["url"] = f"{webhooks.url}/pagerduty"
    document["email"] |= {"smarthost": f"127.0.0.1:{mail.port}", "require_tls": False}
    document["dead_man"]["url"] = f"{webhooks.url}/dead-man"
    return write_settings(folder, document)


def mail_server() -> MailServer:
    """A mail server that accepts the login of `production_settings`."""
    return MailServer(("alerts", "mail secret"))


@contextlib.asynccontextmanager
async def alerting_stack(folder: Path, history_url: str | None = None, **changes: Any) -> AsyncIterator[AlertingStack]:
    """An Alertmanager with the rendered configuration, receivers on loopback, and short waiting times."""
    mail = mail_server()
    async with WebhookServer().open() as webhooks, mail.open(), aiohttp.ClientSession() as client:
        history = {"url": history_url or f"{webhooks.url}/history", "token_file": "secrets/history_token"}
        settings = load(loopback_settings(folder, webhooks, mail, timing=TIMING, history=history, **changes))
        assert render.problems(settings) == []
        render.write(settings, folder / "out")
        async with _alertmanager(folder, client) as url:
            yield AlertingStack(url, webhooks, mail, client)


@contextlib.asynccontextmanager
async def _alertmanager(folder: Path, client: aiohttp.ClientSession) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        executable("prometheus-alertmanager", "alertmanager"),
        f"--config.file={folder / 'out' / render.CONFIG}",
        f"--storage.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--web.external-url=http://alerts.llm.test",
        "--web.route-prefix=/",
        "--cluster.listen-address=",
    ]
    async with running("Alertmanager", command, f"http://{address}", client) as url:
        yield url


@contextlib.asynccontextmanager
async def running(name: str, command: list[str], url: str, client: aiohttp.ClientSession) -> AsyncIterator[str]:
    """Run a program that answers at `url`/-/ready when it is ready. Yields `url`."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    output = asyncio.create_task(process.stdout.read())  # a full pipe would block the program
    try:
        await _wait_until_ready(name, client, f"{url}/-/ready", output)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
        print((await output).decode())  # pytest shows the output if the test fails


async def _wait_until_ready(name: str, client: aiohttp.ClientSession, url: str, output: asyncio.Task[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with client.get(url) as answer:
                if answer.status == 200:
                    return
        assert not output.done(), f"{name} ended: {output.result().decode()}"
        assert time.monotonic() < deadline, f"{name} does not answer"
        await asyncio.sleep(0.02)
