"""The load that the client can generate, relative to the speed of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from perf import load
from perf.calibrate import try_streams
from perf.phases import PhaseController, Window
from tests.perf.mock_host import MockHost
from tests.perf.simulation import client, workload

pytestmark = pytest.mark.perf

EVENT = b'{"token": " a", "finished": false}'
# 10,000 events per second on a core where json.loads of an event takes 1.3 us.
MAX_COST = 75


def json_seconds() -> float:
    """Processor time of json.loads for one event: the best of five runs."""
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(20_000):
            json.loads(EVENT)
        times.append((time.process_time() - start) / 20_000)
    return min(times)


async def test_client_holds_1000_open_streams(mock: MockHost) -> None:
    """The first token comes after 1 s, so all streams are open at the same time."""
    controller = PhaseController(Window(requests=1000, warmup=0, cooldown=False), 1000)
    async with client(mock(ttft_s=1, itl_s=0.1)) as one:
        measurement = await load.closed_loop(one, controller, workload(4).requests("test"), 1000)

    assert len(measurement.records) == 1000
    assert all(record.ok for record in measurement.records)


async def test_event_costs_at_most_75_times_its_json_parsing(mock: MockHost) -> None:
    trial = await try_streams(mock(ttft_s=0.2, itl_s=0.02), 200, tokens=25, itl_ms=20)

    assert trial.failed == 0
    assert trial.cpu / trial.events_per_s < MAX_COST * json_seconds()


async def test_request_costs_at_most_300_times_the_json_parsing_of_an_event(mock: MockHost) -> None:
    """A request of 8 events, while the client computes all the time: after idle time a processor is slower."""
    trial = await try_streams(mock(ttft_s=0.0, itl_s=0.0), 800, tokens=8, itl_ms=1)

    assert trial.failed == 0
    assert trial.cpu / trial.events_per_s * 8 < 300 * json_seconds()


@pytest.mark.long
@pytest.mark.timeout(240)
def test_calibrate_command_reports_the_capacity() -> None:
    command = [sys.executable, "-m", "perf.calibrate", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, check=True)
    capacity = json.loads(done.stdout)
    print(done.stderr)
    assert capacity["open_streams"] == 1000
    assert 1 / capacity["events_per_s_per_core"] < MAX_COST * json_seconds()
