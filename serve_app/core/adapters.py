"""The LoRA adapters of all models by their names: those of the configuration, and changes at run time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from serve_app.core.requests import Adapter

# An unloaded adapter is remembered for longer than any report of it can be under way.
_KEEP_REMOVED_NS = 600 * 10**9
# The most adapters that are loaded at run time. Every ingress sends all of them in each of its reports.
MAX_CHANGES = 1000


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """An adapter of `model` that was loaded at run time, or unloaded (`adapter` None), at `at` (ns since 1970)."""

    name: str
    model: str
    adapter: Adapter | None
    at: int


@dataclass(frozen=True, slots=True)
class ListedAdapter:
    """An adapter and the name of its base model."""

    model: str
    adapter: Adapter


class AdapterDirectory:
    """The adapters that requests can name. Ingresses exchange their `changes`; of two for one name the later counts."""

    def __init__(self, configured: Mapping[str, Iterable[Adapter]], clock: Callable[[], int] = time.time_ns) -> None:
        """`configured` are the adapters of each model."""
        self._clock = clock
        self._configured = {
            adapter.name: ListedAdapter(model, adapter)
            for model, adapters in configured.items()
            for adapter in adapters
        }
        self._changes: dict[str, AdapterChange] = {}

    @property
    def changes(self) -> tuple[AdapterChange, ...]:
        self._forget()
        return tuple(self._changes.values())

    @property
    def full(self) -> bool:
        return len(self._changes) >= MAX_CHANGES

    def find(self, name: str) -> ListedAdapter | None:
        change = self._changes.get(name)
        if change is None:
            return self._configured.get(name)
        return None if change.adapter is None else ListedAdapter(change.model, change.adapter)

    def all(self) -> list[ListedAdapter]:
        names = dict.fromkeys((*self._configured, *self._changes))
        return [found for name in names if (found := self.find(name)) is not None]

    def load(self, model: str, adapter: Adapter) -> None:
        """List an adapter of a model, in place of one with its name."""
        self._change(adapter.name, model, adapter)

    def unload(self, name: str) -> None:
        """Remove a listed adapter."""
        found = self.find(name)
        assert found is not None, "only a listed adapter can be removed"
        self._change(name, found.model, None)

    def merge(self, changes: Iterable[AdapterChange]) -> None:
        """Take in the changes of another directory. The order does not matter."""
        for change in changes:
            known = self._changes.get(change.name)
            if known is None or _rank(change) > _rank(known):
                self._changes[change.name] = change
        self._forget()

    def _change(self, name: str, model: str, adapter: Adapter | None) -> None:
        known = self._changes.get(name)
        at = max(self._clock(), known.at + 1 if known else 0)  # the clocks of two ingresses can differ
        self._changes[name] = AdapterChange(name, model, adapter, at)

    def _forget(self) -> None:
        oldest = self._clock() - _KEEP_REMOVED_NS
        for change in list(self._changes.values()):
            if change.adapter is None and change.at < oldest and change.name not in self._configured:
                del self._changes[change.name]


def _rank(change: AdapterChange) -> tuple[int, str]:
    return change.at, "" if change.adapter is None else change.adapter.digest
