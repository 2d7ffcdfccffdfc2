"""Writes a replica's log as one JSON object per line, instead of Ray Serve's text.

Ray Serve's own JSON lines have local times, no logger name, and Ray's request id instead of the response's. Its filters
also add attributes to each record, so that a formatter must choose the fields and cannot write all of them.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import MemoryHandler

from serve_app.telemetry.http_spans import ids


def write_json(model: str, replica: str) -> None:
    """Write all records of Ray Serve's logger in this process as JSON, each one at once.

    By default Ray Serve buffers 1,000 lines, so that the log of an idle service can be hours late.
    """
    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(_add_ids)
        writer: logging.Handler | None = handler
        if isinstance(handler, MemoryHandler):
            handler.capacity, writer = 1, handler.target
        if writer is not None:
            writer.setFormatter(JsonLines(model, replica))


def _add_ids(record: logging.LogRecord) -> bool:
    """Add the ids of the current request. Must run in the thread or task that logs the record."""
    record.ids = ids()
    return True


class JsonLines(logging.Formatter):
    """Formats a record as a JSON object. `time` is RFC 3339 in UTC with milliseconds.

    The record's attribute `fields`, a dict, adds fields of its own. Empty fields are left out: the ids of a record
    outside requests, the model of an ingress.
    """

    def __init__(self, model: str, replica: str) -> None:
        super().__init__()
        self._process = {"model": model, "replica": replica}

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
            **getattr(record, "fields", {}),
            **self._process,
            "exception": self.formatException(record.exc_info) if record.exc_info else record.exc_text,
        }
        return json.dumps({name: value for name, value in line.items() if value not in (None, "")}, default=str)
