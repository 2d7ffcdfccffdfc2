"""The alert history: a webhook receiver that records when each alert started, was first notified and was resolved.

The fingerprint and the start time identify an alert. An alert counts once, although Alertmanager repeats notifications
and two Alertmanagers may send the same alert. A resolved alert stays resolved. Times are seconds since 1970. The start
and the end are times of Prometheus's clock, the notification times are times of this machine's clock.
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

from alerts.settings import HISTORY_REPEAT_S

MAX_BODY = 8 * 2**20  # bytes; enough for several thousand alerts
MAX_LISTED = 1000
MAX_NAMES = 300  # further alert names are counted as `other`

_SEVERITIES = ("critical", "warning", "info", "none")
_DAY = 86400
_VERSION = 1
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS alerts (
    fingerprint TEXT NOT NULL,
    starts_at REAL NOT NULL,
    ends_at REAL,             -- NULL while the alert fires
    first_notification REAL,  -- NULL if the first notification was the resolved one
    last_notification REAL NOT NULL,
    labels TEXT NOT NULL,     -- JSON
    PRIMARY KEY (fingerprint, starts_at)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS alerts_by_age ON alerts (starts_at);
PRAGMA user_version = {_VERSION};
"""

# Bucket bounds in seconds. The design target for a page is 150 s.
_DETECTION_S = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 150, 180, 300, 600, 1800, 3600)
_RESOLUTION_S = (60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, _DAY, 3 * _DAY, 7 * _DAY)


class HistoryError(Exception):
    """The receiver cannot start. The message contains the reason and a solution."""


class NotifiedAlert(BaseModel):
    """One alert of an Alertmanager notification. `endsAt` has no meaning while the alert fires."""

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    starts_at: AwareDatetime = Field(alias="startsAt")
    ends_at: AwareDatetime = Field(alias="endsAt")
    fingerprint: str = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _valid_times(self) -> NotifiedAlert:
        """Reject times that datetime cannot format: a single such row would make the whole table fail."""
        instants = {"startsAt": self.starts_at, **({"endsAt": self.ends_at} if self.status == "resolved" else {})}
        for name, instant in instants.items():
            if not 1970 <= instant.year < 2200:
                raise ValueError(f"{name} {instant} is not between 1970 and 2200")
        return self


class Notification(BaseModel):
    version: Literal["4"]
    alerts: list[NotifiedAlert]


@dataclass(frozen=True)
class Row:
    """A stored alert. Times are seconds since 1970."""

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
        """`unheard` means: not resolved, but without a notification for three hours."""
        if self.ends_at is not None:
            return "resolved"
        return "firing" if now - self.last_notification <= 3 * HISTORY_REPEAT_S else "unheard"

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
    """The SQLite file. The alerts of a notification are stored in one transaction."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error, HistoryError."""
        self._database = sqlite3.connect(path, timeout=5)
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise HistoryError(
                f"{path}: the file was written by a newer version of this program; give another file with --database"
            )
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def save(self, alerts: list[NotifiedAlert], at: float) -> list[tuple[Row | None, Row]]:
        """Store alerts notified at `at`. Returns each row before (None if new) and after. Raises sqlite3.Error."""
        with self._database:
            return [self._save(alert, at) for alert in alerts]

    def _save(self, alert: NotifiedAlert, at: float) -> tuple[Row | None, Row]:
        key = (alert.fingerprint, alert.starts_at.timestamp())
        before = next(self._rows("WHERE fingerprint = ? AND starts_at = ?", key), None)
        resolved = alert.status == "resolved"
        ended = alert.ends_at.timestamp() if resolved else None
        if before is None:
            after = Row(key[0], alert.labels, key[1], ended, None if resolved else at, at)
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

    def delete_before(self, before: float) -> None:
        """Delete alerts whose last notification is older."""
        with self._database:
            self._database.execute("DELETE FROM alerts WHERE last_notification < ?", (before,))

    def newest(self, limit: int) -> list[Row]:
        return list(self._rows("ORDER BY starts_at DESC, fingerprint LIMIT ?", (limit,)))

    def oldest_first(self) -> Iterator[Row]:
        return self._rows("ORDER BY starts_at, fingerprint", ())

    def _rows(self, which: str, values: tuple[object, ...]) -> Iterator[Row]:
        """The rows that a clause of this class selects."""
        columns = "fingerprint, labels, starts_at, ends_at, first_notification, last_notification"
        query = f"SELECT {columns} FROM alerts {which}"  # noqa: S608 (both parts are constants)
        for fingerprint, labels, *instants in self._database.execute(query, values):
            yield Row(fingerprint, json.loads(labels), *instants)


class Metrics:
    """Prometheus metrics. They start with the stored alerts, so that a restart neither loses nor repeats an alert."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.registry = CollectorRegistry()
        labels = ("alertname", "severity")
        self._received = Counter(
            "alerts_received_total",
            "Alerts received from Alertmanager, counted once when they fire and once when they are resolved.",
            (*labels, "status"),
            registry=self.registry,
        )
        self._detection = Histogram(
            "alert_detection_seconds",
            "Time from an alert's startsAt (after the `for` of its rule) to its first notification here.",
            labels,
            buckets=_DETECTION_S,
            registry=self.registry,
        )
        self._resolution = Histogram(
            "alert_resolution_seconds",
            "Time from an alert's startsAt to its endsAt.",
            labels,
            buckets=_RESOLUTION_S,
            registry=self.registry,
        )
        self._names: set[str] = set()
        for row in rows:
            self.count(None, row)

    def count(self, before: Row | None, after: Row) -> None:
        """Count the changes between two rows. A negative time, caused by different clocks, counts as 0."""
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
    """The HTTP application. `now` returns seconds since 1970."""

    def __init__(self, store: Store, token: str | None, keep_s: float, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._token = token
        self._keep_s = keep_s
        self._now = now
        store.delete_before(now() - keep_s)
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
        response = _error(401, "the Authorization header must be `Bearer` and the token of --token-file")
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    async def _webhook(self, request: web.Request) -> web.Response:
        at = self._now()
        try:
            notification = Notification.model_validate_json(await request.read())
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body has more than {MAX_BODY} bytes")
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"not an Alertmanager notification: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        try:
            changes = self._store.save(notification.alerts, at)
            self._store.delete_before(at - self._keep_s)
        except sqlite3.Error as error:  # Alertmanager retries after a status of 5xx
            print(f"alerts: cannot store a notification: {error}", file=sys.stderr)
            return _error(503, "the database is not available")
        for before, after in changes:
            self._metrics.count(before, after)
        return web.json_response({"alerts": len(changes)})

    async def _alerts(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) <= 4 and 1 <= int(limit) <= MAX_LISTED):
            return _error(400, f"limit must be an integer from 1 to {MAX_LISTED}")
        now = self._now()
        return web.json_response([row.document(now) for row in self._store.newest(int(limit))])

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def run(host: str, port: int, database: Path, token_file: Path | None, keep_days: int) -> None:
    """Run until Ctrl-C or SIGTERM. Raises HistoryError, sqlite3.Error, OSError."""
    token = _token(host, token_file)
    if keep_days < 1:
        raise HistoryError("--keep-days must be at least 1")
    store = Store(database)
    try:
        app = Receiver(store, token, keep_days * _DAY).app()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            listening = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            message = f"alert history in {database}; webhooks at {listening}/webhook, table at /alerts, /metrics"
            web.run_app(app, sock=listener, print=lambda _: print(message, flush=True), access_log=None)
    finally:
        store.close()


def _token(host: str, file: Path | None) -> str | None:
    if file is None:
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise HistoryError(
                f"every host that reaches {host} could write without a token; give a --token-file, or use 127.0.0.1"
            )
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise HistoryError(f"{file}: the file is not text; it must contain one line with the token") from None
    if not token or len(token.split()) > 1:
        raise HistoryError(f"{file}: the file must contain one line with the token")
    return token
