"""The time limits that a client sets for its call, in headers."""

from __future__ import annotations

import re

from starlette.requests import Request

from serve_app.errors import InvalidRequest

# The time from the arrival of the call to its end, and to the first token of each answer.
REQUEST_TIMEOUT, FIRST_TOKEN_TIMEOUT = "x-request-timeout-ms", "x-first-token-timeout-ms"
_MILLISECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,6})?")


def timeout_s(http: Request, header: str) -> float | None:
    """The seconds that a header gives, as milliseconds; None without it. Raises InvalidRequest for anything else."""
    given = http.headers.getlist(header)
    if not given:
        return None
    seconds = float(given[0]) / 1000 if len(given) == 1 and _MILLISECONDS.fullmatch(given[0]) else 0.0
    if seconds <= 0:
        raise InvalidRequest(f"{header} is one number of milliseconds above 0, such as 2500.", param=header)
    return seconds
