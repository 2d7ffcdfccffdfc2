"""What Alertmanager told, kept: when each alert began, was first told of and was resolved.

An alert is known by its fingerprint and the instant it began. It counts once, however often it is told of: Alertmanager
repeats itself, tries again, and two of them may tell the same. Once resolved it stays so. Instants are seconds since
1970; those in Alertmanager's messages are by Prometheus's clock, the notification's by ours.
"""

from __future__ import annotations

import hmac
import json
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import AwareDatetime, BaseModel, Field, ValidationError, model_validator

from alerts.settings import HEARD_EVERY_S

MAX_BODY = 8 * 2**20  # some thousands of alerts
MAX_LISTED = 1000
MAX_NAMES = 300  # rules are some dozens; a name more than these is `other`

_SEVERITIES = ("critical", "warning", "info", "none")
_DAY = 86400
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS alerts (
    fingerprint TEXT NOT NULL,
    starts_at REAL NOT NULL,
    ends_at REAL,             -- NULL while it fires
    first_notification REAL,  -- NULL if we first heard of it when it was over
    last_notification REAL NOT NULL,
    labels TEXT NOT NULL,     -- JSON
    PRIMARY KEY (fingerprint, starts_at)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS alerts_by_age ON alerts (starts_at);
PRAGMA user_version = {_VERSION};
"""

# Bounds of what people ask: a page within 150 s is what the whole chain promises.
_DETECTION_S = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 150, 180, 300, 600, 1800, 3600)
_RESOLUTION_S = (60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, _DAY, 3 * _DAY, 7 * _DAY)


class HistoryError(Exception):
    """The receiver cannot start; the text says why and what would work."""


class Told(BaseModel):
    """One alert of a notification, as Alertmanager writes it. `endsAt` means nothing while it fires."""

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    starts_at: AwareDatetime = Field(alias="startsAt")
    ends_at: AwareDatetime = Field(alias="endsAt")
    fingerprint: str = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _in_our_time(self) -> Told:
        """Or one row could not be shown, and with it none."""
        instants = {"startsAt": self.starts_at, **({"endsAt": self.ends_at} if self.status == "resolved" else {})}
        for name, instant in instants.items():
            if not 1970 <= instant.year < 2200:
                raise ValueError(f"{name} {instant} is not between 1970 and 2200")
        return self


class Notification(BaseModel):
    version: Literal["4"]
    alerts: list[Told]


@dataclass(frozen=True)
class Row:
    """An alert as it is kept."""

    fingerprint: str
    labels: dict[str, str]
    starts_at: float
    ends_at: float | None
    first_notification: float | None
    last_notification: float

    @property
    def detection_s(self) -> float | None:
        return None if self.first_notification is None else self.first_notification - self.starts_at

    @property
    def resolution_s(self) -> float | None:
        return None if self.ends_at is None else self.ends_at - self.starts_at

    def status(self, now: float) -> Literal["firing", "resolved", "unheard"]:
        """`unheard`: nothing says that it is over, nor, for long, that it still fires."""
        if self.ends_at is not None:
            return "resolved"
        return "firing" if now - self.last_notification <= 3 * HEARD_EVERY_S else "unheard"

    def document(self, now: float) -> dict[str, Any]:
        return {
            "alertname": self.labels.get("alertname", ""),
            "severity": self.labels.get("severity", "none"),
            "status": self.status(now),
            "starts_at": _iso(self.starts_at),
            "ends_at": _iso(self.ends_at),
            "first_notification": _iso(self.first_notification),
            "last_notification": _iso(self.last_notification),
            "detection_seconds": self.detection_s,
            "resolution_seconds": self.resolution_s,
            "fingerprint": self.fingerprint,
            "labels": self.labels,
        }


def _iso(instant: float | None) -> str | None:
    return None if instant is None else datetime.fromtimestamp(instant, UTC).isoformat(timespec="milliseconds")


class Store:
    """The SQLite file. What a notification tells is kept as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error, HistoryError."""
        self._database = sqlite3.connect(path, timeout=5)
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise HistoryError(f"{path}: written by a newer version of this program; give another --database")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def keep(self, alerts: list[Told], at: float) -> list[tuple[Row | None, Row]]:
        """Each alert as it was before, if it was known, and as it is now. Raises sqlite3.Error."""
        with self._database:
            return [self._keep(alert, at) for alert in alerts]

    def _keep(self, told: Told, at: float) -> tuple[Row | None, Row]:
        key = (told.fingerprint, told.starts_at.timestamp())
        before = next(self._rows("WHERE fingerprint = ? AND starts_at = ?", key), None)
        over = told.status == "resolved"
        ended = told.ends_at.timestamp() if over else None
        if before is None:
            after = Row(key[0], told.labels, key[1], ended, None if over else at, at)
        else:
            ended = ended if before.ends_at is None else before.ends_at
            after = Row(
                key[0], before.labels, key[1], ended, before.first_notification, max(at, before.last_notification)
            )
        self._database.execute(
            "REPLACE INTO alerts (fingerprint, starts_at, ends_at, first_notification, last_notification, labels)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (*key, after.ends_at, after.first_notification, after.last_notification, json.dumps(after.labels)),
        )
        return before, after

    def forget(self, before: float) -> None:
        """Alerts not told of since."""
        with self._database:
            self._database.execute("DELETE FROM alerts WHERE last_notification < ?", (before,))

    def newest(self, limit: int) -> list[Row]:
        return list(self._rows("ORDER BY starts_at DESC, fingerprint LIMIT ?", (limit,)))

    def oldest_first(self) -> Iterator[Row]:
        return self._rows("ORDER BY starts_at, fingerprint", ())

    def _rows(self, which: str, values: tuple[object, ...]) -> Iterator[Row]:
        columns = "fingerprint, labels, starts_at, ends_at, first_notification, last_notification"
        for fingerprint, labels, *instants in self._database.execute(f"SELECT {columns} FROM alerts {which}", values):
            yield Row(fingerprint, json.loads(labels), *instants)


class Metrics:
    """Filled from the store at the start, so that a restart neither loses an alert nor counts it twice."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.registry = CollectorRegistry()
        labels = ("alertname", "severity")
        self._received = Counter(
            "alerts_received_total",
            "Alerts told of by Alertmanager: each once as it fires and once as it is resolved.",
            (*labels, "status"),
            registry=self.registry,
        )
        self._detection = Histogram(
            "alert_detection_seconds",
            "From an alert's startsAt (its rule fires, after `for`) to its first notification here.",
            labels,
            buckets=_DETECTION_S,
            registry=self.registry,
        )
        self._resolution = Histogram(
            "alert_resolution_seconds",
            "From an alert's startsAt to its endsAt.",
            labels,
            buckets=_RESOLUTION_S,
            registry=self.registry,
        )
        self._names: set[str] = set()
        for row in rows:
            self.count(None, row)

    def count(self, before: Row | None, after: Row) -> None:
        """What is new in `after`. Clocks that disagree may make a time negative; it is counted as none at all."""
        name, severity = self._labels(after)
        if before is None and after.detection_s is not None:
            self._received.labels(name, severity, "firing").inc()
            self._detection.labels(name, severity).observe(max(0.0, after.detection_s))
        if (before is None or before.ends_at is None) and after.resolution_s is not None:
            self._received.labels(name, severity, "resolved").inc()
            self._resolution.labels(name, severity).observe(max(0.0, after.resolution_s))

    def _labels(self, row: Row) -> tuple[str, str]:
        name, severity = row.labels.get("alertname", ""), row.labels.get("severity", "none")
        if len(self._names) < MAX_NAMES:
            self._names.add(name)
        return name if name in self._names else "other", severity if severity in _SEVERITIES else "other"


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Receiver:
    """`app()` answers over HTTP. `now` gives seconds since 1970."""

    def __init__(self, store: Store, token: str | None, keep_s: float, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._token = token
        self._keep_s = keep_s
        self._now = now
        store.forget(now() - keep_s)
        self._metrics = Metrics(store.oldest_first())

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.router.add_post("/webhook", self._webhook)
        app.router.add_get("/alerts", self._alerts)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/healthy", self._healthy)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is None or request.path == "/healthy":
            return await handler(request)
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return await handler(request)
        refused = _error(401, "the header Authorization needs to be `Bearer` and the token of --token-file")
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused

    async def _webhook(self, request: web.Request) -> web.Response:
        at = self._now()
        try:
            notification = Notification.model_validate_json(await request.read())
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"more than {MAX_BODY} bytes")
        except ValidationError as error:
            fault = error.errors()[0]
            return _error(400, f"no notification of Alertmanager's: {'.'.join(map(str, fault['loc']))}: {fault['msg']}")
        try:
            changes = self._store.keep(notification.alerts, at)
            self._store.forget(at - self._keep_s)
        except sqlite3.Error as error:  # 5xx: Alertmanager tries again
            print(f"alerts: not kept: {error}", file=sys.stderr)
            return _error(503, "the database did not take it")
        for before, after in changes:
            self._metrics.count(before, after)
        return web.json_response({"alerts": len(changes)})

    async def _alerts(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= MAX_LISTED):
            return _error(400, f"limit is a whole number from 1 to {MAX_LISTED}")
        now = self._now()
        return web.json_response([row.document(now) for row in self._store.newest(int(limit))])

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def run(host: str, port: int, database: Path, token_file: Path | None, keep_days: int) -> None:
    """Until Ctrl-C or SIGTERM. Raises HistoryError, sqlite3.Error, OSError."""
    token = _token(host, token_file)
    if keep_days < 1:
        raise HistoryError("--keep-days is at least 1")
    store = Store(database)
    try:
        app = Receiver(store, token, keep_days * _DAY).app()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            listening = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            say = f"alert history in {database}; webhooks at {listening}/webhook, table at /alerts, /metrics"
            web.run_app(app, sock=listener, print=lambda _: print(say, flush=True), access_log=None)
    finally:
        store.close()


def _token(host: str, file: Path | None) -> str | None:
    if file is None:
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise HistoryError(f"whoever reaches {host} could write here; give a --token-file, or listen on 127.0.0.1")
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise HistoryError(f"{file}: not text; it is to hold one line with the token") from None
    if not token or len(token.split()) > 1:
        raise HistoryError(f"{file}: expected one line with the token")
    return token
