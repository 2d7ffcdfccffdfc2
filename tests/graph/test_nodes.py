"""A cluster of four nodes: what fails when a node, an ingress, the controller or a proxy is lost.

Two nodes serve HTTP and two have the models, each one replica of each.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.graph.cluster import Head, Node, Worker, proxy_environment
from tests.graph.service import Config, metric_totals, model_config, wait_until
from tests.graph.streams import Call, Json, ShortCalls, native, real_calls, running, toy_calls

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]

ONE_PER_NODE: Config = {
    "num_replicas": 2,
    "max_replicas_per_node": 1,
    "max_surge_percent": 0,
    "graceful_shutdown_timeout_s": 30,
}
MODEL_GPUS = {"num_cpus": 0, "num_gpus": 1}
READY_S = 60


class Nodes:
    """The head and `front` serve HTTP; the nodes in `models` have the model replicas. Lost nodes can be replaced."""

    def __init__(self, stack: ExitStack, environment: dict[str, str]) -> None:
        self._stack = stack
        self._numbers = itertools.count(2)
        self.head = stack.enter_context(Head("--num-cpus=2", "--num-gpus=0", **environment))
        self.head.wait_until_started()
        self.front = self._start("--num-cpus=2", "--num-gpus=0")
        self.models = [self._start("--num-cpus=0", "--num-gpus=2") for _ in range(2)]
        for node in (self.front, *self.models):
            node.wait_until_started()

    def _start(self, *options: str) -> Worker:
        return self._stack.enter_context(Worker(self.head, next(self._numbers), *options))

    def replace(self, lost: Worker) -> None:
        """Start another node for models, without waiting for it."""
        self.models = [node for node in self.models if node is not lost] + [self._start("--num-cpus=0", "--num-gpus=2")]

    def find(self, text: str) -> list[Any]:
        """The processes of all nodes with this text in their command line."""
        return [process for node in (self.head, self.front, *self.models) for process in node.find(text)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        nodes = Nodes(stack, stack.enter_context(proxy_environment("haproxy")))
        toy = model_config("toy", "builtin:toy?step_ms=20", ONE_PER_NODE, resources=MODEL_GPUS)
        real = model_config(
            "real",
            "builtin:smollm2-135m",
            ONE_PER_NODE,
            resources=MODEL_GPUS,
            engine={"threads": 1},
            device="cpu",
            chat_template="builtin:chatml_tools",
        )
        nodes.head.deploy(toy, real, ingress=ONE_PER_NODE)
        yield nodes


@asynccontextmanager
async def client_of(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=node.proxy, timeout=60, limits=limits) as client:
        yield client


@pytest.fixture
async def client(nodes: Nodes) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the head's proxy, once both nodes with models have both replicas."""
    async with client_of(nodes.head) as client:
        await wait_until(lambda: complete(nodes, client), seconds=READY_S, every_s=0.5)
        yield client


async def complete(nodes: Nodes, client: httpx.AsyncClient) -> bool:
    try:
        totals = await metric_totals(client)
    except (httpx.TransportError, ValueError):
        return False
    ready = [totals.get(("ready_replicas", model)) for model in ("toy", "real")]
    return ready == [2, 2] and len(nodes.find(":Ingress")) == 2


async def resumed(client: httpx.AsyncClient, model: str) -> float:
    return (await metric_totals(client)).get(("resumed_requests_total", model), 0.0)


def slowest_pauses(calls: list[Call], usual: list[float]) -> list[float]:
    """By how much the longest pause of each stream was longer than usual, in ascending order."""
    return sorted(round(call.longest_gap - gap, 2) for call, gap in zip(calls, usual, strict=True))


async def test_32_streams_of_all_dialects_survive_the_loss_of_a_node(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """Every process of the node is killed. Greedy and seeded answers, with grammars, tools and n = 2, are the same."""
    calls, victim = real_calls(), nodes.models[0]
    expected = await asyncio.gather(*(call.run(client) for call in calls))
    usual, before = [call.longest_gap for call in calls], await resumed(client, "real")
    async with ShortCalls(client) as short:
        tasks = await running(client, calls, events=5)
        victim.send_to_all(signal.SIGKILL)
        found = await asyncio.gather(*tasks)
        nodes.replace(victim)
    for call, answer, same in zip(calls, found, expected, strict=True):
        assert answer == same, call.body
    pauses = slowest_pauses(calls, usual)
    print(f"{await resumed(client, 'real') - before:.0f} resumed; pauses: {pauses}; {short.summary}")
    assert await resumed(client, "real") - before >= 8
    assert not short.failures
    assert pauses[-1] <= 6


async def test_the_streams_of_a_preempted_node_finish_or_move(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """A spot notice: the cloud takes the node 10 s later. Short streams end there, long ones move."""
    victim = nodes.models[0]
    short, long = toy_calls(200), [call for _ in range(3) for call in toy_calls(900)]
    expected = await asyncio.gather(*(call.run(client) for call in [*short, *toy_calls(900)]))
    usual, before = [call.longest_gap for call in short] * 4, await resumed(client, "toy")
    tasks = await running(client, [*short, *long], events=3)
    async with ShortCalls(client) as calls:
        nodes.replace(victim)  # as an autoscaler does
        await asyncio.to_thread(nodes.head.drain, victim, 10)
        await asyncio.sleep(10)
        left = victim.find("ServeReplica")
        victim.send_to_all(signal.SIGKILL)
        found = await asyncio.gather(*tasks)
    same = [*expected[: len(short)], *expected[len(short) :] * 3]
    for call, answer, wanted in zip([*short, *long], found, same, strict=True):
        assert answer == wanted, call.body
    pauses = slowest_pauses([*short, *long], usual)
    print(f"{await resumed(client, 'toy') - before:.0f} moved; pauses: {pauses}; {len(left)} replicas left; {calls.summary}")
    assert not calls.failures
    assert pauses[-1] <= 6


async def test_the_streams_of_a_node_that_stands_still_move(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """No connection ends, as when a machine has crashed or its network is lost. The node runs again after 40 s."""
    victim = nodes.models[0]
    streams = [call for _ in range(3) for call in toy_calls(600)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(600)))
    tasks = await running(client, streams, events=3)
    stopped = time.monotonic()
    victim.send_to_all(signal.SIGSTOP)
    try:
        async with ShortCalls(client) as short:
            found = await asyncio.gather(*tasks)
            print(f"the streams ended after {time.monotonic() - stopped:.1f} s; {short.summary}")
            nodes.replace(victim)
            await asyncio.sleep(stopped + 40 - time.monotonic())
    finally:
        victim.send_to_all(signal.SIGCONT)
    for call, answer, same in zip(streams, found, expected * 3, strict=True):
        assert answer == same, call.body
    print(f"pauses: {sorted(round(call.longest_gap, 1) for call in streams)}; {short.summary}")
    assert not short.failures
    assert max(call.longest_gap for call in streams) <= 20
    assert short.slowest_s <= 20


async def test_a_killed_ingress_ends_its_own_streams_only(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """Clients of both proxies. The end of a broken stream cannot be taken for the end of an answer."""
    (ingress,) = nodes.front.find(":Ingress")
    streams = [call for _ in range(4) for call in toy_calls(500)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(500)))
    async with client_of(nodes.front) as other:
        tasks = [*await running(client, streams[:12], events=3), *await running(other, streams[12:], events=3)]
        async with ShortCalls(client) as short:
            await asyncio.sleep(1)
            killed = time.monotonic()
            ingress.kill()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            await wait_until(lambda: complete(nodes, client), seconds=READY_S)
    broken = [call for call, answer in zip(streams, found, strict=True) if isinstance(answer, httpx.RemoteProtocolError)]
    for call, answer, same in zip(streams, found, expected * 4, strict=True):
        assert call in broken or answer == same, (call.body, answer)
    ends = [call.times[-1] - killed for call in broken]
    print(f"{len(broken)} of {len(streams)} streams broke, {max(ends):.2f} s after the kill; {short.summary}")
    assert 6 <= len(broken) <= 18, "about half of the connections of each proxy went to this ingress"
    assert max(ends) <= 1
    assert all(failure.began <= killed for failure in short.failures), short.failures


@pytest.mark.parametrize("name", ["ServeController", "ProxyActor", "HAProxyManager", "DashboardAgent"])
async def test_a_killed_process_of_ray_costs_no_request(nodes: Nodes, client: httpx.AsyncClient, name: str) -> None:
    (process,) = nodes.head.find(f"ray::{name}")
    streams = [call for _ in range(2) for call in toy_calls(400)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(400)))
    tasks = await running(client, streams, events=3)
    async with ShortCalls(client) as short:
        process.kill()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    print(name, short.summary, [a for a in found if isinstance(a, Exception)][:3], len([a for a in found if isinstance(a, Exception)]))
    for call, answer, same in zip(streams, found, expected * 2, strict=True):
        assert answer == same, (call.body, answer)
    assert not short.failures


async def test_a_killed_haproxy_breaks_only_its_own_connections(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """The other node's HAProxy serves on. The killed one is back after a few seconds."""
    (haproxy,) = nodes.front.find("haproxy.cfg")
    streams = [call for _ in range(2) for call in toy_calls(300)]
    expected = await asyncio.gather(*(call.run(client) for call in toy_calls(300)))
    async with client_of(nodes.front) as other:
        own = await running(other, toy_calls(300), events=3)
        tasks = await running(client, streams, events=3)
        async with ShortCalls(client) as short:
            killed = time.monotonic()
            haproxy.kill()
            found = await asyncio.gather(*tasks)
            broken = await asyncio.gather(*own, return_exceptions=True)
            await wait_until(lambda: answers(other), seconds=60)
    print(f"back after {time.monotonic() - killed:.1f} s; {short.summary}")
    assert found == expected * 2
    assert all(isinstance(error, httpx.TransportError) for error in broken), broken
    assert not short.failures


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
