"""Serves the HTTP application over a scripted engine at a port of this machine, for clients that need a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn

from serve_app.api.app import create_app
from serve_app.core.tenants import Authenticator

from .scripted import ScriptedEngine, ScriptedTelemetry, app_config


@asynccontextmanager
async def served(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, authenticator: Authenticator | None = None, **limits: Any
) -> AsyncIterator[str]:
    """The URL of the application."""
    app = create_app(engine, telemetry, app_config(**limits), authenticator=authenticator)
    config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task
