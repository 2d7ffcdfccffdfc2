"""Formats numbers and untrusted texts for reports."""

from __future__ import annotations

import math
import re

# Characters that XML 1.0 does not allow (control characters, surrogates, non-characters), and those that change the
# direction of the text after them.
_UNPRINTABLE = re.compile("[^\t\n\r -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Replaces unprintable characters by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def format_number(value: float | None) -> str:
    """Three significant digits, all digits before the decimal point, and a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if isinstance(value, int) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else None
    return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def format_percent(share: float | None) -> str:
    """Values from 99.5 % to below 100 % have two decimals, so that they are not shown as 100 %."""
    return "–" if share is None else f"{share * 100:.{2 if 0.995 <= share < 1 else 0}f} %"
