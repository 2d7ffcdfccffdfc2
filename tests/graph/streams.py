"""Streamed requests of all dialects, and what their events say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import httpx

from tests.graph.service import wait_until

Json = dict[str, Any]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60}, "story": {"type": "string", "maxLength": 300}},
    "required": ["name", "story"],
    "additionalProperties": False,
}
TOOL = {"name": "search", "description": "Search for a text", "parameters": SCHEMA}


@dataclass
class Call:
    """One streamed request, what its events say, and when they came."""

    path: str
    body: Json
    read: Callable[[list[Json]], object]
    events: list[Json] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    async def run(self, client: httpx.AsyncClient) -> Any:
        """The answer: its text, its tool calls and the reason of its end."""
        self.events, self.times = [], []
        async with client.stream("POST", self.path, json=self.body, timeout=300) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.times.append(time.monotonic())
        assert not any("error" in event and event["error"] for event in self.events), self.events[-1]
        return self.read(self.events)

    @property
    def longest_gap(self) -> float:
        return max(later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


def native(events: list[Json]) -> object:
    return "".join(event["token"] for event in events), events[-1]["finish_reason"], events[-1]["usage"]


def completions(events: list[Json]) -> object:
    texts: dict[int, str] = {}
    ends = {}
    for choice in (choice for event in events for choice in event["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    return texts, ends


def chat(events: list[Json]) -> object:
    parts: list[tuple[int, str]] = []
    ends = {}
    for choice in (choice for event in events for choice in event["choices"]):
        parts.append((choice["index"], choice["delta"].get("content") or ""))
        for call in choice["delta"].get("tool_calls") or []:
            parts.append((choice["index"], call["function"].get("name") or ""))
            parts.append((choice["index"], call["function"].get("arguments") or ""))
        ends[choice["index"]] = choice["finish_reason"]
    return [("".join(text for index, text in parts if index == n), ends[n]) for n in sorted(ends)]


def responses(events: list[Json]) -> object:
    output = events[-1]["response"]["output"]
    return [(item.get("content", [{}])[0].get("text"), item.get("name"), item.get("arguments")) for item in output]


def messages(events: list[Json]) -> object:
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    ends = [event["delta"] for event in events if event["type"] == "message_delta"]
    return "".join(delta.get("text") or delta.get("partial_json") or "" for delta in deltas), ends[-1]["stop_reason"]


def tgi(events: list[Json]) -> object:
    return events[-1]["generated_text"], events[-1]["details"]["finish_reason"]


def real_calls() -> list[Call]:
    """32 requests: each dialect with each way to generate that it has."""

    def native_call(**fields: Any) -> Call:
        return Call("/generate_stream", {"prompt": "Once upon a time", "max_tokens": 100, **fields}, native)

    def completion(**fields: Any) -> Call:
        return Call("/v1/completions", {"prompt": "The old man", "max_tokens": 100, **fields}, completions)

    def chat_call(**fields: Any) -> Call:
        return Call("/v1/chat/completions", {"messages": [user], "max_tokens": 100, **fields}, chat)

    def response(**fields: Any) -> Call:
        return Call("/v1/responses", {"input": user["content"], "max_output_tokens": 100, **fields}, responses)

    def message(**fields: Any) -> Call:
        return Call("/v1/messages", {"messages": [user], "max_tokens": 100, **fields}, messages)

    def tgi_call(**parameters: Any) -> Call:
        common = {"max_new_tokens": 100, "details": True, **parameters}
        return Call("/generate_stream?model=real", {"inputs": "In the forest", "parameters": common}, tgi)

    user = {"role": "user", "content": "Tell a long story about a fox and search for its name."}
    json_schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    openai_tool: Json = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}
    claude_tool = {"name": "search", "description": "Search", "input_schema": SCHEMA}
    found = []
    for seed in (1, 2):
        drawn: Json = {"temperature": 1.0, "seed": seed}
        found += [
            native_call(**drawn),
            native_call(temperature=0, stop=["nowhere", " the end"]),
            completion(**drawn, n=2),
            completion(temperature=0, stop=[" nothing"]),
            chat_call(**drawn),
            chat_call(**drawn, response_format=json_schema),
            chat_call(**drawn, **openai_tool),
            chat_call(**drawn, n=2),
            chat_call(temperature=0, stop=[" nothing"]),
            response(temperature=0),
            response(temperature=0, text={"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}),
            response(temperature=0, tools=[{"type": "function", **TOOL, "strict": True}], tool_choice="required"),
            message(temperature=0),
            message(temperature=0, tools=[claude_tool], tool_choice={"type": "any"}),
            tgi_call(do_sample=True, seed=seed),
            tgi_call(grammar={"type": "json", "value": SCHEMA}, stop=["nowhere"]),
        ]
    for call in found:
        if call.read is not tgi:
            call.body["model"] = "real"
        if call.path.startswith("/v1/"):
            call.body["stream"] = True
    return found


async def running(client: httpx.AsyncClient, calls: Iterable[Call], events: int) -> list[asyncio.Task[Any]]:
    """The tasks of calls that have all received `events` events."""
    for call in calls:
        call.events = []
    tasks = [asyncio.create_task(call.run(client)) for call in calls]

    async def begun() -> bool:
        return all(len(call.events) >= events or task.done() for call, task in zip(calls, tasks, strict=True))

    await wait_until(begun, seconds=120, every_s=0.02)
    return tasks


def toy_calls(tokens: int, model: str = "toy") -> list[Call]:
    """One request of each dialect to the toy model, whose answer repeats the prompt."""
    chat_body: Json = {"messages": [{"role": "user", "content": "abcdefg"}], "max_tokens": tokens}
    found = [
        Call("/generate_stream", {"prompt": "abcde", "max_tokens": tokens}, native),
        Call("/v1/completions", {"prompt": "abcdefghi", "max_tokens": tokens, "n": 2}, completions),
        Call("/v1/chat/completions", {**chat_body, "stop": ["nowhere"]}, chat),
        Call("/v1/responses", {"input": "abcdefghijk", "max_output_tokens": tokens}, responses),
        Call("/v1/messages", chat_body, messages),
    ]
    for call in found:
        call.body = {**call.body, "model": model, **({"stream": True} if call.path.startswith("/v1/") else {})}
    parameters = {"max_new_tokens": tokens, "details": True}
    return [*found, Call(f"/generate_stream?model={model}", {"inputs": "abc", "parameters": parameters}, tgi)]


class Failure(NamedTuple):
    """A call that was not answered as it has to be: the monotonic instant at which it began, and the reason."""

    began: float
    reason: str


class ShortCalls:
    """Calls of 6 tokens, one after the other in each of `parallel` tasks, while this context is entered."""

    def __init__(self, client: httpx.AsyncClient, model: str = "toy", parallel: int = 4) -> None:
        self._client = client
        self._body = {"model": model, "prompt": "abc", "max_tokens": 6}
        self._parallel = parallel
        self._tasks: list[asyncio.Task[None]] = []
        self.answered = 0
        self.slowest_s = 0.0
        self.failures: list[Failure] = []

    async def __aenter__(self) -> Self:
        self._stopped = False
        self._tasks = [asyncio.create_task(self._call_until_stopped()) for _ in range(self._parallel)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    @property
    def summary(self) -> str:
        return (
            f"{self.answered} short calls answered, {len(self.failures)} not, the slowest after {self.slowest_s:.1f} s"
        )

    async def _call_until_stopped(self) -> None:
        while not self._stopped:
            began = time.monotonic()
            reason = await self._call()
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if reason is None:
                self.answered += 1
            else:
                self.failures.append(Failure(began, reason))
                await asyncio.sleep(0.1)

    async def _call(self) -> str | None:
        try:
            answer = await self._client.post("/generate", json=self._body)
        except httpx.TransportError as error:
            return repr(error)
        good = answer.status_code == 200 and answer.json()["text"] == "abcabc"
        return None if good else f"{answer.status_code} {answer.text}"
