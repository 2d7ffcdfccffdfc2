"""What the tables of jobs hold, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.tenants import Identity


class Status(StrEnum):
    """The statuses of a batch, by OpenAI's names."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)


@dataclass(frozen=True, slots=True)
class File:
    """A file whose content is complete. `size` is in bytes, instants are in seconds since the epoch."""

    id: str
    tenant: str
    purpose: str
    filename: str
    size: int
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an input file was refused. `line` counts from 1; None for a fault of the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch. `completed` and `failed` are lines with a result; instants are in seconds since the epoch."""

    id: str
    identity: Identity
    endpoint: str
    input_file: str
    metadata: dict[str, str]
    status: Status
    created_at: float
    expires_at: float
    outcome: str = ""
    faults: tuple[Fault, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file: str | None = None
    error_file: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines of a batch's input: `lines` from number `first_line`, in `size` bytes from `offset`.

    Line numbers count from 0, without blank lines. `answered` are the lines that have a result.
    """

    batch_id: str
    number: int
    first_line: int
    lines: int
    offset: int
    size: int
    answered: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a line: `content` is the line of the output file, or of the error file if it `failed`."""

    batch_id: str
    chunk: int
    line: int
    failed: bool
    content: str
