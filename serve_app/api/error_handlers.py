"""The error table: every exception becomes one ServeAppError, told in the dialect of the path and counted once."""

from __future__ import annotations

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from serve_app.api.gateway import Gateway
from serve_app.errors import InternalError, MethodNotAllowed, NotFound, ServeAppError

log = logging.getLogger(__name__)

# Whatever else is refused is the request's fault.
TGI_TYPES = {429: "overloaded", 503: "overloaded", 504: "incomplete_generation", 500: "generation"}


class ErrorHandlers:
    """Answers with an error before a response has begun. Starlette runs these only if they are coroutines."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def known(self, http: Request, error: Exception) -> Response:
        assert isinstance(error, ServeAppError)
        return self._answer(http, error)

    async def routing(self, http: Request, error: Exception) -> Response:
        """Starlette's own 404 and 405."""
        assert isinstance(error, HTTPException)
        path: str = http.scope["path"][:256]
        if error.status_code == 404:
            return self._answer(http, NotFound(f"there is no {path} here; see the README for the endpoints"))
        allowed = (error.headers or {})["Allow"]
        response = self._answer(http, MethodNotAllowed(f"{path} does not take {http.method}; use {allowed}"))
        response.headers["Allow"] = allowed
        return response

    async def unknown(self, http: Request, error: Exception) -> Response:
        return self._answer(http, opaque(error, http.state.request_id))

    def _answer(self, http: Request, error: ServeAppError) -> Response:
        self._gateway.refused(error, getattr(http.state, "model", None))
        request_id = http.state.request_id
        if getattr(http.state, "tgi", False):
            body: object = tgi_error(error)
        else:
            body = {"error": openai_error(error) if is_openai(http.scope) else native_error(error, request_id)}
        return JSONResponse(body, status_code=error.status, headers=retry_after(error))


def opaque(error: BaseException, id: str) -> InternalError:
    """What a caller learns of a fault of ours: the id under which the log has the rest."""
    log.error("request %s failed", id, exc_info=error)
    return InternalError(f"something went wrong on our side; quote request {id} when you report it")


def is_openai(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/v1" or path.startswith("/v1/")


def native_error(error: ServeAppError, request_id: str) -> dict[str, str | None]:
    return {"code": error.code, "message": error.message, "param": error.param, "request_id": request_id}


def openai_error(error: ServeAppError) -> dict[str, str | None]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def tgi_error(error: ServeAppError) -> dict[str, str]:
    """Text Generation Inference's shape, in the words that its clients know."""
    return {"error": error.message, "error_type": TGI_TYPES.get(error.status, "validation")}


def retry_after(error: ServeAppError) -> dict[str, str]:
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
