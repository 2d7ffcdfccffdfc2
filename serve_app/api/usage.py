"""The endpoint /v1/usage: the tokens and the cost of a tenant, as JSON or CSV."""

from __future__ import annotations

import time
from typing import Literal, NotRequired, cast

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from serve_app.api.responses import exact
from serve_app.core.tenants import ANYONE, Identity, Scope
from serve_app.core.usage import MOST_ROWS, UsageQuery, UsageReports
from serve_app.core.usage_report import groups_of, instant, month_begin, to_csv, with_cost
from serve_app.errors import InvalidRequest, NotFound

_PARAMETERS = ("from", "to", "group_by", "tenant", "key", "model", "format")
_CSV = "text/csv"
_LONGEST = 256


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
        shown = [with_cost(row) for row in rows]
        if as_csv:
            return Response(to_csv(shown, query.groups), media_type=_CSV)
        body: UsageReport = {"object": "list", "data": [cast(UsageRow, row) for row in shown]}
        return JSONResponse(body)


def query_of(parameters: QueryParams, identity: Identity) -> UsageQuery:
    """The query of a caller. Raises InvalidRequest."""
    for name in parameters:
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise InvalidRequest(f"Unknown parameter '{name[:64]}'. The parameters are: {known}.", param=name[:64])
    tenant = _name(parameters, "tenant")
    if Scope.ADMIN not in identity.scopes:
        if tenant not in (None, identity.tenant):
            raise InvalidRequest("Only a key with the scope 'admin' can read other tenants' usage.", param="tenant")
        tenant = identity.tenant
    begin, end = _instant(parameters, "from"), _instant(parameters, "to")
    try:
        groups = groups_of(parameters.get("group_by", "day")[:_LONGEST])
    except ValueError as error:
        raise InvalidRequest(f"{error}.", param="group_by") from None
    return UsageQuery(
        month_begin() if begin is None else begin,
        time.time() if end is None else end,
        tenant,
        _name(parameters, "key"),
        _name(parameters, "model"),
        groups,
    )


def _instant(parameters: QueryParams, name: str) -> float | None:
    try:
        return instant(parameters[name]) if name in parameters else None
    except (ValueError, OverflowError):
        message = f"Parameter '{name}' should be a date such as 2026-11-30, or seconds since 1970."
        raise InvalidRequest(message, param=name) from None


def _name(parameters: QueryParams, name: str) -> str | None:
    value = parameters.get(name)
    return None if value is None else value[:_LONGEST].replace("\0", "")


def wants_csv(http: Request) -> bool:
    """By the parameter `format`, else by the header `accept`. Raises InvalidRequest."""
    form = http.query_params.get("format")
    if form not in (None, "json", "csv"):
        raise InvalidRequest("Parameter 'format' should be 'json' or 'csv'.", param="format")
    return form == "csv" or (form is None and _CSV in http.headers.get("accept", ""))
