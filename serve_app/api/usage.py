"""The endpoint /v1/usage: the tokens and the cost of a tenant, as JSON or CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isfinite
from typing import Any, Literal, NotRequired

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from serve_app.api.responses import exact
from serve_app.core.tenants import ANYONE, Identity, Scope
from serve_app.core.usage import COUNTS, MOST_ROWS, NANODOLLARS, Group, UsageQuery, UsageReports
from serve_app.errors import InvalidRequest, NotFound

_PARAMETERS = ("from", "to", "group_by", "tenant", "key", "model", "format")
_CSV = "text/csv"
_LONGEST = 256
# 9999-12-31, the last day that a date can have.
_LATEST_S = 253_402_300_799


@exact
class UsageRow(TypedDict):
    """The usage of one group. The fields that it is grouped by are there.

    `cached_tokens` are among the `prompt_tokens`, `reasoning_tokens` among the `output_tokens`.
    """

    hour: NotRequired[str]
    day: NotRequired[str]
    month: NotRequired[str]
    tenant: NotRequired[str]
    key: NotRequired[str]
    model: NotRequired[str]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_dollars: float


@exact
class UsageReport(TypedDict):
    object: Literal["list"]
    data: list[UsageRow]


class UsageRoutes:
    def __init__(self, reports: UsageReports | None) -> None:
        self._reports = reports

    async def usage(self, http: Request) -> Response:
        """The usage of the caller's own tenant; with the scope admin, of all tenants."""
        if self._reports is None:
            raise NotFound("The service keeps no usage, because it has no keys.")
        query = query_of(http.query_params, getattr(http.state, "identity", ANYONE))
        as_csv = wants_csv(http)
        rows = await self._reports.report(query)
        if len(rows) > MOST_ROWS:
            message = f"The report has more than {MOST_ROWS} rows. Ask for a shorter time, or for fewer groups."
            raise InvalidRequest(message, param="group_by")
        shown = list(map(shown_row, rows))
        if as_csv:
            return Response(to_csv(shown, query.groups), media_type=_CSV)
        body: UsageReport = {"object": "list", "data": shown}
        return JSONResponse(body)


def query_of(parameters: QueryParams, identity: Identity) -> UsageQuery:
    """The query of a caller. Raises InvalidRequest."""
    for name in parameters:
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise InvalidRequest(f"Unknown parameter '{name[:64]}'. The parameters are: {known}.", param=name[:64])
    tenant = parameters.get("tenant")
    if Scope.ADMIN not in identity.scopes:
        if tenant not in (None, identity.tenant):
            raise InvalidRequest("Only a key with the scope 'admin' can read other tenants' usage.", param="tenant")
        tenant = identity.tenant
    begin, end = instant(parameters.get("from"), "from"), instant(parameters.get("to"), "to")
    if begin is None:
        now = datetime.now(UTC)
        begin = datetime(now.year, now.month, 1, tzinfo=UTC).timestamp()
    end = time.time() if end is None else end
    key, model = (_name(parameters, name) for name in ("key", "model"))
    return UsageQuery(
        begin, end, tenant and tenant[:_LONGEST], key, model, groups_of(parameters.get("group_by", "day"))
    )


def groups_of(text: str) -> tuple[Group, ...]:
    """The groups of a list with commas, each once. Raises InvalidRequest."""
    names = [name.strip() for name in text[:_LONGEST].split(",") if name.strip()]
    known = [group.value for group in Group]
    for name in names:
        if name not in known:
            raise InvalidRequest(f"'{name[:64]}' is not one of {', '.join(known)}.", param="group_by")
    return tuple(dict.fromkeys(map(Group, names)))


def instant(text: str | None, name: str) -> float | None:
    """An instant from a date, a date with a time (ISO 8601, UTC by default), or seconds since 1970.

    Raises InvalidRequest.
    """
    if text is None:
        return None
    try:
        seconds = float(text) if text.replace(".", "", 1).isdecimal() and text.isascii() else _from_date(text)
        if isfinite(seconds) and 0 <= seconds <= _LATEST_S:
            return seconds
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"Parameter '{name}' should be a date such as 2026-11-30, or seconds since 1970.", param=name)


def _from_date(text: str) -> float:
    at = datetime.fromisoformat(text)
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()


def _name(parameters: QueryParams, name: str) -> str | None:
    value = parameters.get(name)
    return None if value is None else value[:_LONGEST].replace("\0", "")


def wants_csv(http: Request) -> bool:
    """By the parameter `format`, else by the header `accept`. Raises InvalidRequest."""
    form = http.query_params.get("format")
    if form not in (None, "json", "csv"):
        raise InvalidRequest("Parameter 'format' should be 'json' or 'csv'.", param="format")
    return form == "csv" or (form is None and _CSV in http.headers.get("accept", ""))


def shown_row(row: dict[str, Any]) -> UsageRow:
    """The row of a report with its cost in dollars."""
    dollars = row["nanodollars"] / NANODOLLARS
    return {**{name: value for name, value in row.items() if name != "nanodollars"}, "cost_dollars": dollars}  # type: ignore[typeddict-item]


def to_csv(rows: Sequence[UsageRow], groups: Sequence[Group]) -> str:
    """The rows by RFC 4180, with a header. A cost has nine digits after the point."""
    columns = [*(group.value for group in groups), *COUNTS[:-1], "cost_dollars"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        values: dict[str, Any] = {**row, "cost_dollars": f"{row['cost_dollars']:.9f}"}
        writer.writerow([values[column] for column in columns])
    return text.getvalue()
