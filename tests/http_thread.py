"""Runs an ASGI application behind the middleware of Ray Serve's servers, in uvicorn in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from serve_app.deployments.http_server import middlewares


@contextmanager
def serving(app: ASGIApp, **options: Any) -> Iterator[int]:
    """The port. `options` are those of uvicorn."""
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=0, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
