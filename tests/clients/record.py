"""A proxy that records the requests of client libraries for tests/clients/test_fuzz.py.

`python -m tests.clients.record http://127.0.0.1:8000` listens on port 8001. Then run
`SERVE_APP_URL=http://127.0.0.1:8001 pytest tests/clients`, and stop the proxy with Ctrl-C: it writes one file for each
client library to tests/clients/requests, with the requests that the file had before. Requests that differ only in the
values of their fields are recorded once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

REQUESTS = Path(__file__).parent / "requests"
MAX_BYTES = 20_000
# Headers of one connection, which a proxy does not pass on.
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


def shape_of(value: Any) -> Any:
    """The names of all fields of a JSON value, without the values."""
    if isinstance(value, dict):
        return {name: shape_of(member) for name, member in sorted(value.items())}
    if isinstance(value, list):
        return [shape_of(member) for member in value]
    return type(value).__name__


def client_of(user_agent: str) -> str:
    """The name of the library in a `user-agent` header, for example `openai-python`."""
    if "hf_hub" in user_agent:
        return "huggingface-hub"
    words = re.findall(r"[A-Za-z][A-Za-z_-]*", user_agent.split(" (")[0])
    return "-".join(words[:2]).lower().removeprefix("async") or "unknown"


@dataclass
class Recorder:
    """Passes requests on to `service`, and keeps the bodies by client library and shape."""

    service: str
    bodies: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def keep(self, path: str, user_agent: str, content: bytes) -> None:
        if not content or len(content) > MAX_BYTES:
            return
        body = json.loads(content)
        shape = json.dumps([path, shape_of(body)])
        self.bodies.setdefault(client_of(user_agent), {}).setdefault(shape, {"path": path, "body": body})

    def read(self) -> None:
        """Begin with the requests of earlier recordings."""
        for file in REQUESTS.glob("*.json"):
            for request in json.loads(file.read_text()):
                shape = json.dumps([request["path"], shape_of(request["body"])])
                self.bodies.setdefault(file.stem, {}).setdefault(shape, request)

    def write(self) -> None:
        REQUESTS.mkdir(exist_ok=True)
        for client, shapes in self.bodies.items():
            lines = ",\n".join(json.dumps(request) for request in shapes.values())
            (REQUESTS / f"{client}.json").write_text(f"[\n{lines}\n]\n")

    def app(self) -> Starlette:
        route = Route("/{path:path}", self._forward, methods=["GET", "POST", "DELETE", "OPTIONS"])
        return Starlette(routes=[route], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.read()
        async with httpx.AsyncClient(base_url=self.service, timeout=None) as self._client:
            yield
        self.write()

    async def _forward(self, request: Request) -> StreamingResponse:
        content = await request.body()
        if request.method == "POST":
            self.keep(request.url.path, request.headers.get("user-agent", ""), content)
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        target = httpx.URL(path=request.url.path, query=request.url.query.encode())
        outgoing = self._client.build_request(request.method, target, headers=headers, content=content)
        answer = await self._client.send(outgoing, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, kept)


if __name__ == "__main__":
    uvicorn.run(Recorder(sys.argv[1]).app(), port=8001, log_level="warning")
