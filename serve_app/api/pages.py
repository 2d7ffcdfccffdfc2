"""The playground: one page and its files, read once when the service starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parents[1] / "playground"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
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

HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for every time: a new release is seen at once
    "content-security-policy": "; ".join(f"{what} {whence}" for what, whence in POLICY.items()),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class File:
    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        etag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
        self._headers = {**HEADERS, "etag": etag}
        self._type = TYPES[path.suffix]

    def answer(self, http: Request) -> Response:
        known = http.headers.get("if-none-match", "")
        if self._headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers={**self._headers, "content-type": self._type})


class PageRoutes:
    def __init__(self) -> None:
        self._files = {path.name: File(path) for path in FOLDER.iterdir() if path.suffix in TYPES}
        self._index = self._files.pop("index.html")

    async def index(self, http: Request) -> Response:
        return self._index.answer(http)

    async def file(self, http: Request) -> Response:
        file = self._files.get(http.path_params["file"])
        if file is None:
            raise HTTPException(404)
        return file.answer(http)
