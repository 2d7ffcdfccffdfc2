"""The objects of OpenAI's files and batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from serve_app.api.batch_lines import ENDPOINTS
from serve_app.api.responses import exact
from serve_app.api.schema import Body
from serve_app.jobs.records import Batch, Fault, File, Status

assert ENDPOINTS == ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
StatusName = Literal[
    "validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled"
]
_Lifetime = Annotated[int, Field(ge=3600, le=2_592_000)]
_MAX_PAIRS = 16
_Name = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class SubmitBody(Body):
    input_file_id: Annotated[str, Field(min_length=1, max_length=64)]
    """The id of an uploaded file with the purpose `batch`, which has one request in each line."""
    endpoint: Endpoint
    """The endpoint of all lines."""
    completion_window: Literal["24h"]
    """The time in which the batch ends. Lines that have not been run by then are in the file of errors."""
    metadata: Annotated[dict[_Name, _Value], Field(max_length=_MAX_PAIRS)] | None = None
    """Up to 16 pairs of texts, which are returned with the batch."""


class UploadForm(Body):
    """The fields of an upload, as the document describes them; `upload.py` reads them."""

    file: bytes
    """The content of the file."""
    purpose: Literal["batch"]
    """What the file is for."""
    expires_after_anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    """The instant from which `expires_after[seconds]` counts."""
    expires_after_seconds: Annotated[_Lifetime | None, Field(alias="expires_after[seconds]")] = None
    """The time after which the file expires. The default is the limit of the configuration."""


@exact
class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


@exact
class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@exact
class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


@exact
class BatchFault(TypedDict):
    """`line` is the line of the input file, which counts from 1; null for a fault of the whole file."""

    code: str
    message: str
    line: int | None
    param: str | None


@exact
class BatchFaults(TypedDict):
    object: Literal["list"]
    data: list[BatchFault]


@exact
class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


@exact
class BatchObject(TypedDict):
    """Instants are in seconds since the epoch; null if they have not come."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: StatusName
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str]


@exact
class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(file: File) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def batch_object(batch: Batch) -> BatchObject:
    def ended(status: Status) -> int | None:
        return _seconds(batch.ended_at) if batch.status is status else None

    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": [_fault(fault) for fault in batch.faults]} if batch.faults else None,
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.status.value,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": int(batch.created_at),
        "in_progress_at": _seconds(batch.in_progress_at),
        "expires_at": int(batch.expires_at),
        "finalizing_at": _seconds(batch.finalizing_at),
        "completed_at": ended(Status.COMPLETED),
        "failed_at": ended(Status.FAILED),
        "expired_at": ended(Status.EXPIRED),
        "cancelling_at": _seconds(batch.cancelling_at),
        "cancelled_at": ended(Status.CANCELLED),
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }


def _seconds(instant: float | None) -> int | None:
    return None if instant is None else int(instant)


def _fault(fault: Fault) -> BatchFault:
    return {"code": fault.code, "message": fault.message, "line": fault.line, "param": fault.param}
