"""The answers to requests with an idempotency key, and where they are kept: here, in the memory of this process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from serve_app.errors import IdempotencyKeyReused
from serve_app.jobs_config import IdempotencyOptions


@dataclass(frozen=True, slots=True)
class Place:
    """A key of a tenant."""

    tenant: str
    key: str


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as the client gets it. `headers` are pairs of texts."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def size(self) -> int:
        return len(self.body) + sum(len(name) + len(value) for name, value in self.headers)


class AnswerStore(Protocol):
    """Keeps answers by place. A request with another fingerprint than the first one of a place is refused.

    Each `claim` that returns None is followed by one `keep` or `give_up`.
    """

    async def claim(self, place: Place, fingerprint: bytes) -> KeptAnswer | None:
        """The answer of a place; None if the caller has to compute it.

        Waits while another process computes it. Raises IdempotencyKeyReused, NotReady.
        """
        ...

    async def keep(self, place: Place, fingerprint: bytes, answer: KeptAnswer) -> None:
        """The answer of a place, which was computed. Raises NotReady."""
        ...

    async def give_up(self, place: Place) -> None:
        """There is no answer to keep: the next request computes it. Raises NotReady."""
        ...

    async def close(self) -> None: ...


def reused(place: Place) -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        f"The idempotency key {place.key[:64]!r} was used for another request. Use a new key for each request; send it "
        "again only with the same path and the same body."
    )


@dataclass(slots=True)
class _Entry:
    fingerprint: bytes
    answer: KeptAnswer
    expires_at: float


class AnswerMemory:
    """An AnswerStore in this process. Beyond a limit, the oldest answer goes first. `clock` returns seconds.

    `report` gets the size of all answers in bytes.
    """

    def __init__(self, options: IdempotencyOptions, clock: Callable[[], float], report: Callable[[int], None]) -> None:
        self._options = options
        self._clock = clock
        self._report = report
        self._entries: OrderedDict[Place, _Entry] = OrderedDict()
        self._size = 0

    async def claim(self, place: Place, fingerprint: bytes) -> KeptAnswer | None:
        self._remove_excess()
        entry = self._entries.get(place)
        if entry is None:
            return None
        if entry.fingerprint != fingerprint:
            raise reused(place)
        return entry.answer

    async def keep(self, place: Place, fingerprint: bytes, answer: KeptAnswer) -> None:
        self._remove(place)
        self._entries[place] = _Entry(fingerprint, answer, self._clock() + self._options.ttl_s)
        self._size += answer.size
        self._remove_excess()

    async def give_up(self, place: Place) -> None:
        """Nothing was kept."""

    async def close(self) -> None:
        self._entries.clear()

    def _remove_excess(self) -> None:
        options, now = self._options, self._clock()
        while self._entries:
            first = next(iter(self._entries))
            within = len(self._entries) <= options.max_kept and self._size <= options.max_kept_bytes
            if within and self._entries[first].expires_at > now:
                break
            self._remove(first)
        self._report(self._size)

    def _remove(self, place: Place) -> None:
        entry = self._entries.pop(place, None)
        self._size -= entry.answer.size if entry else 0
