"""Shortens a conversation that is too long for the model by leaving out its oldest turns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from serve_app.api.openai_responses.conversation import Item

Count = Callable[[Sequence[Item]], Awaitable[int]]

# Messages that hold for the whole conversation.
_LASTING = ("system", "developer")


def room_for_answer(context: int, max_tokens: int | None) -> int:
    """The number of tokens that a shortened conversation leaves to the answer.

    This is the maximum of the answer, or a quarter of the context without one, and at most half of the context.
    """
    return min(max_tokens or context // 4, context // 2)


async def shorten(items: Sequence[Item], limit: int, count: Count) -> Sequence[Item]:
    """The conversation without its oldest turns, so that it has at most `limit` tokens if possible.

    A turn is a message of the user and everything up to the next one. System messages and the last turn are kept.
    `count` returns the number of tokens of a conversation.
    """
    if await count(items) <= limit:
        return items
    starts = [number for number, item in enumerate(items) if item.message.role == "user"]
    low, high = 1, len(starts) - 1  # the number of turns to leave out
    while low < high:
        middle = (low + high) // 2
        if await count(_without(items, starts[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return items if high < 1 else _without(items, starts[high])


def _without(items: Sequence[Item], end: int) -> list[Item]:
    """The items without those before number `end`, except the lasting ones."""
    return [item for number, item in enumerate(items) if number >= end or item.message.role in _LASTING]
