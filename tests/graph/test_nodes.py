"""A cluster of four nodes: what fails when a node, an ingress, the controller or a proxy is lost.

Two nodes serve HTTP and two have the models, each one replica of `toy`.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.graph.cluster import Head, Node, Worker, fault_tolerance, node_environment
from tests.graph.service import Config, kill, metric_totals, model_config, wait_until
from tests.graph.streams import Call, ShortCalls, running, toy_calls

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(300)]

ONE_PER_NODE: Config = {
    "num_replicas": 2,
    "max_replicas_per_node": 1,
    "max_surge_percent": 0,
    "graceful_shutdown_timeout_s": 30,
}
# `ray start` on a node that serves HTTP, and on one for models.
FRONT, MODELS = ("--num-cpus=2", "--num-gpus=0"), ("--num-cpus=0", "--num-gpus=1")
READY_S = 90


class Nodes:
    """The head and `front` serve HTTP; the nodes in `models` have the model replicas."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._numbers = itertools.count(2)
        self._environment = stack.enter_context(node_environment("haproxy"))
        self._environment |= stack.enter_context(fault_tolerance())
        self.head = stack.enter_context(Head(self._environment, *FRONT))
        self.head.wait_until_started()
        self.front = self._start(FRONT)
        self.models = [self._start(MODELS) for _ in range(2)]
        for node in (self.front, *self.models):
            node.wait_until_started()

    def _start(self, options: Sequence[str]) -> Worker:
        return self._stack.enter_context(Worker(self.head, next(self._numbers), *options))

    def replace(self, lost: Worker) -> None:
        """Start another node for models, without waiting for it."""
        self.models = [*(node for node in self.models if node is not lost), self._start(MODELS)]

    def replace_head(self) -> None:
        """Start another head, with the state that Redis has, without waiting for it."""
        environment = {**self._environment, "RAY_AUTH_TOKEN": self.head.environment["RAY_AUTH_TOKEN"]}
        self.head = self._stack.enter_context(Head(environment, *FRONT, ports=self.head.ports))

    def find(self, text: str) -> list[psutil.Process]:
        """The processes of all nodes with this text in their command line."""
        return [process for node in (self.head, self.front, *self.models) for process in node.find(text)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """`quick` gives the answers of `toy` at once: what undisturbed streams of `toy` say."""
    with ExitStack() as stack:
        nodes = Nodes(stack)
        resources, engine = {"num_cpus": 0, "num_gpus": 1}, {"max_running": 64}
        toy = model_config("toy", "builtin:toy?step_ms=20", ONE_PER_NODE, resources=resources, engine=engine)
        # A proxy reaches the ingress on another node only if that does not listen on loopback.
        nodes.head.deploy(toy, model_config("quick"), ingress=ONE_PER_NODE, ingress_cpus=1, host="0.0.0.0")
        yield nodes


@asynccontextmanager
async def client_of(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the node's proxy, which opens a new connection for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=node.proxy, timeout=60, limits=limits) as client:
        yield client


@pytest.fixture
async def client(nodes: Nodes) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the head's proxy, once the service is complete."""
    await wait_until_complete(nodes)
    async with client_of(nodes.head) as client:
        yield client


async def wait_until_complete(nodes: Nodes) -> None:
    """Wait until both proxies answer, both ingresses run and each model has its replicas."""

    async def complete() -> bool:
        if nodes.head.process.poll() is not None and time.monotonic() < end:
            nodes.replace_head()  # a new head ends if it has not started in 30 s, which happens on a busy machine
        for node in (nodes.head, nodes.front, *nodes.models):
            assert node.process.poll() is None, node.output()
        for node in (nodes.head, nodes.front):
            async with client_of(node) as client:
                if not await answers(client):
                    return False
                totals = await metric_totals(client)
        ready = [totals.get(("ready_replicas", model)) for model in ("toy", "quick")]
        return ready == [2, 1] and len(nodes.find(":Ingress")) == 2

    end = time.monotonic() + READY_S / 2
    await wait_until(complete, seconds=READY_S, every_s=0.5)


async def wait_until_reached(client: httpx.AsyncClient) -> None:
    """Wait until the proxy of the client sends requests to both ingresses: it checks a new one before it does."""

    async def health_calls() -> dict[str, float]:
        families = text_string_to_metric_families((await client.get("/metrics")).text)
        counts = [one for family in families for one in family.samples if one.name == "serve_app_http_requests_total"]
        return {one.labels["replica"]: one.value for one in counts if one.labels["route"] == "/health"}

    async def both() -> bool:
        before = await health_calls()
        await asyncio.gather(*(client.get("/health") for _ in range(8)))
        await asyncio.sleep(1.5)  # each ingress reports once a second
        after = await health_calls()
        return sum(after[replica] > before.get(replica, 0) for replica in after) == 2

    await wait_until(both, seconds=READY_S)


async def resumed(client: httpx.AsyncClient) -> float:
    return (await metric_totals(client)).get(("resumed_requests_total", "toy"), 0.0)


async def undisturbed(client: httpx.AsyncClient, tokens: int) -> list[Any]:
    """The answers to `toy_calls(tokens)`."""
    return list(await asyncio.gather(*(call.run(client) for call in toy_calls(tokens, "quick"))))


def same(calls: list[Call], found: Sequence[Any], expected: Sequence[Any]) -> None:
    for call, answer, wanted in zip(calls, found, expected, strict=True):
        assert answer == wanted, call.body


def pauses(calls: list[Call]) -> list[float]:
    """The longest pause of each stream in seconds, in ascending order."""
    return sorted(round(call.longest_gap, 1) for call in calls)


async def test_no_answer_is_lost_with_a_node(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """Every process of the node is killed under 36 streams of all dialects. The answers are as without the fault."""
    calls, victim, before = [call for _ in range(6) for call in toy_calls(200)], nodes.models[0], await resumed(client)
    expected = await undisturbed(client, 200) * 6
    tasks = await running(client, calls, events=5)
    async with ShortCalls(client) as short:
        victim.lose()
        found = await asyncio.gather(*tasks)
    nodes.replace(victim)
    same(calls, found, expected)
    moved = await resumed(client) - before
    print(f"{moved:.0f} requests moved; pauses in s: {pauses(calls)}; {short.summary}")
    assert moved >= 9
    assert not short.failures
    assert pauses(calls)[-1] <= 3


async def test_the_streams_of_a_preempted_node_finish_or_move(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """A spot notice: the cloud takes the node 8 s later. Short streams end there, long ones move."""
    victim, before = nodes.models[0], await resumed(client)
    calls = [*toy_calls(300), *toy_calls(1600), *toy_calls(1600)]
    expected = [*await undisturbed(client, 300), *await undisturbed(client, 1600) * 2]
    notice = asyncio.create_task(asyncio.to_thread(nodes.head.drain, victim, 8))  # Ray's tool needs seconds to start
    tasks = await running(client, calls, events=3)
    assert not notice.done(), "the streams began first"
    async with ShortCalls(client) as short:
        await notice
        await asyncio.sleep(8)
        victim.lose()
        found = await asyncio.gather(*tasks)
    nodes.replace(victim)
    same(calls, found, expected)
    moved = await resumed(client) - before
    print(f"{moved:.0f} of {len(calls)} streams moved; pauses in s: {pauses(calls)}; {short.summary}")
    assert 2 <= moved <= 12, "the long ones that ran there"
    assert not short.failures
    assert pauses(calls)[-1] <= 5


async def test_the_streams_of_a_node_that_stands_still_move(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """No connection ends, as when a machine has crashed or its network is lost. The node runs again after 40 s."""
    victim = nodes.models[0]
    calls = [call for _ in range(3) for call in toy_calls(400)]
    expected = await undisturbed(client, 400) * 3
    tasks = await running(client, calls, events=3)
    stopped = time.monotonic()
    victim.send_to_all(signal.SIGSTOP)
    try:
        async with ShortCalls(client) as short:
            found = await asyncio.gather(*tasks)
            nodes.replace(victim)
            await asyncio.sleep(stopped + 40 - time.monotonic())
    finally:
        victim.send_to_all(signal.SIGCONT)
    same(calls, found, expected)
    print(f"pauses in s: {pauses(calls)}; {short.summary}")
    assert not short.failures
    assert pauses(calls)[-1] <= 15
    assert short.slowest_s <= 15


async def test_a_killed_ingress_ends_its_own_streams_only(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """Clients of both proxies. The end of a broken stream cannot be taken for the end of an answer."""
    (ingress,) = nodes.front.find(":Ingress")
    calls = [call for _ in range(4) for call in toy_calls(300)]
    expected = await undisturbed(client, 300) * 4
    async with client_of(nodes.front) as other:
        tasks = [*await running(client, calls[:12], events=3), *await running(other, calls[12:], events=3)]
        async with ShortCalls(client) as short:
            await asyncio.sleep(1)
            kill([ingress])
            killed = time.monotonic()
            found = await asyncio.gather(*tasks, return_exceptions=True)
    broken = [call for call, answer in zip(calls, found, strict=True) if isinstance(answer, httpx.RemoteProtocolError)]
    whole = [n for n, call in enumerate(calls) if call not in broken]
    same([calls[n] for n in whole], [found[n] for n in whole], [expected[n] for n in whole])
    late = max(call.times[-1] for call in broken) - killed
    print(f"{len(broken)} of {len(calls)} streams broke, the last event came {late:.2f} s after; {short.summary}")
    assert 6 <= len(broken) <= 18, "about half of the connections of each proxy went to this ingress"
    assert late <= 1
    assert not short.failures, "HAProxy sends calls without an answer to the other ingress"


async def test_the_controller_and_rays_own_proxy_are_not_needed_to_serve(
    nodes: Nodes, client: httpx.AsyncClient
) -> None:
    """One after the other is killed. No stream is cut and no call fails."""
    calls = [call for _ in range(2) for call in toy_calls(400)]
    expected = await undisturbed(client, 400) * 2
    tasks = await running(client, calls, events=3)
    async with ShortCalls(client) as short:
        for name in ("ServeController", "ProxyActor"):
            (process,) = nodes.head.find(f"ray::{name}")
            process.kill()
            await asyncio.sleep(3)
        found = await asyncio.gather(*tasks)
    same(calls, found, expected)
    print(f"pauses in s: {pauses(calls)}; {short.summary}")
    assert not short.failures
    assert pauses(calls)[-1] <= 2


@pytest.mark.parametrize("name", ["haproxy.cfg", "ray::HAProxyManager"])
async def test_a_killed_haproxy_breaks_its_own_connections_only(
    nodes: Nodes, client: httpx.AsyncClient, name: str
) -> None:
    """The other node's HAProxy serves on. HAProxy ends with the process that manages it. It is back after a while."""
    process = await wait_until(lambda: only(nodes.front, name))
    assert process is not None
    calls = toy_calls(250)
    expected = await undisturbed(client, 250)
    async with client_of(nodes.front) as other:
        own = await running(other, toy_calls(250), events=3)
        tasks = await running(client, calls, events=3)
        async with ShortCalls(client) as short:
            killed = time.monotonic()
            process.kill()
            found = await asyncio.gather(*tasks)
            broken = await asyncio.gather(*own, return_exceptions=True)
            await wait_until(lambda: answers(other), seconds=60)
            back_s = time.monotonic() - killed
    same(calls, found, expected)
    print(f"{name}: back after {back_s:.1f} s; {short.summary}")
    assert all(isinstance(error, httpx.TransportError) for error in broken), broken
    assert not short.failures


async def test_a_lost_head_costs_its_own_connections_only(nodes: Nodes, client: httpx.AsyncClient) -> None:
    """Ray's state is in Redis. Clients of the other proxy notice nothing, except on streams of the head's ingress."""
    calls = [call for _ in range(2) for call in toy_calls(600)]
    expected = await undisturbed(client, 600) * 2
    async with client_of(nodes.front) as other:
        await wait_until_reached(other)
        tasks = await running(other, calls, events=3)
        async with ShortCalls(other) as short:
            nodes.head.lose()
            killed = time.monotonic()
            nodes.replace_head()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        broken = [isinstance(answer, httpx.RemoteProtocolError) for answer in found]
        for call, answer, wanted, cut in zip(calls, found, expected, broken, strict=True):
            assert cut or answer == wanted, (call.body, answer)
        assert not short.failures, [f"{one.began - killed:.3f} s: {one.reason}" for one in short.failures]
        assert 2 <= sum(broken) <= 10
        await wait_until_complete(nodes)
        seconds = time.monotonic() - killed
        print(f"{sum(broken)} of {len(calls)} streams broke; complete after {seconds:.1f} s; {short.summary}")


async def only(node: Node, text: str) -> psutil.Process | None:
    """The process, once there is one: after a change of its configuration an older HAProxy ends its requests."""
    found = node.find(text)
    return found[0] if len(found) == 1 else None


async def answers(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
