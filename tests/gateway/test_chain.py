"""The stages of one model together."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.core.queries import ModelState, ModelStatus
from serve_app.errors import NotReady, QueueFull
from serve_app.gateway.chain import ModelChain
from serve_app.gateway.room import Room, room_of
from tests.gateway.scripted import LAST, KeptMeter, ScriptedEngine, chunk, model, request


def chain(engine: ScriptedEngine, meter: KeptMeter) -> ModelChain:
    return ModelChain(model(places=2, waiting=1), engine, lambda _: meter, lambda _: None, lambda: None)


READY = ModelStatus("m", ModelState.READY)


async def test_a_request_passes_all_stages_once_the_model_is_ready() -> None:
    meter = KeptMeter()
    stages = chain(ScriptedEngine(), meter)
    stages.update(ModelStatus("m", ModelState.LOADING, "importing torch"), ready=0, ingresses=1)
    with pytest.raises(NotReady):
        [one async for one in stages.engine.generate(request())]
    stages.update(READY, ready=1, ingresses=1)
    assert [one async for one in stages.engine.generate(request())] == [chunk(), LAST]
    assert ([error.code for error in meter.errors], meter.ends) == (["not_ready"], 2)


@pytest.mark.parametrize(
    ("slots", "ready", "ingresses", "room"),
    [
        (None, 1, 1, Room(64, 64, 80)),
        (32, 1, 1, Room(32, 36, 80)),
        (32, 3, 2, Room(48, 54, 112)),
        (100, 1, 1, Room(64, 64, 80)),
        (1, 1, 1, Room(1, 2, 80)),
        (32, 0, 1, Room(32, 36, 80)),
    ],
)
def test_a_replica_gets_few_requests_more_than_it_has_slots(
    slots: int | None, ready: int, ingresses: int, room: Room
) -> None:
    assert room_of(model(places=64, waiting=16).deployment, slots, ready, ingresses) == room


def test_a_replica_gets_all_requests_that_ray_serve_has_to_count() -> None:
    assert room_of(model(places=64, waiting=16, target=48).deployment, 32, 1, 1) == Room(32, 64, 80)


@pytest.mark.parametrize(("ready", "ingresses", "places"), [(1, 1, 2), (2, 1, 4), (3, 2, 3), (1, 4, 1), (0, 1, 2)])
async def test_places_follow_the_ready_replicas_and_are_shared_by_ingresses(
    ready: int, ingresses: int, places: int
) -> None:
    end = asyncio.Event()
    engine = ScriptedEngine(lambda _: [chunk(), end, LAST])
    stages = chain(engine, KeptMeter())
    stages.update(READY, ready, ingresses)
    assert stages.engine.load("m").capacity == places

    async def read() -> int:
        try:
            return len([one async for one in stages.engine.generate(request())])
        except QueueFull:
            return 0

    tasks = [asyncio.create_task(read()) for _ in range(places + 3)]
    await asyncio.sleep(0.01)
    assert engine.running == places
    end.set()
    assert sorted(await asyncio.gather(*tasks)) == [0, 0, *[2] * (places + 1)], "one waits, two are refused"
