"""Keeps responses with their conversations in the memory of this process, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.api.openai_responses.conversation import Item
from serve_app.config import StoredResponses


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response of a tenant as JSON, and its conversation: `earlier` items, those of the `input`, and the `output`."""

    id: str
    body: bytes
    earlier: tuple[Item, ...]
    input: tuple[Item, ...]
    output: tuple[Item, ...]
    tenant: str = ""

    @property
    def read(self) -> tuple[Item, ...]:
        """The items of the conversation that the response answers, the oldest first."""
        return self.earlier + self.input

    @property
    def conversation(self) -> tuple[Item, ...]:
        return self.read + self.output

    @property
    def size(self) -> int:
        """About the memory in bytes. Earlier items count too, because they are kept as long as this response."""
        return len(self.body) + sum(item.size for item in self.conversation)


@dataclass(slots=True)
class _Entry:
    response: StoredResponse
    size: int
    used: float


class ResponseStore:
    """The stored responses by id. Beyond a limit, the least recently used response goes first.

    A response expires `ttl_s` after its last use. `clock` returns monotonic seconds. `report` gets the number of stored
    responses, their size in bytes, and the number of responses that a limit or their age has removed since the last
    report.
    """

    def __init__(
        self, limits: StoredResponses, clock: Callable[[], float], report: Callable[[int, int, int], None]
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._report = report
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the most recently used one is the last
        # The response of each item that is not an earlier one, by tenant and item: callers choose ids of input.
        self._owners: dict[tuple[str, str], str] = {}
        self._size = 0

    @property
    def enabled(self) -> bool:
        return self._limits.max_stored > 0

    def put(self, response: StoredResponse) -> None:
        """Store a response, unless it is larger than all responses together may be."""
        size = response.size
        if not self.enabled or size > self._limits.max_stored_bytes:
            return
        self._entries[response.id] = _Entry(response, size, self._clock())
        self._owners |= {(response.tenant, item.id): response.id for item in (*response.input, *response.output)}
        self._size += size
        self._remove_excess()

    def get(self, response_id: str, tenant: str) -> StoredResponse | None:
        """The stored response of the tenant, which counts as a use; None for that of another tenant."""
        self._remove_excess()
        entry = self._entries.get(response_id)
        if entry is None or entry.response.tenant != tenant:
            return None
        entry.used = self._clock()
        self._entries.move_to_end(response_id)
        return entry.response

    def item(self, item_id: str, tenant: str) -> Item | None:
        """The item of a stored response of the tenant, which counts as a use of the response."""
        response = self.get(self._owners.get((tenant, item_id), ""), tenant)
        items = () if response is None else (*response.input, *response.output)
        return next((item for item in items if item.id == item_id), None)

    def delete(self, response_id: str, tenant: str) -> bool:
        """Whether the response was stored for the tenant."""
        found = self.get(response_id, tenant) is not None
        if found:
            self._remove(response_id)
        self._remove_excess()
        return found

    def _remove_excess(self) -> None:
        """Remove what has expired or exceeds a limit, and report."""
        limits, oldest, removed = self._limits, self._clock() - self._limits.ttl_s, 0
        while self._entries:
            first = next(iter(self._entries))
            within = len(self._entries) <= limits.max_stored and self._size <= limits.max_stored_bytes
            if within and self._entries[first].used > oldest:
                break
            self._remove(first)
            removed += 1
        self._report(len(self._entries), self._size, removed)

    def _remove(self, response_id: str) -> None:
        entry = self._entries.pop(response_id)
        self._size -= entry.size
        for item in (*entry.response.input, *entry.response.output):
            owned = (entry.response.tenant, item.id)
            if self._owners.get(owned) == response_id:
                del self._owners[owned]
