"""Maps every exception to one ServeAppError, counts it, and answers with it in the dialect of the path."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve_app.api.anthropic.responses import ANTHROPIC_ERRORS
from serve_app.api.native.responses import NATIVE_ERRORS
from serve_app.api.openai.responses import OPENAI_ERRORS
from serve_app.api.responses import ErrorFormat, retry_headers
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.api.tgi.responses import TGI_ERRORS
from serve_app.errors import (
    InvalidApiKey,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    ServeAppError,
    internal_error,
)

# The formats by the beginning of the path. The first beginning that matches decides.
_FORMATS = {"/v1/messages": ANTHROPIC_ERRORS, "/v1": OPENAI_ERRORS}


class ErrorHandlers:
    """Answers with an error before a response has begun. Starlette calls these only if they are coroutines."""

    def __init__(self, telemetry: ServiceTelemetry) -> None:
        self._telemetry = telemetry

    async def known(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, ServeAppError)
        return self._answer(http, error)

    async def routing(self, http: Request, error: Exception) -> Response:
        """Starlette's 404 and 405."""
        assert isinstance(error, HTTPException)
        path: str = http.scope["path"][:256]
        if error.status_code == 404:
            return self._answer(http, NotFound(f"Path {path} does not exist. GET /docs lists the endpoints."))
        allowed = (error.headers or {})["Allow"]
        response = self._answer(http, MethodNotAllowed(f"Path {path} does not take {http.method}. Use {allowed}."))
        response.headers["Allow"] = allowed
        return response

    async def unknown(self, http: Request, error: Exception) -> Response:
        return self._answer(http, internal_error(error, http.state.request_id))

    def count_unknown(self, http: Request, error: Exception) -> None:
        """Log and count an exception that can no longer be answered, because the response has begun."""
        self._count(http, internal_error(error, http.state.request_id))

    def _answer(self, http: Request, error: ServeAppError) -> Response:
        self._count(http, error)
        form = _format(http)
        body = form.body(error, http.state.request_id)
        return JSONResponse(body, status_code=form.status(error), headers=_headers(error))

    def _count(self, http: Request, error: ServeAppError) -> None:
        self._telemetry.refused(error, getattr(http.state, "model", None))


def _format(http: Request) -> ErrorFormat:
    if getattr(http.state, "tgi", False):
        return TGI_ERRORS
    path: str = http.scope["path"].removeprefix(http.scope.get("root_path", ""))
    formats = (form for begin, form in _FORMATS.items() if path == begin or path.startswith(begin + "/"))
    return next(formats, NATIVE_ERRORS)


def _headers(error: ServeAppError) -> dict[str, str]:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers |= retry_headers(error.retry_after_s)
    if isinstance(error, InvalidApiKey):  # RFC 6750, section 3
        headers["www-authenticate"] = 'Bearer realm="serve_app"'
    if isinstance(error, RequestTimeout):  # the rest of the body can still come, and is no request
        headers["connection"] = "close"
    return headers
