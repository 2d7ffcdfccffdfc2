"""OpenAI's endpoints for batches: create, list, read and cancel."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.body import read_document
from serve_app.api.experiments import identity_of
from serve_app.api.openai_batches.objects import BatchList, SubmitBody, batch_object
from serve_app.api.openai_batches.service import BatchService, limit_of, unknown_after
from serve_app.errors import InvalidRequest, NotFound, QueueFull
from serve_app.jobs import batches, files
from serve_app.jobs.records import Batch

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100
# About the time in which a batch of some hundred lines ends.
_RETRY_S = 60.0


class BatchRoutes:
    def __init__(self, service: BatchService) -> None:
        self._service = service

    async def batches(self, http: Request) -> Response:
        """Create a batch, or list the batches of the tenant."""
        return await (self._create(http) if http.method == "POST" else self._list(http))

    async def batch(self, http: Request) -> Response:
        tenant, batch_id = identity_of(http).tenant, http.path_params["id"]
        return JSONResponse(batch_object(_existing(await self._find(tenant, batch_id), batch_id)))

    async def cancel(self, http: Request) -> Response:
        service, batch_id = self._service, http.path_params["id"]
        found = await service.store.call(batches.cancel, identity_of(http).tenant, batch_id, service.clock())
        service.wake()
        return JSONResponse(batch_object(_existing(found, batch_id)))

    async def _create(self, http: Request) -> Response:
        body = SubmitBody.parse(await read_document(http))
        service, identity = self._service, identity_of(http)
        now, file_id = service.clock(), body.input_file_id
        file = await service.store.call(files.find, identity.tenant, file_id, now)
        if file is None or file.purpose != "batch":
            raise InvalidRequest(
                f"File '{file_id}' does not exist, has expired, or has another purpose than 'batch'. Upload the "
                "requests with POST /v1/files and purpose 'batch'.",
                param="input_file_id",
            )
        most = service.options.max_open_batches
        try:
            batch = await service.store.call(
                batches.create, identity, body.endpoint, file_id, body.metadata or {}, now, most
            )
        except batches.TooManyBatches:
            raise QueueFull(
                f"{most} batches have not ended, which is the limit. Wait until one has ended, or cancel one.",
                retry_after_s=_RETRY_S,
            ) from None
        service.wake()
        return JSONResponse(batch_object(batch))

    async def _list(self, http: Request) -> Response:
        limit, after = limit_of(http, _DEFAULT_LIMIT, _MAX_LIMIT), http.query_params.get("after")
        tenant = identity_of(http).tenant
        if after is not None and await self._find(tenant, after) is None:
            unknown_after(after)
        found = await self._service.store.call(batches.page, tenant, after, limit + 1)
        data = [batch_object(one) for one in found[:limit]]
        body: BatchList = {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
        return JSONResponse(body)

    async def _find(self, tenant: str, batch_id: str) -> Batch | None:
        return await self._service.store.call(batches.find, tenant, batch_id)


def _existing(batch: Batch | None, batch_id: str) -> Batch:
    """Raises NotFound."""
    if batch is None:
        raise NotFound(f"Batch '{batch_id[:64]}' does not exist.")
    return batch
