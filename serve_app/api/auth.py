"""Authentication of every HTTP call, and the scope that each route needs.

The check is in front of all routes and refuses by default: a call to a path that does not exist needs a key too. It
takes the path of the ASGI scope and the routes of the application, never a URL, in which the `Host` header takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope as AsgiScope, Send

from serve_app.api.error_handlers import ErrorHandlers
from serve_app.api.telemetry import ServiceTelemetry
from serve_app.core.tenants import Authenticator, CredentialsRefused, Identity, Scope
from serve_app.errors import InvalidApiKey, PermissionDenied, ServeAppError


class Public(Enum):
    """A route that needs no key: it says whether the service runs, or is a page without data."""

    PUBLIC = auto()


PUBLIC = Public.PUBLIC

# The scope that each route needs, by method and path; None is any valid key. A test fails for a route that is not here.
# Of the pages only the OpenAPI document has data: without a key it names no models.
POLICIES: dict[str, Scope | Public | None] = {
    "GET /health": PUBLIC,
    "GET /ready": PUBLIC,
    "GET /ping": PUBLIC,
    "GET /": PUBLIC,
    "GET /playground/{file}": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /docs/{file}": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /metrics": Scope.METRICS,
    "GET /load": Scope.METRICS,
    "GET /experiments": Scope.ADMIN,
    "POST /v1/load_lora_adapter": Scope.ADMIN,
    "POST /v1/unload_lora_adapter": Scope.ADMIN,
    "POST /": Scope.INFERENCE,
    "POST /generate": Scope.INFERENCE,
    "POST /generate_stream": Scope.INFERENCE,
    "POST /generate_batch": Scope.INFERENCE,
    "POST /v1/completions": Scope.INFERENCE,
    "POST /v1/chat/completions": Scope.INFERENCE,
    "POST /v1/responses": Scope.INFERENCE,
    "GET /v1/responses/{id}": Scope.INFERENCE,
    "DELETE /v1/responses/{id}": Scope.INFERENCE,
    "POST /v1/responses/{id}/cancel": Scope.INFERENCE,
    "GET /v1/responses/{id}/input_items": Scope.INFERENCE,
    "POST /v1/embeddings": Scope.INFERENCE,
    "GET /v1/files": Scope.INFERENCE,
    "POST /v1/files": Scope.INFERENCE,
    "GET /v1/files/{id}": Scope.INFERENCE,
    "DELETE /v1/files/{id}": Scope.INFERENCE,
    "GET /v1/files/{id}/content": Scope.INFERENCE,
    "GET /v1/batches": Scope.INFERENCE,
    "POST /v1/batches": Scope.INFERENCE,
    "GET /v1/batches/{id}": Scope.INFERENCE,
    "POST /v1/batches/{id}/cancel": Scope.INFERENCE,
    "POST /v1/messages": Scope.INFERENCE,
    "POST /v1/messages/count_tokens": Scope.INFERENCE,
    "POST /v1/feedback": Scope.INFERENCE,
    "GET /v1/usage": None,
    "GET /v1/models": Scope.INFERENCE,
    "GET /v1/models/{id:path}": Scope.INFERENCE,
    "POST /tokenize": Scope.INFERENCE,
    "POST /detokenize": Scope.INFERENCE,
    "GET /tokenizer_info": Scope.INFERENCE,
    "GET /info": Scope.INFERENCE,
    "GET /version": Scope.INFERENCE,
}

# The caller of a public route without a valid key.
UNIDENTIFIED = Identity("", "", frozenset(), frozenset())


class Authenticate:
    """Answers calls without a valid key, or with one that does not allow the route, with 401 or 403.

    Sets `identity` in the state of the request. A key can be in the header `authorization` as a bearer token, in
    `x-api-key`, or in both if they agree.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        routes: Sequence[Route],
        handlers: ErrorHandlers,
        telemetry: ServiceTelemetry,
    ) -> None:
        self.app = app
        self._authenticator = authenticator
        self._routes = routes
        self._handlers = handlers
        self._telemetry = telemetry

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope["state"]["identity"] = await self._identity(scope)
        except ServeAppError as error:
            response = await self._handlers.known(Request(scope), error)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _identity(self, scope: AsgiScope) -> Identity:
        """Raises InvalidApiKey, PermissionDenied, NotReady."""
        route = route_of(self._routes, scope)
        needed = policy_of(route, scope["method"])
        scope["route"] = route  # a refused call is counted under its route too
        try:
            identity = await self._authenticator.authenticate(credentials_of(Headers(scope=scope)))
        except CredentialsRefused as error:
            if needed is PUBLIC:
                return UNIDENTIFIED
            self._telemetry.auth_refused(error.reason)
            raise InvalidApiKey(error.message) from None
        except ServeAppError:
            if needed is PUBLIC:
                return UNIDENTIFIED
            self._telemetry.auth_refused("unavailable")
            raise
        if isinstance(needed, Scope) and needed not in identity.scopes:
            self._telemetry.auth_refused("scope")
            raise PermissionDenied(f"The key does not have the scope '{needed}', which this path needs.")
        return identity


def route_of(routes: Sequence[Route], scope: AsgiScope) -> Route | None:
    """The route that answers a call; None for a path or a method that does not exist."""
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


def policy_of(route: Route | None, method: str) -> Scope | Public | None:
    """What a call needs; None is any valid key."""
    if route is None:
        return None
    return POLICIES.get(f"{'GET' if method == 'HEAD' else method} {route.path}", Scope.ADMIN)


def credentials_of(headers: Headers) -> str:
    """The key of a call. Raises CredentialsRefused without one, and for two different ones."""
    given = {*map(_bearer, headers.getlist("authorization")), *headers.getlist("x-api-key")} - {""}
    if len(given) > 1:
        raise CredentialsRefused("conflict", "The request has several different API keys. Send one.")
    if not given:
        raise CredentialsRefused(
            "missing", "The request has no API key. Send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'."
        )
    return given.pop()


def _bearer(header: str) -> str:
    """The token of an `authorization` header, whose scheme is case-insensitive (RFC 9110, 11.1); "" if it has none."""
    scheme, _, token = header.partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""
