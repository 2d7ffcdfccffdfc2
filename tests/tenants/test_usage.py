"""The usage of requests in a real database, and the thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from serve_app.core.usage import COUNTS, Group, Usage, UsageQuery
from serve_app.database import open_database
from serve_app.database_config import DatabaseOptions
from serve_app.gateway.counters import Counter, Kind
from serve_app.tenants import ledger as ledger_module
from serve_app.tenants.ledger import Ledger
from serve_app.tenants.usage_store import Place, Sums, UsageStore


def instant(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


HOUR = instant("2026-11-30T12:00")
ONE = Usage("t", "k", "m", 10, 4, 5, 2, 1000)


@dataclass
class KeptLedgerMeter:
    waiting: int = 0
    dropped: int = 0
    written: threading.Event = field(default_factory=threading.Event)

    def unwritten(self, requests: int) -> None:
        self.waiting = requests
        self.written.set()

    def lost(self, requests: int) -> None:
        self.dropped += requests


def totals(store: UsageStore) -> list[int]:
    (row,) = store.report(UsageQuery())
    return [row[name] for name in COUNTS]


def test_rows_are_added_up_and_grouped(database: Engine) -> None:
    store = UsageStore(database)
    sums = Sums.of(ONE)
    other = Sums(2, 1, 0, 1, 0, 5)
    store.add({Place(HOUR, "t", "k", "m"): sums, Place(HOUR + 3600, "t", "k2", "m"): other})
    store.add({Place(HOUR, "t", "k", "m"): sums, Place(HOUR + 86_400, "u", "k3", "n"): other})
    assert totals(store) == [6, 22, 8, 12, 4, 2010]
    found = store.report(UsageQuery(groups=(Group.DAY, Group.TENANT)))
    assert [(row["day"], row["tenant"], row["requests"]) for row in found] == [
        ("2026-11-30", "t", 4),
        ("2026-12-01", "u", 2),
    ]
    assert [row["month"] for row in store.report(UsageQuery(groups=(Group.MONTH,)))] == ["2026-11", "2026-12"]
    assert [row["hour"] for row in store.report(UsageQuery(tenant="t", groups=(Group.HOUR,)))] == [
        "2026-11-30T12:00Z",
        "2026-11-30T13:00Z",
    ]
    assert [row["key"] for row in store.report(UsageQuery(begin=HOUR + 3600, groups=(Group.KEY,)))] == ["k2", "k3"]
    assert [row["key"] for row in store.report(UsageQuery(end=HOUR + 3600, groups=(Group.KEY,)))] == ["k"]
    assert store.report(UsageQuery(model="n", key="k3", groups=(Group.MODEL,)))[0]["requests"] == 2
    assert store.report(UsageQuery(tenant="nobody", groups=(Group.KEY,))) == []


def test_the_sums_of_a_month_are_those_of_its_days(database: Engine) -> None:
    store = UsageStore(database)
    days = {Place(HOUR - day * 86_400, "t", "k", "m"): Sums(1, 1, 1, 1, 1, 1) for day in range(30)}
    store.add(days)
    found = store.report(UsageQuery(groups=(Group.KEY, Group.MONTH)))
    assert [(row["key"], row["month"], row["requests"]) for row in found] == [("k", "2026-11", 30)]


def test_processes_that_write_the_same_rows_lose_nothing(database: Engine, database_options: DatabaseOptions) -> None:
    places = [Place(HOUR, "t", f"k{number}", "m") for number in range(5)]

    def write(_: int) -> None:
        store = UsageStore(open_database(database_options))
        for _ in range(10):
            store.add({place: Sums.of(ONE) for place in places})
        store.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert totals(UsageStore(database))[0] == 4 * 10 * 5


def test_budgets_begin_with_the_usage_of_their_period(database: Engine) -> None:
    store = UsageStore(database)
    today, earlier, before = HOUR, HOUR - 5 * 86_400, HOUR - 40 * 86_400
    store.add({Place(at, "t", "k", "m"): Sums.of(ONE) for at in (today, earlier, before)})
    seeds = store.used_of_budgets(HOUR + 100)
    assert seeds[Counter("key:k", Kind.TOKENS_PER_DAY, 1, "2026-11-30").name] == 15
    assert seeds[Counter("key:k", Kind.TOKENS_PER_MONTH, 1, "2026-11").name] == 30
    assert seeds[Counter("tenant:t", Kind.DOLLARS_PER_MONTH, 1, "2026-11").name] == 2000
    assert seeds[Counter("tenant:t", Kind.DOLLARS_PER_DAY, 1, "2026-11-30").name] == 1000


def test_a_ledger_writes_in_batches_and_what_is_left_at_its_end(database: Engine) -> None:
    meter = KeptLedgerMeter()
    ledger = Ledger(lambda: UsageStore(database), 0.05, meter)
    ledger.start()
    ledger.record(ONE)
    assert meter.written.wait(10)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ledger.record(ONE), range(1000)))
    ledger.stop()
    assert totals(UsageStore(database)) == [1001, 10_010, 4004, 5005, 2002, 1_001_000]
    assert (meter.waiting, meter.dropped) == (0, 0)


def test_names_that_no_database_takes_do_not_stop_the_ledger(database: Engine) -> None:
    ledger = Ledger(lambda: UsageStore(database), 60, KeptLedgerMeter())
    ledger.start()
    ledger.record(Usage("t" * 1000, "k\0", "m"))
    ledger.record(ONE)
    ledger.stop()
    assert totals(UsageStore(database))[0] == 2


def test_rows_wait_for_a_database_that_is_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = DatabaseOptions(url=f"sqlite:///{tmp_path / 'missing' / 'test.db'}")
    meter = KeptLedgerMeter()
    ledger = Ledger(lambda: UsageStore(open_database(options)), 0.02, meter)
    ledger.start()
    ledger.record(ONE)
    wait(meter, lambda: meter.waiting == 1)
    (tmp_path / "missing").mkdir()
    wait(meter, lambda: meter.waiting == 0)
    ledger.record(ONE)
    ledger.stop()
    store = UsageStore(open_database(options))
    assert totals(store)[0] == 2
    assert sum("cannot be written" in line for line in caplog.messages) == 1
    store.close()


def test_the_rows_that_wait_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_ROWS", 3)
    meter = KeptLedgerMeter()
    ledger = Ledger(lambda: UsageStore(open_database(DatabaseOptions(url=f"sqlite:///{tmp_path}/no/x.db"))), 60, meter)
    for number in range(5):
        ledger.record(Usage("t", str(number), "m"))
        ledger.record(Usage("t", "0", "m"))
    assert meter.dropped == 2


def wait(meter: KeptLedgerMeter, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        meter.written.clear()
        if condition():
            return
        meter.written.wait(1)
    raise AssertionError("it does not happen")
