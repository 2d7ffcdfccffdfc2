"""The alert history: stored notifications, rejected requests and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from alerts import history
from alerts.__main__ import main
from alerts.history import MAX_BODY, MAX_NAMES, HistoryError, Receiver, Store
from tests.alerts.receivers import Json, alert, alerting_stack, until

Client: TypeAlias = TestClient[web.Request, web.Application]

T0 = 1_700_000_000.0  # 2023-11-14T22:13:20Z
START = "2023-11-14T22:13:20Z"
TOKEN = {"Authorization": "Bearer history secret"}
DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def receiver(path: Path, clock: Clock, token: str | None = None) -> AsyncIterator[Client]:
    with contextlib.closing(Store(path)) as store:
        async with TestClient(TestServer(Receiver(store, token, 30 * DAY, clock).app())) as client:
            yield client


def notified(
    status: str, name: str = "HighTTFT", start: str = START, end: str = "0001-01-01T00:00:00Z", **more: str
) -> Json:
    labels = {"alertname": name, "severity": "critical", **more}
    fingerprint = f"{abs(hash(tuple(sorted(labels.items())))):x}"[:16]
    return {"status": status, "labels": labels, "startsAt": start, "endsAt": end, "fingerprint": fingerprint}


def notification(*alerts: Json) -> Json:
    """A notification with all the fields that Alertmanager sends."""
    return {"version": "4", "groupKey": "{}:{}", "receiver": "history", "truncatedAlerts": 0, "alerts": list(alerts)}


async def post(client: Client, *alerts: Json) -> None:
    async with client.post("/webhook", json=notification(*alerts)) as answer:
        assert answer.status == 200, await answer.text()


async def table(client: Client, limit: int = 100) -> list[Json]:
    async with client.get("/alerts", params={"limit": str(limit)}) as answer:
        assert answer.status == 200
        found: list[Json] = await answer.json()
        return found


async def samples(client: Client) -> dict[str, float]:
    """Samples by name and labels, without buckets and creation times."""
    async with client.get("/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = list(text_string_to_metric_families(await answer.text()))
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_created", "_bucket"))
    }


COUNTED = {
    "alerts_received_total HighTTFT critical firing": 1,
    "alerts_received_total HighTTFT critical resolved": 1,
    "alert_detection_seconds_count HighTTFT critical": 1,
    "alert_detection_seconds_sum HighTTFT critical": 12.5,
    "alert_resolution_seconds_count HighTTFT critical": 1,
    "alert_resolution_seconds_sum HighTTFT critical": 600,
}


async def test_an_alert_is_stored_from_start_to_end(tmp_path: Path) -> None:
    clock = Clock()
    async with receiver(tmp_path / "h.sqlite", clock) as client:
        clock.now = T0 + 12.5
        await post(client, notified("firing", model="a"))
        (row,) = await table(client)
        assert row == {
            "alertname": "HighTTFT",
            "severity": "critical",
            "status": "firing",
            "starts_at": "2023-11-14T22:13:20.000+00:00",
            "ends_at": None,
            "first_notification": "2023-11-14T22:13:32.500+00:00",
            "last_notification": "2023-11-14T22:13:32.500+00:00",
            "detection_seconds": 12.5,
            "resolution_seconds": None,
            "fingerprint": row["fingerprint"],
            "labels": {"alertname": "HighTTFT", "severity": "critical", "model": "a"},
        }
        clock.now = T0 + 620
        await post(client, notified("resolved", end="2023-11-14T22:23:20.000000001Z", model="a"))
        (row,) = await table(client)
        assert (row["status"], row["ends_at"]) == ("resolved", "2023-11-14T22:23:20.000+00:00")
        assert (row["detection_seconds"], row["resolution_seconds"]) == (12.5, 600)
        assert row["last_notification"] == "2023-11-14T22:23:40.000+00:00"
        assert await samples(client) == COUNTED


async def test_a_repeated_notification_counts_once_also_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    for _ in range(3):
        async with receiver(tmp_path / "h.sqlite", clock) as client:
            clock.now = max(clock.now, T0 + 12.5)
            await post(client, notified("firing"), notified("firing"))
            clock.now += 100
            await post(client, notified("firing"))
            await post(client, notified("resolved", end="2023-11-14T22:23:20Z"))
            await post(client, notified("resolved", end="2023-11-14T22:59:59Z"))  # a later one by another Alertmanager
            await post(client, notified("firing"))  # a delayed one
            assert await samples(client) == COUNTED
    async with receiver(tmp_path / "h.sqlite", clock) as client:
        assert await samples(client) == COUNTED
        (row,) = await table(client)
        assert (row["status"], row["resolution_seconds"], row["detection_seconds"]) == ("resolved", 600, 12.5)


async def test_an_alert_with_another_start_is_another_alert(tmp_path: Path) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock()) as client:
        later = "2023-11-14T23:13:20+01:00"  # the same time in another time zone
        await post(
            client,
            notified("firing"),
            notified("firing", start=later),
            notified("firing", start="2023-11-14T22:20:00Z"),
        )
        assert [row["starts_at"][11:19] for row in await table(client)] == ["22:20:00", "22:13:20"]


async def test_an_alert_first_notified_as_resolved_has_no_detection_time(tmp_path: Path) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock()) as client:
        await post(client, notified("resolved", end="2023-11-14T22:14:20Z"))
        (row,) = await table(client)
        assert (row["first_notification"], row["detection_seconds"], row["resolution_seconds"]) == (None, None, 60)
        assert await samples(client) == {
            "alerts_received_total HighTTFT critical resolved": 1,
            "alert_resolution_seconds_count HighTTFT critical": 1,
            "alert_resolution_seconds_sum HighTTFT critical": 60,
        }


async def test_a_negative_detection_time_counts_as_0(tmp_path: Path) -> None:
    clock = Clock()
    clock.now = T0 - 5
    async with receiver(tmp_path / "h.sqlite", clock) as client:
        await post(client, notified("firing"))
        assert (await table(client))[0]["detection_seconds"] == -5
        assert (await samples(client))["alert_detection_seconds_sum HighTTFT critical"] == 0


async def test_the_table_is_sorted_and_limited(tmp_path: Path) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock()) as client:
        await post(client, *(notified("firing", start=f"2023-11-14T22:{minute:02}:00Z") for minute in range(30)))
        assert [row["starts_at"][14:16] for row in await table(client, 3)] == ["29", "28", "27"]
        assert len(await table(client, 1000)) == 30
        for limit in ("0", "-1", "1001", "x", "", "1e3", "٣", "99999999999999999999"):
            async with client.get("/alerts", params={"limit": limit}) as answer:
                assert answer.status == 400, limit
                assert "1 to 1000" in (await answer.json())["error"]


async def test_the_number_of_alert_names_is_limited(tmp_path: Path) -> None:
    path, clock = tmp_path / "h.sqlite", Clock()
    async with receiver(path, clock) as client:
        await post(client, notified("firing", "HighTTFT"))
        await post(client, *(notified("firing", f"junk{number:05}") for number in range(5000)))
        await post(
            client,
            notified("firing", severity="odd"),
            {**notified("firing", "junk00001"), "labels": {}, "fingerprint": "x"},
        )
        found = await samples(client)
        names = {key.split()[1] for key in found}
        assert len(names) == MAX_NAMES + 1
        assert {"HighTTFT", "other"} <= names
        assert found["alerts_received_total other critical firing"] == 5001 - MAX_NAMES
        assert found["alerts_received_total HighTTFT other firing"] == 1
        assert found["alerts_received_total other none firing"] == 1
    async with receiver(path, clock) as client:
        assert len(await samples(client)) == len(found)


async def test_an_alert_without_notifications_becomes_unheard(tmp_path: Path) -> None:
    clock = Clock()
    async with receiver(tmp_path / "h.sqlite", clock) as client:
        await post(client, notified("firing"))
        for hours, status in ((3, "firing"), (3.001, "unheard")):
            clock.now = T0 + hours * 3600
            assert [row["status"] for row in await table(client)] == [status]
        await post(client, notified("firing"))
        assert [row["status"] for row in await table(client)] == ["firing"]


async def test_old_alerts_are_deleted(tmp_path: Path) -> None:
    clock = Clock()
    async with receiver(tmp_path / "h.sqlite", clock) as client:
        await post(client, notified("firing", "Old"), notified("firing", "Long"))
        clock.now = T0 + 20 * DAY
        await post(client, notified("firing", "Long"))
        clock.now = T0 + 31 * DAY
        await post(client, notified("firing", "New", start="2023-12-15T22:13:20Z"))
        assert [row["alertname"] for row in await table(client)] == ["New", "Long"]


BAD = {
    "no JSON": b"{",
    "nothing": b"",
    "not UTF-8": b'{"version": "\xff"}',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another version": json.dumps({"version": "3", "alerts": []}).encode(),
    "no alerts": json.dumps({"version": "4"}).encode(),
    "no status": json.dumps(notification({**notified("firing"), "status": "odd"})).encode(),
    "no time": json.dumps(notification(notified("firing", start="yesterday"))).encode(),
    "no zone": json.dumps(notification(notified("firing", start="2023-11-14T22:13:20"))).encode(),
    "long ago": json.dumps(notification(notified("firing", start="0001-01-01T00:00:00+14:00"))).encode(),
    "far off": json.dumps(notification(notified("firing", start="9999-12-31T23:59:59-14:00"))).encode(),
    "resolved without an end": json.dumps(notification(notified("resolved"))).encode(),
    "half a surrogate pair": rb'{"version": "4", "alerts": [], "receiver": "\ud800"}',
    "labels of numbers": json.dumps(notification({**notified("firing"), "labels": {"a": 1}})).encode(),
    "no fingerprint": json.dumps(notification({**notified("firing"), "fingerprint": ""})).encode(),
    "a good one and a bad one": json.dumps(
        notification(notified("firing"), {**notified("firing"), "status": ""})
    ).encode(),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
async def test_an_invalid_notification_is_rejected_as_a_whole(tmp_path: Path, body: bytes) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock()) as client:
        async with client.post("/webhook", data=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"].startswith("not an Alertmanager notification")
        assert await table(client) == []
        assert await samples(client) == {}


async def test_a_too_large_body_is_rejected(tmp_path: Path) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock()) as client:
        async with client.post("/webhook", data=BytesIO(b" " * (MAX_BODY + 1))) as answer:
            assert answer.status == 413
        await post(client, notified("firing"))


async def test_alertmanager_retries_after_a_database_error(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    async with receiver(path, Clock()) as client:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TRIGGER full BEFORE INSERT ON alerts BEGIN SELECT RAISE(ABORT, 'disk full'); END")
            async with client.post("/webhook", json=notification(notified("firing"))) as answer:
                assert answer.status == 503
            assert await samples(client) == {}
            other.execute("DROP TRIGGER full")
        await post(client, notified("firing"))
        assert (await samples(client))["alerts_received_total HighTTFT critical firing"] == 1


async def test_with_a_token_only_the_health_check_needs_none(tmp_path: Path) -> None:
    async with receiver(tmp_path / "h.sqlite", Clock(), token="history secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "history secret"}):
            for method, path in (("POST", "/webhook"), ("GET", "/alerts"), ("GET", "/metrics"), ("GET", "/odd")):
                async with client.request(method, path, headers=headers) as answer:
                    assert answer.status == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
        async with client.get("/healthy") as answer:
            assert answer.status == 200
        async with client.post("/webhook", json=notification(notified("firing")), headers=TOKEN) as answer:
            assert answer.status == 200
        async with client.get("/metrics", headers=TOKEN) as answer:
            assert answer.status == 200


def test_a_file_of_a_newer_version_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(HistoryError, match="newer version"):
        Store(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--token-file", "nowhere"], "nowhere: No such file"),
        (["--token-file", "empty"], "one line with the token"),
        (["--keep-days", "0"], "at least 1"),
        (["--database", "."], "give another file with --database"),
        (["--database", "text"], "give another file with --database"),
    ],
)
def test_invalid_options_are_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("text").write_text("no database" * 100)
    assert main(["history", "--database", "h.sqlite", "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


@contextlib.asynccontextmanager
async def program(database: Path, token_file: Path) -> AsyncIterator[str]:
    """The command, stopped with SIGTERM. Yields its URL."""
    command = ["-m", "alerts", "history", "--port", "0", "--database", str(database), "--token-file", str(token_file)]
    root = Path(history.__file__).parents[1]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, cwd=root)
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 15)).decode()
        yield line.split("webhooks at ")[1].split("/webhook")[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0


@pytest.mark.system
async def test_the_history_of_a_real_alertmanager_survives_a_restart(tmp_path: Path) -> None:
    database, token = tmp_path / "h.sqlite", tmp_path / "token"
    token.write_text("history-secret\n")
    headers = {"Authorization": "Bearer history-secret"}

    async def rows(url: str) -> list[Json]:
        async with aiohttp.ClientSession() as client, client.get(f"{url}/alerts", headers=headers) as answer:
            found: list[Json] = await answer.json()
            return found

    async def rows_when(url: str, status: str) -> Json:
        for _ in range(200):
            found = await rows(url)
            if [row["status"] for row in found] == [status]:
                return found[0]
            await asyncio.sleep(0.05)
        raise AssertionError(f"no single {status} alert: {await rows(url)}")

    firing = alert("ServiceDown", "critical", model="a")
    async with program(database, token) as url:
        async with alerting_stack(tmp_path, history_url=f"{url}/webhook") as stack:
            await stack.fire(firing, alert("Watchdog", "none"))
            row = await rows_when(url, "firing")
            assert 0.2 < row["detection_seconds"] < 10
            await until(lambda: stack.webhooks.pages, "the page")
            await stack.resolve(firing)
            row = await rows_when(url, "resolved")
            assert row["resolution_seconds"] > row["detection_seconds"]
    async with program(database, token) as url:
        assert await rows(url) == [row]
