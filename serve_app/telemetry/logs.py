"""A replica's log as one JSON object a line, in place of Ray Serve's text.

Ray Serve has JSON lines too, but with local times, without the logger's name, and with the request id that it knows
rather than the one that the caller is told.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import MemoryHandler

from serve_app.telemetry.http_spans import ids


def write_json(model: str, replica: str) -> None:
    """Have whatever this process logs through Ray Serve's logger, as the records of ours do, written as JSON.

    At once: for throughput Ray keeps lines back until a thousand are there, so that a quiet service says nothing.
    """
    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(_stamp)
        writer: logging.Handler | None = handler
        if isinstance(handler, MemoryHandler):
            handler.capacity, writer = 1, handler.target
        if writer is not None:
            writer.setFormatter(JsonLines(model, replica))


def _stamp(record: logging.LogRecord) -> bool:
    """Where it is logged: by the time it is written, another request may be under way."""
    record.ids = ids()
    return True


class JsonLines(logging.Formatter):
    """`time` is RFC 3339 in UTC. What a record has not is left out: ids outside requests, a model at an ingress."""

    def __init__(self, model: str, replica: str) -> None:
        super().__init__()
        self._about = {"model": model, "replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
            **getattr(record, "told", {}),
            **self._about,
            "exception": self.formatException(record.exc_info) if record.exc_info else record.exc_text,
        }
        return json.dumps({name: value for name, value in line.items() if value not in (None, "")}, default=str)
