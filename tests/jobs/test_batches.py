"""Files and batches by OpenAI's official client, over each kind of database."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.core.engine import EngineLoad
from serve_app.core.requests import ChatPrompt, GenerationRequest
from serve_app.core.tenants import Identity, Scope as KeyScope
from serve_app.database_config import DatabaseOptions
from serve_app.errors import InternalError, NotReady, QueueFull
from serve_app.gateway.background import BACKGROUND_PRIORITY
from tests.api.scripted import ScriptedEngine, Step, chunk, echo

from .service import WallClock, chat_line, process, wait_for


async def test_a_batch_answers_each_line_once_in_the_order_of_the_input(database_options: DatabaseOptions) -> None:
    async with process(database_options) as one:
        batch = await one.submit(chat_line(number) for number in range(100))
        assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"name": "test"})
        batch = await one.ended(batch.id)
        assert (batch.status, batch.error_file_id, batch.errors) == ("completed", None, None)
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 100, "completed": 100, "failed": 0}
        found = await one.lines(batch.output_file_id)
        assert [line["custom_id"] for line in found] == [f"line-{number}" for number in range(100)]
        assert len({line["id"] for line in found}) == 100
        assert {line["response"]["status_code"] for line in found} == {200}
        assert found[0]["response"]["body"]["object"] == "chat.completion"
        assert {line["error"] for line in found} == {None}
        instants = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert list(instants) == sorted(instants)  # type: ignore[type-var]
        assert one.meter.outcomes == {"completed": 100}
        assert len(one.engine.requests) == 100
        assert {request.priority for request in one.engine.requests} == {BACKGROUND_PRIORITY}
        assert {request.background for request in one.engine.requests} == {True}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}),
        ("/v1/completions", {"prompt": "the sea is", "logprobs": 1}),
        ("/v1/responses", {"input": "hi", "store": False}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/completions", {"prompt": "hi", "unknown": 1}),
        ("/v1/completions", {"prompt": "hi", "model": "absent"}),
    ],
)
async def test_the_answer_to_a_line_is_that_of_the_endpoint(
    sqlite: DatabaseOptions, endpoint: str, body: dict[str, Any]
) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        if request.embed:
            from serve_app.core.events import Chunk

            return [Chunk((), prompt_tokens=3, queue_s=0.0, embedding=(0.6, 0.8))]
        return echo(request)

    async with process(sqlite, ScriptedEngine(script)) as one:
        answer = await one.http.post(endpoint, json=body)
        line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
        batch = await one.ended((await one.submit([line], endpoint)).id)
        (found,) = await one.lines(batch.output_file_id if answer.status_code == 200 else batch.error_file_id)
        assert found["response"]["status_code"] == answer.status_code
        assert _without_ids(found["response"]["body"]) == _without_ids(answer.json())


def _without_ids(document: Any) -> Any:
    """The document without what is new in each answer."""
    if isinstance(document, dict):
        new = {"id", "created", "created_at", "completed_at"}
        return {name: _without_ids(value) for name, value in document.items() if name not in new}
    return [_without_ids(value) for value in document] if isinstance(document, list) else document


FAULTS = [
    ("{not json}\n", "invalid_json_line", None),
    ("[]\n", "invalid_json_line", None),
    ({"method": "POST", "url": "/v1/chat/completions", "body": {}}, "invalid_custom_id", "custom_id"),
    ({**chat_line(1), "custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
    (chat_line(0), "duplicate_custom_id", "custom_id"),
    ({**chat_line(1), "method": "GET"}, "invalid_method", "method"),
    ({**chat_line(1), "url": "/v1/completions"}, "mismatched_url", "url"),
    ({**chat_line(1), "body": []}, "invalid_body", "body"),
    (chat_line(1, stream=True), "invalid_body", "body.stream"),
    (chat_line(1, "x" * 20_000), "line_too_long", None),
    ('{"custom_id": "\\ud800"}\n', "invalid_json_line", None),
    ('{"a": NaN}\n', "invalid_json_line", None),
]


@pytest.mark.parametrize(("line", "code", "param"), FAULTS)
async def test_an_invalid_line_fails_the_batch_before_any_line_runs(
    sqlite: DatabaseOptions, line: object, code: str, param: str | None
) -> None:
    async with process(sqlite) as one:
        batch = await one.ended((await one.submit([chat_line(0), "\n", line])).id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        (fault,) = batch.errors.data
        assert (fault.code, fault.line, fault.param) == (code, 3, param)
        assert fault.message
        assert one.engine.requests == []


async def test_a_file_with_too_many_lines_or_none_fails_the_batch(sqlite: DatabaseOptions) -> None:
    async with process(sqlite, max_lines=3) as one:
        for lines, code in (([chat_line(n) for n in range(4)], "too_many_lines"), (["\n\n"], "empty_file")):
            batch = await one.ended((await one.submit(lines)).id)
            assert batch.status == "failed"
            assert batch.errors is not None
            assert batch.errors.data is not None
            assert [fault.code for fault in batch.errors.data] == [code]


async def test_a_line_that_was_refused_is_tried_until_it_is_answered(sqlite: DatabaseOptions) -> None:
    """Three tries end with an error that goes away; a fourth line fails three times and is an error in the output."""
    calls: dict[str, int] = {}

    def script(request: GenerationRequest) -> list[Step]:
        assert isinstance(request.prompt, ChatPrompt)
        text = request.prompt.messages[0].content
        calls[text] = calls.get(text, 0) + 1
        errors = {"busy": QueueFull("full", retry_after_s=0.1), "away": NotReady("loading"), "bad": InternalError("x")}
        if text in errors and (text == "bad" or calls[text] < 2):
            return [errors[text]]
        return [chunk(["ok"])]

    async with process(sqlite, ScriptedEngine(script)) as one:
        texts = ("busy", "away", "bad", "good")
        batch = await one.submit(chat_line(number, text) for number, text in enumerate(texts))
        batch = await one.ended(batch.id)
        assert calls == {"busy": 2, "away": 2, "bad": 3, "good": 1}
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 4, "completed": 3, "failed": 1}
        (failed,) = await one.lines(batch.error_file_id)
        assert failed["custom_id"] == "line-2"
        assert failed["response"]["status_code"] == 500
        assert failed["response"]["body"]["error"]["code"] == "internal_error"
        assert one.meter.outcomes == {"completed": 3, "failed": 1, "retried": 4}


async def test_a_cancelled_batch_keeps_the_results_that_it_has(database_options: DatabaseOptions) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        assert isinstance(request.prompt, ChatPrompt)
        return [chunk(["ok"]) if request.prompt.messages[0].content < "line 3" else None]

    async with process(database_options, ScriptedEngine(script), lines_in_flight=4) as one:
        batch = await one.submit([chat_line(n, f"line {n}") for n in range(9)])

        async def ask() -> Any:
            return await one.client.batches.retrieve(batch.id)

        await wait_for(ask, lambda found: found.request_counts.completed == 3)
        assert (await one.client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        ended = await one.ended(batch.id)
        assert ended.status == "cancelled"
        assert [line["custom_id"] for line in await one.lines(ended.output_file_id)] == ["line-0", "line-1", "line-2"]
        rest = await one.lines(ended.error_file_id)
        assert [line["custom_id"] for line in rest] == [f"line-{n}" for n in range(3, 9)]
        assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}
        assert (await one.client.batches.cancel(batch.id)).status == "cancelled"


async def test_a_batch_expires_after_its_window(database_options: DatabaseOptions) -> None:
    async with process(database_options, ScriptedEngine(lambda request: [None]), lines_in_flight=2) as one:
        batch = await one.submit([chat_line(n) for n in range(40)])
        await asyncio.wait_for(one.engine.reached.wait(), 5)
        one.clock.offset += 86_401
        ended = await one.ended(batch.id)
        assert (ended.status, ended.output_file_id) == ("expired", None)
        assert {line["error"]["code"] for line in await one.lines(ended.error_file_id)} == {"batch_expired"}
        assert ended.request_counts is not None
        assert ended.request_counts.to_dict() == {"total": 40, "completed": 0, "failed": 40}


async def test_two_ingresses_share_a_batch_and_do_no_line_twice(database_options: DatabaseOptions) -> None:
    slow: list[Step] = [0.005, chunk(["ok"])]
    async with (
        process(database_options, ScriptedEngine(lambda request: slow), "ingress-1") as one,
        process(database_options, ScriptedEngine(lambda request: slow), "ingress-2") as two,
    ):
        batch = await one.submit(chat_line(number) for number in range(400))
        ended = await two.ended(batch.id)
        assert ended.status == "completed"
        assert len(await two.lines(ended.output_file_id)) == 400
        assert len(one.engine.requests) + len(two.engine.requests) == 400
        assert min(len(one.engine.requests), len(two.engine.requests)) >= 32


async def test_lines_of_a_lost_ingress_are_run_by_another_one(database_options: DatabaseOptions) -> None:
    """The first ingress has answered some lines, and stands still with others; its lease ends."""

    def script(request: GenerationRequest) -> list[Step]:
        assert isinstance(request.prompt, ChatPrompt)
        return [chunk(["first"]) if int(request.prompt.messages[0].content.split()[1]) < 10 else None]

    async with process(database_options, ScriptedEngine(script), "lost", lines_in_flight=4) as lost:
        batch = await lost.submit(chat_line(number) for number in range(40))

        async def ask() -> Any:
            return await lost.client.batches.retrieve(batch.id)

        await wait_for(ask, lambda found: found.request_counts.completed == 10)
        for task in lost.worker._tasks:  # as if it were killed: it gives nothing back
            task.cancel()
        later = WallClock(offset=60)
        other = ScriptedEngine(lambda request: [chunk(["second"])])
        async with process(database_options, other, "other", later) as heir:
            ended = await heir.ended(batch.id)
            found = await heir.lines(ended.output_file_id)
        texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in found]
        assert texts == ["first"] * 10 + ["second"] * 30
        assert [line["custom_id"] for line in found] == [f"line-{number}" for number in range(40)]


async def test_few_lines_run_while_other_requests_are_there(sqlite: DatabaseOptions) -> None:
    """Half of the free places, and one line while requests wait."""
    engine = ScriptedEngine(lambda request: [0.01, chunk(["ok"])])
    async with process(sqlite, engine, lines_in_flight=64) as one:
        await one.ended((await one.submit(chat_line(number) for number in range(128))).id)
        assert engine.max_running == 32


class _Waited(ScriptedEngine):
    """An engine for which other requests wait."""

    def load(self, model: str) -> EngineLoad:
        return EngineLoad(self.running, 3, 64)


async def test_one_line_runs_while_other_requests_wait(sqlite: DatabaseOptions) -> None:
    engine = _Waited(lambda request: [0.01, chunk(["ok"])])
    async with process(sqlite, engine, lines_in_flight=64) as one:
        await one.ended((await one.submit(chat_line(number) for number in range(20))).id)
        assert engine.max_running == 1


async def test_a_busy_model_does_not_delay_the_batches_of_another_one(database_options: DatabaseOptions) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [None] if request.model == "small" else [chunk(["ok"])]

    async with process(database_options, ScriptedEngine(script), lines_in_flight=4) as one:
        await one.submit(chat_line(number) for number in range(64))
        other = await one.submit(chat_line(number, model="org/large") for number in range(64))
        assert (await one.ended(other.id)).status == "completed"


class _Tenant:
    """Middleware that takes the tenant from a header."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        name = headers.get(b"x-tenant", b"").decode()
        identity = Identity(name, f"key-of-{name}", frozenset(KeyScope))
        scope["state"] = {**scope.get("state", {}), "identity": identity}
        await self.app(scope, receive, send)


async def test_a_tenant_sees_only_its_own_files_and_batches(database_options: DatabaseOptions) -> None:
    async with process(database_options, middleware=[Middleware(_Tenant)]) as one:
        ours = one.client.with_options(default_headers={"x-tenant": "ours"})
        theirs = one.client.with_options(default_headers={"x-tenant": "theirs"})
        content = json.dumps(chat_line(0)).encode()
        file = await ours.files.create(file=("a.jsonl", content), purpose="batch")
        batch = await ours.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert (await one.ended(batch.id, "ours")).status == "completed"
        assert [(line.tenant, line.key) for line in one.engine.requests] == [("ours", "key-of-ours")]
        assert [one.id async for one in ours.files.list(purpose="batch")] == [file.id]
        assert [one.id async for one in theirs.files.list()] == []
        assert [one.id async for one in theirs.batches.list()] == []
        for ask in (
            lambda: theirs.files.retrieve(file.id),
            lambda: theirs.files.content(file.id),
            lambda: theirs.files.delete(file.id),
            lambda: theirs.batches.retrieve(batch.id),
            lambda: theirs.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await ask()
        with pytest.raises(openai.BadRequestError):
            await theirs.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


async def test_batches_are_listed_from_the_newest_in_pages(database_options: DatabaseOptions) -> None:
    async with process(database_options) as one:
        ids = [(await one.submit([chat_line(0)])).id for _ in range(5)]
        assert [batch.id async for batch in one.client.batches.list(limit=2)] == ids[::-1]
        page = await one.client.batches.list(limit=2, after=ids[2])
        assert [batch.id for batch in page.data] == [ids[1], ids[0]]
        with pytest.raises(openai.BadRequestError):
            await one.client.batches.list(after="batch_unknown")


async def test_a_tenant_has_a_limited_number_of_open_batches(database_options: DatabaseOptions) -> None:
    async with process(database_options, ScriptedEngine(lambda request: [None]), max_open_batches=2) as one:
        for _ in range(2):
            await one.submit([chat_line(0)])
        with pytest.raises(openai.RateLimitError) as refused:
            await one.submit([chat_line(0)])
        assert refused.value.response.headers["retry-after"]
