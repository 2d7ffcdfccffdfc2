"""Formats one server-sent event."""

from __future__ import annotations

import json

# These are legal inside JSON and SSE, but clients that split lines like Python's str.splitlines would break there.
_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

DONE = b"data: [DONE]\n\n"


def data(document: object) -> bytes:
    """One event without a name. JSON escapes every line break of SSE."""
    text = _JSON.encode(document)
    return f"data: {text if text.isascii() else text.translate(_LINE_BREAKS)}\n\n".encode()


def named(event: str, document: object) -> bytes:
    return f"event: {event}\n".encode() + data(document)


def comment(word: str) -> bytes:
    return f": {word}\n\n".encode()
