"""The playground and the API reference, whose files are read once, when the service starts."""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api import openapi

PACKAGE = Path(__file__).parents[1]
PLAYGROUND, REFERENCE = PACKAGE / "playground", PACKAGE / "reference"
SWAGGER_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
# Swagger UI sets styles on its elements, and its style sheet has icons as data URLs.
REFERENCE_POLICY = {**POLICY, "style-src": "'self' 'unsafe-inline'", "img-src": "'self' data:"}


class File:
    """A file that does not change while the service runs.

    Its ETag is a hash of its content, which is the same on every replica.
    """

    def __init__(self, body: bytes, suffix: str, policy: dict[str, str] = POLICY) -> None:
        self._body = body
        self._headers = {
            "cache-control": "no-cache",  # cached, but revalidated every time, so that a new release is visible at once
            "content-security-policy": "; ".join(f"{directive} {sources}" for directive, sources in policy.items()),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        }
        self._type = TYPES[suffix]

    async def answer(self, http: Request) -> Response:
        known = http.headers.get("if-none-match", "")
        if self._headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers={**self._headers, "content-type": self._type})


class Folder:
    """A page and the files that it loads by name."""

    def __init__(self, paths: list[Path], policy: dict[str, str] = POLICY) -> None:
        self._files = {path.name: File(path.read_bytes(), path.suffix, policy) for path in paths}
        self._index = self._files.pop("index.html")

    async def index(self, http: Request) -> Response:
        return await self._index.answer(http)

    async def file(self, http: Request) -> Response:
        file = self._files.get(http.path_params["file"])
        if file is None:
            raise HTTPException(404)
        return await file.answer(http)


@cache
def playground() -> Folder:
    return Folder(_pages(PLAYGROUND))


@cache
def reference() -> Folder:
    """The API reference: Swagger UI from its Python package, of which only the static files are used."""
    package = find_spec("swagger_ui")
    assert package is not None, "swagger-ui-py is among the dependencies"
    assert package.submodule_search_locations
    static = Path(package.submodule_search_locations[0]) / "static"
    return Folder([*_pages(REFERENCE), *(static / name for name in SWAGGER_FILES)], REFERENCE_POLICY)


@lru_cache(16)  # keys can allow different models
def document(names: tuple[str, ...]) -> File:
    """The OpenAPI document of a service with these models and adapters. The first call for them takes 0.2 s."""
    return File(json.dumps(openapi.document(names)).encode(), ".json")


def _pages(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in TYPES]
