"""OpenAI's endpoints for files: upload, list, read and delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from serve_app.api.experiments import identity_of
from serve_app.api.openai_batches.objects import DeletedFile, FileList, file_object
from serve_app.api.openai_batches.service import BatchService, limit_of, unknown_after
from serve_app.api.openai_batches.upload import Upload, read_upload
from serve_app.errors import BodyTooLarge, InvalidRequest, NotFound
from serve_app.jobs import files
from serve_app.jobs.records import File

_DEFAULT_LIMIT = _MAX_LIMIT = 10_000
# Uploads that are spooled to the disk at the same time. Others wait, and their bodies are not read meanwhile.
_UPLOADS = 4


class FileRoutes:
    def __init__(self, service: BatchService) -> None:
        self._service = service
        self._uploads = asyncio.Semaphore(_UPLOADS)

    async def files(self, http: Request) -> Response:
        """Upload a file, or list the files of the tenant."""
        return await (self._upload(http) if http.method == "POST" else self._list(http))

    async def file(self, http: Request) -> Response:
        """Describe a file, or delete it."""
        found = await self._find(http)
        if http.method != "DELETE":
            return JSONResponse(file_object(found))
        service = self._service
        if not await service.store.call(files.remove, found.tenant, found.id, service.clock()):
            raise InvalidRequest(
                f"File '{found.id}' is the input of a batch that has not ended. Cancel the batch first."
            )
        body: DeletedFile = {"id": found.id, "object": "file", "deleted": True}
        return JSONResponse(body)

    async def content(self, http: Request) -> Response:
        """The content of a file, part by part."""
        found = await self._find(http)
        name = quote(found.filename, safe="")  # RFC 6266: a header has no other characters than ASCII
        headers = {"content-length": str(found.size), "content-disposition": f"attachment; filename*=UTF-8''{name}"}
        return StreamingResponse(self._parts(found), headers=headers, media_type="application/octet-stream")

    async def _parts(self, file: File) -> AsyncIterator[bytes]:
        for number in range(-(-file.size // files.PART_BYTES)):
            part = await self._service.store.call(files.read_part, file.id, number)
            if part is None:
                raise RuntimeError(f"file {file.id} was deleted while it was read")
            yield part

    async def _upload(self, http: Request) -> Response:
        async with self._uploads:
            upload = await read_upload(http)
            try:
                return JSONResponse(file_object(await self._save(http, upload)))
            finally:
                with suppress(OSError):
                    await upload.file.close()

    async def _save(self, http: Request, upload: Upload) -> File:
        service, tenant = self._service, identity_of(http).tenant
        used, size = await service.store.call(files.total_size, tenant), upload.file.size or 0
        options = service.options
        if size > options.max_file_bytes:
            raise BodyTooLarge(f"The file is larger than {options.max_file_bytes} bytes. Divide it into several files.")
        if used + size > options.max_tenant_bytes:
            raise InvalidRequest(
                f"All files together would have {used + size} bytes, and the limit is {options.max_tenant_bytes}. "
                "Delete files that you no longer need.",
                param="file",
            )
        now = service.clock()
        expires_at = now + (upload.expires_after_s or options.retention_s)
        source = upload.file.file

        def pieces() -> Iterator[bytes]:
            while piece := source.read(files.PART_BYTES):
                yield piece

        return await service.store.call(files.save, tenant, upload.purpose, upload.filename, pieces(), now, expires_at)

    async def _list(self, http: Request) -> Response:
        limit, query = limit_of(http, _DEFAULT_LIMIT, _MAX_LIMIT), http.query_params
        order, after = query.get("order", "desc"), query.get("after")
        if order not in ("asc", "desc"):
            raise InvalidRequest("Parameter 'order' should be 'asc' or 'desc'.", param="order")
        service, tenant = self._service, identity_of(http).tenant
        now = service.clock()
        if after is not None and await service.store.call(files.find, tenant, after, now) is None:
            unknown_after(after)
        purpose = query.get("purpose")
        found = await service.store.call(files.page, tenant, purpose, after, limit + 1, order == "asc", now)
        data = [file_object(one) for one in found[:limit]]
        body: FileList = {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
        return JSONResponse(body)

    async def _find(self, http: Request) -> File:
        """The file that the path names. Raises NotFound."""
        service, file_id = self._service, http.path_params["id"]
        found = await service.store.call(files.find, identity_of(http).tenant, file_id, service.clock())
        if found is None:
            raise NotFound(f"File '{file_id[:64]}' does not exist, or has expired.")
        return found
