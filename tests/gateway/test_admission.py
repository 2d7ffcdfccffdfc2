"""One queue decides which request of a model goes next."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from serve_app.core.queries import GetModelInfo
from serve_app.core.queue_meter import RefusalReason
from serve_app.errors import DeadlineExceeded, QueueFull
from serve_app.gateway.admission import QUERIES_RUNNING, QUERIES_WAITING, Admission
from serve_app.gateway.estimates import Estimates
from serve_app.gateway.room import Room
from tests.gateway.scripted import LAST, ScriptedEngine, chunk, request

WEIGHTS = {"": 1.0, "light": 1.0, "heavy": 4.0}


class Gate:
    """An engine whose answers end one by one, and an admission stage in front of it."""

    def __init__(self, places: int, waiting: int) -> None:
        self.ends: dict[str, asyncio.Event] = {}
        self.engine = ScriptedEngine(lambda r: [chunk(), self.ends.setdefault(r.id, asyncio.Event()), LAST])
        self.waiting = waiting
        self.stage = Admission(
            self.engine, "m", Room(places, places, places + waiting), Estimates(), WEIGHTS.__getitem__, self
        )
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.started_by: Counter[str] = Counter()
        self.refusals: list[RefusalReason] = []

    def started(self, tenant: str, seconds: float) -> None:
        assert 0 <= seconds < 10
        self.started_by[tenant] += 1

    def refused(self, reason: RefusalReason) -> None:
        self.refusals.append(reason)

    def resize(self, places: int) -> None:
        self.stage.resize(Room(places, places, places + self.waiting))

    async def send(
        self, id: str, priority: int = 0, timeout_s: float = 30.0, tenant: str = "", answer: int = 8
    ) -> asyncio.Task[None]:
        one = request(id, priority, timeout_s)
        one = replace(one, tenant=tenant, params=replace(one.params, max_tokens=answer))

        async def read() -> None:
            async for _ in self.stage.generate(one):
                pass

        task = self.tasks[id] = asyncio.create_task(read())
        await settle()
        return task

    async def end(self, id: str) -> None:
        self.ends[id].set()
        await settle()

    @property
    def begun(self) -> list[str]:
        return [one.id for one in self.engine.requests]


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_lowest_priority_value_goes_first_and_equals_in_order_of_arrival() -> None:
    gate = Gate(places=1, waiting=10)
    for name, priority in [("first", 0), ("b", 5), ("c", 0), ("d", -9), ("e", 0)]:
        await gate.send(name, priority)
    for name in ("first", "d", "c", "e", "b"):
        await gate.end(name)
    assert gate.begun == ["first", "d", "c", "e", "b"]
    await asyncio.gather(*gate.tasks.values())


async def test_a_full_queue_refuses_at_once_with_an_estimate() -> None:
    gate = Gate(places=1, waiting=1)
    await gate.send("a")
    await gate.send("b")
    assert (gate.stage.load("m").running, gate.stage.load("m").waiting) == (1, 1)
    refused = await gate.send("c")
    with pytest.raises(QueueFull, match="m has 1 requests waiting") as error:
        await refused
    assert (error.value.retry_after_s or 0) >= 1
    await gate.end("a")
    await gate.end("b")
    assert gate.begun == ["a", "b"]


async def test_a_waiting_request_ends_at_its_deadline_and_leaves_its_place() -> None:
    gate = Gate(places=1, waiting=1)
    await gate.send("a")
    late = await gate.send("late", timeout_s=0.03)
    with pytest.raises(DeadlineExceeded):
        await late
    await gate.send("b")
    await gate.end("a")
    await gate.end("b")
    assert gate.begun == ["a", "b"]


async def test_a_waiting_request_whose_caller_leaves_gives_its_place_back() -> None:
    gate = Gate(places=1, waiting=1)
    await gate.send("a")
    task = await gate.send("gone")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.stage.load("m").waiting == 0
    await gate.send("b")
    await gate.end("a")
    assert gate.begun == ["a", "b"]
    await gate.end("b")


async def test_more_places_let_waiting_requests_through() -> None:
    gate = Gate(places=1, waiting=5)
    for name in "abcd":
        await gate.send(name)
    gate.resize(3)
    await settle()
    assert gate.begun == ["a", "b", "c"]
    gate.resize(1)  # running requests stay
    for name in "abc":
        await gate.end(name)
    assert gate.begun == ["a", "b", "c", "d"]
    await gate.end("d")


async def test_no_permit_is_lost_whatever_leaves_when() -> None:
    """300 random arrivals, ends, departures and capacities: never more than the places, and all are free at the end."""
    draw = random.Random(7)
    gate = Gate(places=3, waiting=4)
    for number in range(300):
        action = draw.choice(["send", "send", "end", "leave", "places"])
        alive = [name for name, task in gate.tasks.items() if not task.done()]
        if action == "send":
            await gate.send(str(number), draw.randint(-2, 2), tenant=draw.choice(list(WEIGHTS)))
        elif action == "places":
            gate.resize(draw.randint(1, 4))
        elif alive and action == "leave":
            gate.tasks[draw.choice(alive)].cancel()
        elif gate.ends:
            gate.ends[draw.choice(list(gate.ends))].set()
        if draw.random() < 0.7:
            await settle()
        assert gate.engine.running <= 4
        assert gate.stage.load("m").waiting <= 4
    while any(not task.done() for task in gate.tasks.values()):
        for event in gate.ends.values():
            event.set()
        await settle()
    await asyncio.gather(*gate.tasks.values(), return_exceptions=True)
    assert (gate.stage.load("m").running, gate.stage.load("m").waiting, gate.engine.running) == (0, 0, 0)


async def test_a_full_queue_drops_the_last_request_of_the_tenant_that_has_more_for_its_weight() -> None:
    gate = Gate(places=1, waiting=3)
    first = [await gate.send(name, tenant="light") for name in ("runs", "a", "b", "c")]
    await gate.send("other", tenant="heavy")
    with pytest.raises(QueueFull, match="its limit") as error:
        await first[3]
    assert (error.value.retry_after_s or 0) >= 1
    refused = await gate.send("d", tenant="light")
    with pytest.raises(QueueFull):
        await refused
    for name in ("runs", "other", "a", "b"):
        await gate.end(name)
    assert gate.begun == ["runs", "other", "a", "b"]
    assert (gate.started_by, gate.refusals) == ({"light": 3, "heavy": 1}, ["dropped", "full"])
    await asyncio.gather(*gate.tasks.values(), return_exceptions=True)


async def test_a_request_that_cannot_start_before_its_deadline_is_refused_at_once() -> None:
    gate = Gate(places=1, waiting=10)
    first = await gate.send("first")
    await asyncio.sleep(0.2)
    await gate.end("first")
    await first
    for name in "abcd":
        await gate.send(name)
    waits_s = 3 * 0.2  # a runs
    began = time.monotonic()
    with pytest.raises(QueueFull, match="too busy") as error:
        await (await gate.send("late", timeout_s=waits_s / 4))
    assert time.monotonic() - began < 0.05
    assert (error.value.retry_after_s or 0) >= 1
    urgent = await gate.send("urgent", priority=-9, timeout_s=waits_s)
    patient = await gate.send("patient", timeout_s=60)
    for name in ("a", "urgent", "b", "c", "d", "patient"):
        await gate.end(name)
    assert gate.begun == ["first", "a", "urgent", "b", "c", "d", "patient"]
    assert gate.refusals == ["late"]
    await asyncio.gather(urgent, patient)


async def test_the_other_tenant_s_backlog_delays_a_request_by_no_more_than_its_share() -> None:
    gate = Gate(places=1, waiting=10)
    first = await gate.send("first", tenant="light")
    await asyncio.sleep(0.2)
    await gate.end("first")
    await first
    for name in "abcdef":
        await gate.send(name, tenant="light")
    one = await gate.send("other", tenant="heavy", timeout_s=0.5)
    await gate.end("a")
    await gate.end("other")
    await one
    assert gate.begun == ["first", "a", "other", "b"]
    for name in "bcdef":
        await gate.end(name)


async def test_an_answer_that_has_not_begun_in_time_is_ended() -> None:
    gate = Gate(places=1, waiting=3)
    never = asyncio.Event()
    gate.engine.script = lambda one: [never] if one.id == "silent" else [chunk(), 0.1, LAST]
    one = request("silent")
    silent = replace(one, first_token_deadline=one.arrived + 0.03)
    with pytest.raises(DeadlineExceeded, match=r"had no token after 0\.03 s"):
        async for _ in gate.stage.generate(silent):
            pass
    assert (gate.engine.running, gate.stage.load("m").running) == (0, 0)
    begun = request("begun")
    slow = gate.stage.generate(replace(begun, first_token_deadline=begun.arrived + 0.05))
    assert [one.finished async for one in slow] == [False, True], "the deadline is that of the first token only"


async def test_a_tenant_cannot_go_before_others_in_the_engine() -> None:
    gate = Gate(places=9, waiting=1)
    for name, tenant, priority in [("a", "light", -5), ("b", "light", 5), ("c", "", -5)]:
        await gate.send(name, priority, tenant=tenant)
        await gate.end(name)
    assert [one.priority for one in gate.engine.requests] == [0, 5, -5]


async def test_queries_are_bounded_apart_from_generations() -> None:
    gate = Gate(places=1, waiting=1)
    gate.engine.query_gate = asyncio.Event()
    await gate.send("a")
    asked = [
        asyncio.create_task(gate.stage.query("m", GetModelInfo(), time.monotonic() + 9))
        for _ in range(QUERIES_RUNNING + QUERIES_WAITING)
    ]
    await settle()
    assert len(gate.engine.queries) == QUERIES_RUNNING
    with pytest.raises(QueueFull, match="queries"):
        await gate.stage.query("m", GetModelInfo(), time.monotonic() + 9)
    gate.engine.query_gate.set()
    assert list(map(str, await asyncio.gather(*asked))) == ["answer"] * len(asked)
    await gate.end("a")
