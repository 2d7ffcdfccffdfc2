"""Files by OpenAI's official client, and uploads that are not what they should be."""

from __future__ import annotations

import os
from typing import Any

import openai
import pytest

from serve_app.database_config import DatabaseOptions
from serve_app.jobs import files
from tests.api.scripted import ScriptedEngine

from .service import chat_line, process


async def test_a_file_is_read_as_it_was_uploaded(database_options: DatabaseOptions) -> None:
    content = os.urandom(3 * files.PART_BYTES + 17)
    async with process(database_options) as one:
        file = await one.client.files.create(
            file=("größe 文/../x.jsonl", content),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert (file.object, file.bytes, file.purpose, file.status) == ("file", len(content), "batch", "processed")
        assert "/" not in file.filename
        assert file.expires_at == file.created_at + 3600
        assert (await one.client.files.content(file.id)).content == content
        assert (await one.client.files.retrieve(file.id)).to_dict() == file.to_dict()
        assert (await one.client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await one.client.files.content(file.id)


async def test_files_are_listed_in_pages(database_options: DatabaseOptions) -> None:
    async with process(database_options) as one:
        ids = [await one.upload([chat_line(0)]) for _ in range(5)]
        assert [file.id async for file in one.client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in one.client.files.list(limit=2, order="asc")] == ids
        assert [file.id async for file in one.client.files.list(purpose="vision")] == []
        for query in ("limit=0", "limit=x", "order=up", "after=file-x"):
            assert (await one.http.get(f"/v1/files?{query}")).status_code == 400


async def test_a_file_that_expires_is_gone_unless_a_batch_reads_it(database_options: DatabaseOptions) -> None:
    async with process(database_options, ScriptedEngine(lambda request: [None]), retention_s=3600) as one:
        idle = await one.upload([chat_line(0)])
        batch = await one.submit([chat_line(0)])
        with pytest.raises(openai.BadRequestError, match="has not ended"):
            await one.client.files.delete(batch.input_file_id)
        one.clock.offset += 3601
        await one.worker._sweep()
        with pytest.raises(openai.NotFoundError):
            await one.client.files.retrieve(idle)
        await one.client.batches.cancel(batch.id)
        assert (await one.ended(batch.id)).status == "cancelled"
        one.clock.offset += 3601
        await one.worker._sweep()
        with pytest.raises(openai.NotFoundError):
            await one.client.batches.retrieve(batch.id)


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        (FORM, b""),
        (FORM, b"garbage"),
        (FORM, PART % (b"purpose", b"", b"batch") + b"--x--\r\n"),
        (FORM, PART % (b"file", b'; filename="a"', b"{}") + b"--x--\r\n"),
        (FORM, PART % (b"file", b'; filename="a"', b"{}") + PART % (b"purpose", b"", b"vision") + b"--x--\r\n"),
        (FORM, PART % (b"file", b'; filename="a"', b"{}") * 2 + b"--x--\r\n"),
        (FORM, PART % (b"file", b'; filename="a"', b"{}") + PART % (b"purpose", b"", b"x" * 5000) + b"--x--\r\n"),
        (FORM, PART % (b"purpose", b"", b"batch") * 20 + b"--x--\r\n"),
        (FORM, b"--x\r\n" + b"a" * 40_000),
        (FORM, b"--x\r\ncontent-disposition: form-data\r\n\r\n\r\n--x--\r\n"),
    ],
)
async def test_a_body_that_is_no_upload_is_refused(sqlite: DatabaseOptions, content_type: str, body: bytes) -> None:
    async with process(sqlite) as one:
        answer = await one.http.post("/v1/files", content=body, headers={"content-type": content_type})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        assert (await one.http.get("/v1/files")).json()["data"] == []


async def test_files_have_limits_each_and_in_total(sqlite: DatabaseOptions) -> None:
    options: dict[str, Any] = {"max_file_bytes": 100_000, "max_tenant_bytes": 150_000}
    async with process(sqlite, **options) as one:
        with pytest.raises(openai.APIStatusError) as refused:
            await one.upload(["x" * 100_001])
        assert refused.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as refused:
            await one.upload(["x" * 200_000])
        assert refused.value.status_code == 413
        await one.upload(["x" * 100_000])
        with pytest.raises(openai.BadRequestError, match="150000"):
            await one.upload(["x" * 100_000])
