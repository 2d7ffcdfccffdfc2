"""The answers of the native endpoints, as typed dictionaries."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from serve_app.api.responses import ErrorFormat, Metrics, Usage, exact
from serve_app.core.events import FinishReason
from serve_app.errors import ServeAppError


@exact
class NativeToken(TypedDict):
    token_id: int
    token: str
    logprob: float


class NativeLogprobs(NativeToken):
    """The chosen token, and the most likely tokens at its place."""

    top: list[NativeToken]


@exact
class NativeErrorDetails(TypedDict):
    """`param` is the path of the wrong field. The service's log has the cause under `request_id`."""

    code: str
    message: str
    param: str | None
    request_id: str


@exact
class NativeError(TypedDict):
    error: NativeErrorDetails


@exact
class NativeAnswer(TypedDict):
    """`logprobs` is present if the request has `logprobs`."""

    id: str
    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    metrics: Metrics
    logprobs: NotRequired[list[NativeLogprobs]]


@exact
class NativeEvent(TypedDict):
    """One token, and in `text` the whole text so far. The last event has `finish_reason` and `usage`."""

    token: str
    text: NotRequired[str]
    finished: bool
    metrics: Metrics
    logprobs: NotRequired[NativeLogprobs | None]
    finish_reason: NotRequired[FinishReason]
    usage: NotRequired[Usage]


@exact
class NativeErrorEvent(TypedDict):
    error: NativeErrorDetails
    finished: Literal[True]


class BatchAnswer(NativeAnswer):
    """The answer to one item; `index` is its place in the call."""

    index: int


@exact
class BatchError(TypedDict):
    """The error of one item; `index` is its place in the call."""

    index: int
    error: NativeErrorDetails


@exact
class BatchMetrics(TypedDict):
    elapsed_ms: float
    tokens_per_second: float


@exact
class BatchAnswers(TypedDict):
    """One result for each item, in the order of the call. `usage` and `metrics` are of all items."""

    results: list[BatchAnswer | BatchError]
    usage: Usage
    metrics: BatchMetrics


def native_error(error: ServeAppError, request_id: str) -> NativeError:
    return {
        "error": {"code": error.code, "message": error.message, "param": error.param, "request_id": request_id},
    }


NATIVE_ERRORS = ErrorFormat(native_error)
