"""The closed list of errors that a caller can get. Each has one HTTP status; dialects encode it in their own form.

ServeAppError
├── InvalidRequest            422  a field of the request is wrong; `param` names it
├── PromptTooLong             422  the prompt does not fit into the model's context
├── PreviousResponseNotFound  422  the response that the request continues is not stored
├── InvalidApiKey             401  the API key or token is missing or not valid
├── PermissionDenied          403  the key does not allow this request
├── IdempotencyKeyReused      422  another request has used the same idempotency key
├── ModelNotFound             404  the service has no model of this name
├── NotFound                  404  the path or the object does not exist, or the model does not offer the path
├── MethodNotAllowed          405  the path exists, but not with this method
├── RequestTimeout            408  the body of the request did not arrive in time
├── BodyTooLarge              413  the body is larger than the limit
├── UnsupportedEncoding       415  the body is compressed in a way that the service cannot decode
├── QueueFull                 429  as many requests wait as the model takes
├── RateLimitExceeded         429  the key or its tenant has reached a limit a minute, or its concurrent requests
├── InsufficientQuota         429  the key or its tenant has used up a budget of a day or a month
├── NotReady                  503  no replica of the model can answer yet, or the server of the limits is away
├── DeadlineExceeded          504  the request used up its time
└── InternalError             500  a fault of the service; the caller gets the request id only
"""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class ServeAppError(Exception):
    """An error that a caller gets. All state is in `args`, so that it survives pickling between processes.

    `message` names the fault and a remedy. `param` is the path of the wrong field in the body. `retry_after_s` is the
    estimated time in seconds after which the request can succeed; None if a retry does not help.
    """

    status = 500
    code = "internal_error"

    def __init__(self, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param, retry_after_s)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidRequest(ServeAppError):
    status, code = 422, "invalid_request"


class PromptTooLong(ServeAppError):
    """`tokens` is the number of tokens of the prompt, and `maximum` the largest possible one; None if unknown.

    With `over_reservation` the prompt has more tokens than its `prompt_limit`. No caller gets such an error: the
    gateway reserves `tokens`, and sends the request again.
    """

    status, code = 422, "prompt_too_long"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        tokens: int | None = None,
        maximum: int | None = None,
        over_reservation: bool = False,
    ) -> None:
        super().__init__(message, param, retry_after_s)
        self.args = (*self.args, tokens, maximum, over_reservation)
        self.tokens = tokens
        self.maximum = maximum
        self.over_reservation = over_reservation


class PreviousResponseNotFound(ServeAppError):
    status, code = 422, "previous_response_not_found"


class IdempotencyKeyReused(ServeAppError):
    status, code = 422, "idempotency_key_reused"


class InvalidApiKey(ServeAppError):
    status, code = 401, "invalid_api_key"


class PermissionDenied(ServeAppError):
    status, code = 403, "permission_denied"


class ModelNotFound(ServeAppError):
    status, code = 404, "model_not_found"


class NotFound(ServeAppError):
    status, code = 404, "not_found"


class MethodNotAllowed(ServeAppError):
    status, code = 405, "method_not_allowed"


class RequestTimeout(ServeAppError):
    status, code = 408, "request_timeout"


class BodyTooLarge(ServeAppError):
    status, code = 413, "body_too_large"


class UnsupportedEncoding(ServeAppError):
    status, code = 415, "unsupported_encoding"


class QueueFull(ServeAppError):
    status, code = 429, "queue_full"


class RateLimitExceeded(ServeAppError):
    status, code = 429, "rate_limit_exceeded"


class InsufficientQuota(ServeAppError):
    status, code = 429, "insufficient_quota"


class NotReady(ServeAppError):
    status, code = 503, "not_ready"


class DeadlineExceeded(ServeAppError):
    status, code = 504, "deadline_exceeded"


class InternalError(ServeAppError):
    status, code = 500, "internal_error"


def internal_error(error: BaseException, request_id: str) -> InternalError:
    """The error that the caller gets in place of an unexpected exception, which is logged under the request id."""
    log.error("Request %s failed.", request_id, exc_info=error)
    return InternalError(f"The service failed on this request. Quote request {request_id} when you report the failure.")


def deadline_exceeded(timeout_s: float, what: str = "was not finished") -> DeadlineExceeded:
    """The error of a request that `what` by the end of its time, such as `was not finished`."""
    return DeadlineExceeded(f"The request {what} after {rounded_s(timeout_s)} s.")


def rounded_s(seconds: float) -> str:
    """Seconds for a message: whole ones from 10 s on."""
    return f"{seconds:.0f}" if seconds >= 10 else f"{max(0.0, seconds):.2g}"
