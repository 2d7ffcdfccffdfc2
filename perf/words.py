"""Numbers and strangers' texts, as a page may show them."""

from __future__ import annotations

import math
import re

# What XML 1.0 has no place for, and HTML no use: control characters, halves of surrogate pairs, non-characters; and
# what turns the direction of the text that follows.
_UNPRINTABLE = re.compile("[^\t\n\r -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)


def short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def figure(value: float | None) -> str:
    """Three digits that count, all of those before the point, and a dash where nothing was measured."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if isinstance(value, int) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else None
    return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """Just under everything is not everything."""
    return "–" if share is None else f"{share * 100:.{2 if 0.995 <= share < 1 else 0}f} %"
