"""What the endpoints of files and batches use: the database, the limits, and the worker to wake."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from starlette.requests import Request

from serve_app.errors import InvalidRequest, NotFound
from serve_app.jobs_config import BatchOptions

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore


@dataclass(frozen=True, slots=True)
class BatchService:
    """`wake` tells the worker that a batch has changed. `clock` returns seconds since the epoch."""

    store: JobStore
    options: BatchOptions
    wake: Callable[[], None]
    clock: Callable[[], float] = time.time


def limit_of(http: Request, default: int, longest: int) -> int:
    """The query parameter `limit`. Raises InvalidRequest."""
    text = http.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= longest):
        raise InvalidRequest(f"Parameter 'limit' should be a number from 1 to {longest}.", param="limit")
    return int(text)


def unknown_after(after: str) -> NoReturn:
    raise InvalidRequest(f"Parameter 'after' names nothing in the list: '{after[:64]}'.", param="after")


async def disabled(http: Request) -> NoReturn:
    """Answers on the paths of files and batches if the configuration has no batches. Raises NotFound."""
    raise NotFound("This service has no batch jobs. Set batches: {} in its configuration to enable them.")
