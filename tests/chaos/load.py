"""Mixed load with a seed: requests of all dialects, a share of them with a fault, and how each request ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.chaos.clients import RawClient
from tests.chaos.network import Link
from tests.graph.streams import Call, Json, toy_calls

# answered: completely, and as undisturbed. refused: an error status with its typed body. failed: a typed error event.
# left: the client ended it, as it meant to. broken: a connection that ended early, or a plain error of the proxy.
# wrong: anything else, which must not happen.
Kind = Literal["answered", "refused", "failed", "left", "broken", "wrong"]
LENGTHS = (6, 20, 60)
# The statuses that docs/api.md names for a valid request: the model is full, has no replica, or the time is over.
REFUSALS = {429: "queue_full", 503: "not_ready", 504: "deadline_exceeded"}
_LONGEST_S = 120
# The argument of a fault is a random number from 0 to 1.
Fault = Callable[["Load", float], Awaitable["Outcome"]]


@dataclass(frozen=True)
class Outcome:
    """How one request ended. Times are monotonic seconds; `ttft_s` is None if no event came."""

    name: str
    kind: Kind
    began: float
    ended: float
    ttft_s: float | None = None
    longest_gap_s: float = 0.0
    detail: str = ""


@dataclass
class Stream:
    """The events of one streamed answer as they come."""

    call: Call
    times: list[float] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    dones: int = 0

    def add(self, line: str) -> None:
        if line == "data: [DONE]":
            self.dones += 1
        elif line.startswith("data: "):
            self.events.append(json.loads(line.removeprefix("data: ")))
            self.times.append(time.monotonic())

    @property
    def errors(self) -> list[Json]:
        found = [event for event in self.events if event.get("error") or event.get("type") == "error"]
        return found + [event for event in self.events if event.get("type") == "response.failed"]

    @property
    def ends(self) -> int:
        """The number of events that end an answer."""
        if self.call.path in ("/v1/completions", "/v1/chat/completions"):
            return self.dones
        return sum(map(_ends, self.events))

    @property
    def longest_gap_s(self) -> float:
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)


def _ends(event: Json) -> bool:
    kinds = ("message_stop", "response.completed", "response.incomplete")
    return bool(event.get("finished")) or event.get("type") in kinds or event.get("generated_text") is not None


def judged(stream: Stream, expected: Any) -> tuple[Kind, str]:
    """A stream whose connection ended well ends exactly once: with its end, or with one error event."""
    if stream.errors:
        once = len(stream.errors) == 1 and not any(map(_ends, stream.events))
        return ("failed" if once else "wrong"), json.dumps(stream.errors[0])
    if stream.ends != 1:
        return "wrong", f"{stream.ends} ends"
    answer = stream.call.read(stream.events)
    return ("answered", "") if answer == expected else ("wrong", f"{answer!r} is not {expected!r}")


async def stream(client: httpx.AsyncClient, call: Call, expected: Any, leave_after: int | None = None) -> Outcome:
    """Run one streamed request; with `leave_after`, disconnect after this number of events."""
    began, found = time.monotonic(), Stream(call)

    def outcome(kind: Kind, detail: str = "") -> Outcome:
        ttft = found.times[0] - began if found.times else None
        return Outcome(call.path, kind, began, time.monotonic(), ttft, found.longest_gap_s, detail)

    try:
        async with client.stream("POST", call.path, json=call.body, timeout=_LONGEST_S) as response:
            if response.status_code != 200:
                await response.aread()
                return outcome(*refusal(response))
            async for line in response.aiter_lines():
                found.add(line)
                if leave_after is not None and len(found.events) >= leave_after:
                    return outcome("left")
    except httpx.TimeoutException as error:
        return outcome("wrong", f"no end: {error!r}")
    except httpx.TransportError as error:
        return outcome("broken", repr(error))
    return outcome(*judged(found, expected))


async def whole(client: httpx.AsyncClient, prompt: str, tokens: int, model: str = "toy") -> Outcome:
    """Run one request without a stream."""
    began, body = time.monotonic(), {"model": model, "prompt": prompt, "max_tokens": tokens}
    kind: Kind
    try:
        answer = await client.post("/generate", json=body, timeout=_LONGEST_S)
    except httpx.TimeoutException as error:
        kind, detail = "wrong", f"no end: {error!r}"
    except httpx.TransportError as error:
        kind, detail = "broken", repr(error)
    else:
        if answer.status_code == 200:
            expected = (prompt * tokens)[:tokens]
            kind, detail = ("answered", "") if answer.json()["text"] == expected else ("wrong", answer.text)
        else:
            kind, detail = refusal(answer)
    return Outcome("/generate", kind, began, time.monotonic(), detail=detail)


def refusal(answer: httpx.Response) -> tuple[Kind, str]:
    """Whether an error status is one that a valid request can get, in the form of the service."""
    detail = f"{answer.status_code} {answer.text[:200]}"
    if answer.headers.get("content-type", "").startswith("text/plain"):
        return "broken", detail  # HAProxy's own answer when an ingress ended
    if answer.status_code not in REFUSALS or int(answer.headers.get("retry-after", 1)) < 1:
        return "wrong", detail
    return "refused", detail


class Load:
    """Requests that arrive at random, `per_s` each second on average, until the context is left.

    `share` of them have a fault of a client or of the network. The order is that of `seed`. `expected` are the answers
    of an undisturbed run, by path and length. `faults` are all by default.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        link: Link,
        port: int,
        expected: Mapping[tuple[str, int], Any],
        per_s: float,
        share: float,
        seed: int,
        model: str = "toy",
        faults: Sequence[Fault] | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.hung = 0
        self._client, self._link, self._port, self._expected = client, link, port, expected
        self._per_s, self._share, self._model = per_s, share, model
        self._faults = FAULTS if faults is None else faults
        self._random = random.Random(seed)
        self._requests: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Load:
        self._arrivals = asyncio.create_task(self._arrive())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._arrivals.cancel()
        await asyncio.gather(self._arrivals, return_exceptions=True)
        if self._requests:
            _, hung = await asyncio.wait(self._requests, timeout=_LONGEST_S)
            self.hung = len(hung)
            for task in hung:
                task.cancel()

    @property
    def kinds(self) -> Counter[str]:
        return Counter(one.kind for one in self.outcomes)

    async def _arrive(self) -> None:
        due = time.monotonic()
        while True:
            due += self._random.expovariate(self._per_s)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._note(self._draw()))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _note(self, request: Awaitable[Outcome]) -> None:
        began = time.monotonic()
        try:
            self.outcomes.append(await request)
        except OSError as error:  # a faulty client whose connection was refused or reset
            self.outcomes.append(Outcome("faulty client", "broken", began, time.monotonic(), detail=repr(error)))

    def _draw(self) -> Awaitable[Outcome]:
        if self._random.random() < self._share:
            fault = self._random.choice(self._faults)
            return fault(self, self._random.random())
        tokens = self._random.choice(LENGTHS)
        if self._random.random() < 0.2:
            return whole(self._client, self._random.choice(["ab", "abc", "abcd"]), tokens, self._model)
        return self._stream(self._client, self._random.randrange(6), tokens)

    def _stream(
        self, client: httpx.AsyncClient, dialect: int, tokens: int, leave: int | None = None
    ) -> Coroutine[Any, Any, Outcome]:
        call = toy_calls(tokens, self._model)[dialect]
        return stream(client, call, self._expected[call.path, tokens], leave)

    # The faults.

    async def disconnects(self, at: float) -> Outcome:
        """The client closes its connection within the first 20 events."""
        return await self._named("disconnect", self._stream(self._client, int(at * 6), 60, 1 + int(at * 20)))

    async def crashes(self, at: float) -> Outcome:
        """The client's connection is reset within 0.5 s."""
        return await self._raw("crash", {"max_tokens": 200}, at * 0.5)

    async def never_reads(self, at: float) -> Outcome:
        """The client reads nothing of 1000 tokens, and leaves after 5 to 15 s."""
        return await self._raw("never reads", {"max_tokens": 1000}, 5 + 10 * at)

    async def reads_slowly(self, at: float) -> Outcome:
        """The client reads 2 to 20 kB/s of an answer of 15 kB to its end."""
        body = {"model": self._model, "prompt": "abc", "max_tokens": 100}
        began = time.monotonic()
        async with RawClient(self._port, "/generate_stream", body, {"connection": "close"}) as client:
            content = await client.read_slowly(2_000 + 18_000 * at)
        complete = content.count(b'"finished":true') == 1
        detail = f"{len(content)} bytes"
        return Outcome("reads slowly", "answered" if complete else "broken", began, time.monotonic(), detail=detail)

    async def sends_garbage(self, at: float) -> Outcome:
        """The body is no JSON, or no request."""
        began = time.monotonic()
        content = random.Random(at).randbytes(200) if at < 0.5 else b'{"model": "toy", "prompt": 7}'
        try:
            answer = await self._client.post("/v1/completions", content=content, timeout=_LONGEST_S)
        except httpx.TransportError as error:
            return Outcome("garbage", "broken", began, time.monotonic(), detail=repr(error))
        typed = 400 <= answer.status_code < 500 and "error" in answer.json()
        kind: Kind = "left" if typed else refusal(answer)[0]
        return Outcome("garbage", kind, began, time.monotonic(), detail=answer.text[:200])

    async def loses_its_network(self, at: float) -> Outcome:
        """The connections of the clients behind the link are reset, or ended from the clients' side."""
        async with httpx.AsyncClient(base_url=self._link.url) as client:
            task = asyncio.ensure_future(self._stream(client, int(at * 6), 60))
            await asyncio.sleep(at)
            if at < 0.5:
                self._link.reset()
            else:
                self._link.half_close()
            return await self._named("network", task)

    async def _raw(self, name: str, fields: Json, seconds: float) -> Outcome:
        began = time.monotonic()
        body = {"model": self._model, "prompt": "abc", **fields}
        async with RawClient(self._port, "/generate_stream", body) as client:
            await asyncio.sleep(seconds)
            client.crash()
        return Outcome(name, "left", began, time.monotonic())

    async def _named(self, name: str, request: Awaitable[Outcome]) -> Outcome:
        """The outcome of a request whose client or network broke it: a broken connection is what was meant."""
        found = await request
        kind: Kind = "left" if found.kind == "broken" else found.kind
        return Outcome(name, kind, found.began, found.ended, None, 0.0, found.detail)


FAULTS: Sequence[Fault] = (
    Load.disconnects,
    Load.crashes,
    Load.never_reads,
    Load.reads_slowly,
    Load.sends_garbage,
    Load.loses_its_network,
)


async def undisturbed(client: httpx.AsyncClient, model: str = "toy") -> dict[tuple[str, int], Any]:
    """The answers to the calls of all dialects and lengths, one after the other, by path and length."""
    calls = [(call, tokens) for tokens in LENGTHS for call in toy_calls(tokens, model)]
    return {(call.path, tokens): await call.run(client) for call, tokens in calls}
