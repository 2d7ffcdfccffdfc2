"""Every error that a caller can meet. Mapped once to an HTTP status, and once to an in-band stream frame.

ServeAppError
├── InvalidRequest      422  a field is wrong; `param` names it
├── PromptTooLong       422  the prompt does not fit the model's context
├── ModelNotFound       404  no such model
├── NotFound            404  no such path, or one that this model is not switched on for
├── MethodNotAllowed    405  the path exists, the method does not
├── BodyTooLarge        413  the body is over the limit
├── QueueFull           429  too many requests wait already
├── NotReady            503  no replica can answer yet
├── DeadlineExceeded    504  the request used up its time
└── InternalError       500  ours; the caller learns the request id only
"""

from __future__ import annotations


class ServeAppError(Exception):
    """What a caller is told. All state is in `args`, so it survives pickling between processes.

    `message` says what was wrong and what would work; `param` names the offending field;
    `retry_after_s` is an honest estimate in seconds, or None when trying again would not help.
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
    status, code = 422, "prompt_too_long"


class ModelNotFound(ServeAppError):
    status, code = 404, "model_not_found"


class NotFound(ServeAppError):
    status, code = 404, "not_found"


class MethodNotAllowed(ServeAppError):
    status, code = 405, "method_not_allowed"


class BodyTooLarge(ServeAppError):
    status, code = 413, "body_too_large"


class QueueFull(ServeAppError):
    status, code = 429, "queue_full"


class NotReady(ServeAppError):
    status, code = 503, "not_ready"


class DeadlineExceeded(ServeAppError):
    status, code = 504, "deadline_exceeded"


class InternalError(ServeAppError):
    status, code = 500, "internal_error"
