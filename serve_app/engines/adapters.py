"""Keeps the LoRA adapters that a replica used last in its memory, by the digest of their content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence as Seq
from typing import TYPE_CHECKING

from serve_app.core.requests import Adapter
from serve_app.errors import NotReady, QueueFull, ServeAppError

if TYPE_CHECKING:
    from serve_app.engines.stream import TokenStream

# Reads and loads the files of an adapter; the results are the digest of their content and the engine's weights.
Load = Callable[[Adapter], tuple[str, object]]


class LoadedAdapter:
    """An adapter in memory. `weights` are the engine's own; `users` is the number of requests that use it now."""

    __slots__ = ("_lock", "digest", "users", "weights")

    def __init__(self, digest: str, weights: object, lock: threading.Lock) -> None:
        self.digest = digest
        self.weights = weights
        self.users = 0
        self._lock = lock

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self.users -= 1


class AdapterCache:
    """At most `max_loaded` adapters; the least recently used one that no request uses makes room for a new one.

    `load` reads an adapter's files and raises ServeAppError; it runs on the caller's thread, for one adapter at a time.
    `drop` receives the weights that leave the cache. Every method may be called from any thread.
    """

    def __init__(self, max_loaded: int, load: Load, drop: Callable[[object], None] = lambda weights: None) -> None:
        self._max_loaded = max_loaded
        self._load = load
        self._drop = drop
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by digest, least recently used first
        self._digests: dict[tuple[str, str | None], str] = {}  # of each source, when its files were last read

    @property
    def loaded(self) -> tuple[str, ...]:
        """The digests of the adapters in memory, least recently used first."""
        with self._lock:
            return tuple(self._loaded)

    def preload(self, adapters: Seq[Adapter]) -> str | None:
        """Load the first `max_loaded` of the adapters; why one of them cannot be loaded, or None."""
        for adapter in adapters[: self._max_loaded]:
            result = self.reload(adapter)
            if isinstance(result, ServeAppError):
                return f"lora.adapters: {adapter.name}: {result.message}"
        return None

    def acquire_for(self, stream: TokenStream) -> ServeAppError | None:
        """Give the stream the adapter that its request names, until the stream is closed; or why it has none."""
        if stream.request.adapter is None:
            return None
        acquired = self.acquire(stream.request.adapter)
        if isinstance(acquired, ServeAppError):
            return acquired
        stream.adapter = acquired
        return None

    def acquire(self, adapter: Adapter) -> LoadedAdapter | ServeAppError:
        """The adapter, loaded if necessary, until `release`; or why it cannot be used now."""
        found = self._use(adapter)
        if found is not None:
            return found
        with self._loading:
            found = self._use(adapter)  # another thread may have loaded it
            if found is not None:
                return found
            try:
                return self._read(adapter, users=1)
            except QueueFull as error:
                return error
            except ServeAppError as error:
                return NotReady(f"Adapter {adapter.name!r} cannot be loaded: {error.message}")

    def reload(self, adapter: Adapter) -> str | ServeAppError:
        """The digest of the adapter's files as they are now, which are in memory afterwards; or why they are not."""
        with self._loading:
            try:
                return self._read(adapter, users=0).digest
            except ServeAppError as error:
                return error

    def _use(self, adapter: Adapter) -> LoadedAdapter | None:
        """The adapter if it is in memory, with one more user."""
        with self._lock:
            digest = adapter.digest or self._digests.get((adapter.source, adapter.revision))
            found = None if digest is None else self._loaded.get(digest)
            if digest is None or found is None:
                return None
            self._loaded.move_to_end(digest)
            found.users += 1
            return found

    def _read(self, adapter: Adapter, users: int) -> LoadedAdapter:
        """Raises ServeAppError."""
        digest, weights = self._load(adapter)
        if adapter.digest not in ("", digest):
            raise NotReady("its files were replaced after it was loaded; load it again with /v1/load_lora_adapter")
        with self._lock:
            self._digests[adapter.source, adapter.revision] = digest
            found = self._loaded.get(digest)
            if found is None:
                self._make_room()
                found = self._loaded[digest] = LoadedAdapter(digest, weights, self._lock)
            self._loaded.move_to_end(digest)
            found.users += users
            return found

    def _make_room(self) -> None:
        """Raises QueueFull if all adapters are in use."""
        if len(self._loaded) < self._max_loaded:
            return
        idle = next((digest for digest, loaded in self._loaded.items() if not loaded.users), None)
        if idle is None:
            raise QueueFull(
                f"All {self._max_loaded} adapters that a replica keeps in memory are in use. Try again later, or raise "
                "lora.max_loaded.",
                retry_after_s=1,
            )
        self._drop(self._loaded.pop(idle).weights)
