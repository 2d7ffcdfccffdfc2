"""Cross-origin resource sharing (CORS): lets web pages of configured origins call the service from a browser."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.rate_limits import ANTHROPIC_NAMES, OPENAI_NAMES
from serve_app.config import Cors

_METHODS = ("GET", "HEAD", "POST")
# Beside these headers, a page can read only `content-type` and a few others.
_EXPOSED = (
    *("x-request-id", "request-id", "x-variant", "retry-after", "retry-after-ms", "x-cache"),
    *OPENAI_NAMES,
    *ANTHROPIC_NAMES,
)


class AllowOrigins(CORSMiddleware):
    """Allows every header to the configured origins. Other origins get the answers of a service without CORS."""

    def __init__(self, app: ASGIApp, cors: Cors) -> None:
        super().__init__(
            app,
            allow_origins=cors.allow_origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=_EXPOSED,
            max_age=cors.max_age_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.is_allowed_origin(Headers(scope=scope).get("origin", "")):
            # Without an origin, Starlette adds only `vary`, for caches.
            await self.simple_response(scope, receive, send, request_headers=Headers())
            return
        await super().__call__(scope, receive, send)
