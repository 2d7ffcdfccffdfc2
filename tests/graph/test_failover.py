"""Replicas that are killed or stand still while they serve streams: every answer is as without the fault."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from tests.graph.service import Service, http_client, metric_totals, model_config, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]

Json = dict[str, Any]

TWO = {"num_replicas": 2, "max_ongoing_requests": 32}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 60}, "story": {"type": "string", "maxLength": 300}},
    "required": ["name", "story"],
    "additionalProperties": False,
}
TOOL = {"name": "search", "description": "Search for a text", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def pair() -> Iterator[Service]:
    """Two replicas of the embedded model, and two of the toy."""
    models = [
        model_config("real", "builtin:smollm2-135m", TWO, engine={"threads": 1}, chat_template="builtin:chatml_tools"),
        model_config("toy", "builtin:toy?step_ms=20", TWO),
    ]
    with Service(models) as service:
        service.wait_until_ready()
        yield service


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


def calls() -> list[Call]:
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


async def resumed(client: httpx.AsyncClient, model: str) -> float:
    return (await metric_totals(client)).get(("resumed_requests_total", model), 0.0)


async def test_32_streams_of_all_dialects_survive_the_death_of_one_of_two_replicas(pair: Service) -> None:
    """Greedy and seeded answers, with grammars, tools, stop strings and n = 2, are as in an undisturbed run."""
    requests = calls()
    assert len(requests) == 32
    async with http_client(pair) as client:
        undisturbed = await asyncio.gather(*(call.run(client) for call in requests))
        usual = [call.longest_gap for call in requests]
        before = await resumed(client, "real")
        tasks = await running(client, requests, events=5)
        victim, _ = pair.find("model-real")
        victim.kill()
        disturbed = await asyncio.gather(*tasks)
        for call, expected, found in zip(requests, undisturbed, disturbed, strict=True):
            assert found == expected, call.body
        extra = sorted(call.longest_gap - gap for call, gap in zip(requests, usual, strict=True))
        print("pauses of the 32 streams:", [round(gap, 2) for gap in extra])
        assert await resumed(client, "real") - before >= 8
        assert extra[-1] <= 3

        async def both() -> bool:
            return len(pair.find("model-real")) == 2

        await wait_until(both, seconds=60)


async def test_streams_of_a_replica_that_stands_still_go_on_at_another_one(pair: Service) -> None:
    requests = [Call("/generate_stream", toy_body(prompt, 400), native) for prompt in "abcdefghijklmnop"]
    async with http_client(pair) as client:
        tasks = await running(client, requests, events=3)
        before = await resumed(client, "toy")
        victim, _ = pair.find("model-toy")
        victim.send_signal(signal.SIGSTOP)
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            with suppress(psutil.NoSuchProcess):  # Ray may have replaced it
                victim.send_signal(signal.SIGCONT)
        for call, (text, reason, usage) in zip(requests, answers, strict=True):
            assert text == call.body["prompt"] * 400
            assert (reason, usage["completion_tokens"]) == ("length", 400)
        assert await resumed(client, "toy") - before >= 4
        assert max(call.longest_gap for call in requests) <= 20


def toy_body(prompt: str, tokens: int) -> Json:
    return {"model": "toy", "prompt": prompt, "max_tokens": tokens}


async def test_a_rolling_restart_of_all_replicas_cuts_no_stream(pair: Service) -> None:
    """One replica after the other is killed, the second one while it also serves the streams of the first."""
    requests = [Call("/generate_stream", toy_body(prompt, 900), native) for prompt in "abcdefgh"]
    async with http_client(pair) as client:
        tasks = await running(client, requests, events=3)
        first, second = pair.find("model-toy")
        first.kill()

        async def replaced() -> bool:
            return len([one for one in pair.find("model-toy") if one.pid != first.pid]) == 2

        await wait_until(replaced, seconds=60)
        second.kill()
        for call, (text, _, _) in zip(requests, await asyncio.gather(*tasks), strict=True):
            assert text == call.body["prompt"] * 900
