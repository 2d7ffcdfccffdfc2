"""Pages of the items of the conversation that a response answers."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import QueryParams

from serve_app.api.openai_responses.conversation import Item
from serve_app.api.openai_responses.objects import InputItemList
from serve_app.errors import InvalidRequest

MAX_LIMIT = 100
DEFAULT_LIMIT = 20


def page_of(items: Sequence[Item], query: QueryParams) -> InputItemList:
    """The page that the query parameters `limit`, `order` and `after` select. Raises InvalidRequest."""
    limit, ordered = _limit(query), _ordered(items, query)
    page, rest = ordered[:limit], ordered[limit:]
    return {
        "object": "list",
        "data": [item.shown for item in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": bool(rest),
    }


def _limit(query: QueryParams) -> int:
    text = query.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"Parameter 'limit' should be a number from 1 to {MAX_LIMIT}.", param="limit")
    return int(text)


def _ordered(items: Sequence[Item], query: QueryParams) -> Sequence[Item]:
    """The items in order, from the one after `after`; the newest item is the first by default."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("Parameter 'order' should be 'asc' or 'desc'.", param="order")
    ordered = items if order == "asc" else items[::-1]
    after = query.get("after")
    if after is None:
        return ordered
    ids = [item.id for item in ordered]
    if after not in ids:
        raise InvalidRequest(f"Parameter 'after' names no item of the list: '{after[:128]}'.", param="after")
    return ordered[ids.index(after) + 1 :]
