"""Attention over the slots of the KV cache, in the form of an attention function of transformers.

The unmodified modelling code sees all rows of a step as one sequence `[1, N]`. This module separates the rows again:
it writes the key and value of each row to the slot of the row's sequence, and each row attends to its own slot only.
The decode rows of adjacent slots are computed by one batched product, each prompt chunk by one call of SDPA.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from serve_app.engines.native.kv_cache import Copy, Trim
from serve_app.engines.native.rows import DecodeRun, PromptChunk, Rows

_LENGTH_STEP = 64
# Private pages can be released one by one, and the kernel reserves none before the first write.
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


@dataclass(slots=True)
class Layout:
    """Slot and position of each row of one step. All layers share the index tensors and masks, which are made once."""

    runs: tuple[DecodeRun, ...]
    chunks: tuple[PromptChunk, ...]
    slots: torch.Tensor
    positions: torch.Tensor
    _shared: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def cache_rows(self, heads: int, length: int) -> torch.Tensor:
        """Index `[N * heads]` of every row's heads in a cache viewed as `[slots * heads * length, dim]`."""
        key = ("rows", heads, length)
        if key not in self._shared:
            head = torch.arange(heads, device=self.slots.device)
            rows = (self.slots[:, None] * heads + head) * length + self.positions[:, None]
            self._shared[key] = rows.flatten()
        return self._shared[key]

    def decode_mask(self, run: DecodeRun, low: int, high: int, window: int | None) -> torch.Tensor:
        """Mask of the positions `low` to `high` that each row attends to: bool `[rows, 1, 1, high - low]`."""
        key = ("decode", run.first_row, low, high, window)
        if key not in self._shared:
            self._shared[key] = self._visible(list(run.positions), low, high, window)[:, None, None]
        return self._shared[key]

    def chunk_mask(self, chunk: PromptChunk, low: int, window: int | None) -> torch.Tensor:
        """Mask for the rows of a prompt chunk: bool `[count, start + count - low]`."""
        key = ("chunk", chunk.first_row, low, window)
        if key not in self._shared:
            end = chunk.start + chunk.count
            self._shared[key] = self._visible(list(range(chunk.start, end)), low, end, window)
        return self._shared[key]

    def _visible(self, positions: list[int], low: int, high: int, window: int | None) -> torch.Tensor:
        row = torch.tensor(positions, device=self.slots.device)[:, None]
        column = torch.arange(low, high, device=self.slots.device)
        visible = column <= row
        return visible if window is None else visible & (column > row - window)


class LayerCache:
    """Keys and values of one layer for all slots, each `[slots, heads, length, dim]`. Set `layout` before each step."""

    def __init__(
        self,
        slots: int,
        heads: int,
        length: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys, self._key_pages = _zeros((slots, heads, length, key_dim), dtype, device)
        self.values, self._value_pages = _zeros((slots, heads, length, value_dim), dtype, device)
        self.heads = heads
        self.length = length
        self.layout: Layout | None = None

    def apply(self, command: Copy | Trim) -> None:
        """Copy the first positions of one slot to another, or release the last positions of a slot."""
        if isinstance(command, Copy):
            for cache in (self.keys, self.values):
                cache[command.target, :, : command.count].copy_(cache[command.source, :, : command.count])
        else:
            _release_pages(self.keys, self._key_pages, command)
            _release_pages(self.values, self._value_pages, command)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        **extras: Any,
    ) -> torch.Tensor:
        """Query `[1, H, N, D]`, key and value `[1, KV, N, D]` -> `[1, N, H, Dv]`."""
        layout = self.layout
        assert layout is not None
        self._write(layout, key, value)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for run in layout.runs:
            rows = slice(run.first_row, run.first_row + len(run.positions))
            out[rows] = self._decode(layout, run, query[0, :, rows], scaling, window, **extras)
        for chunk in layout.chunks:
            rows = slice(chunk.first_row, chunk.first_row + chunk.count)
            out[rows] = self._prefill(layout, chunk, query[:, :, rows], scaling, window, **extras)
        return out[None]

    def _write(self, layout: Layout, key: torch.Tensor, value: torch.Tensor) -> None:
        index = layout.cache_rows(self.heads, self.length)
        for cache, rows in ((self.keys, key), (self.values, value)):
            dim = cache.shape[3]
            # A masked position has weight 0, but 0 * NaN is NaN: the cache must hold finite numbers only.
            flat = rows[0].transpose(0, 1).reshape(-1, dim).to(cache.dtype).nan_to_num()
            cache.view(-1, dim).index_copy_(0, index, flat)

    def _decode(
        self, layout: Layout, run: DecodeRun, query: torch.Tensor, scaling: float, window: int | None, **extras: Any
    ) -> torch.Tensor:
        """Query `[H, B, D]` -> `[B, H, Dv]`, by one batched product over adjacent slots."""
        high = min(self.length, _round_up(max(run.positions) + 1))
        low = 0 if window is None else max(0, min(run.positions) + 1 - window)
        slots = slice(run.first_slot, run.first_slot + len(run.positions))
        mask = layout.decode_mask(run, low, high, window)
        rows = query.transpose(0, 1)[:, :, None]
        return attend(rows, self.keys[slots, :, low:high], self.values[slots, :, low:high], mask, scaling, **extras)[
            :, 0
        ]

    def _prefill(
        self, layout: Layout, chunk: PromptChunk, query: torch.Tensor, scaling: float, window: int | None, **extras: Any
    ) -> torch.Tensor:
        """Query `[1, H, n, D]` -> `[n, H, Dv]`."""
        end = chunk.start + chunk.count
        low = 0 if window is None else max(0, chunk.start + 1 - window)
        slot = slice(chunk.slot, chunk.slot + 1)
        keys, values = self.keys[slot, :, low:end].to(query.dtype), self.values[slot, :, low:end].to(query.dtype)
        plain_causal = chunk.start == 0 and (window is None or end <= window)
        mask = None if plain_causal else layout.chunk_mask(chunk, low, window)
        if any(extra is not None for extra in extras.values()):
            causal = layout.chunk_mask(chunk, low, window)
            return attend(query, keys, values, causal, scaling, **extras)[0]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=plain_causal, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)


def _round_up(length: int) -> int:
    """Number of positions that a decode step reads. Few distinct lengths: torch prepares a product for each new one."""
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain attention of `[B, H, n, D]` over `[B, KV, L, D]` -> `[B, n, H, Dv]`, with the softmax in float32.

    The query heads that share a key-value head are computed by one product, which on CPU is several times faster than
    SDPA for n = 1. `softcap` bounds the scores (Gemma 2). `sinks` adds one learnt score per head to the softmax; the
    score has no value (gpt-oss).
    """
    batch, heads, count, dim = query.shape
    shared, length = keys.shape[1], keys.shape[2]
    grouped = (query * scaling).reshape(batch * shared, (heads // shared) * count, dim)
    keys = keys.reshape(batch * shared, length, dim).to(query.dtype)
    scores = torch.bmm(keys, grouped.transpose(1, 2)).transpose(1, 2).reshape(batch, heads, count, length).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, count, 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = weights.to(query.dtype).reshape(batch * shared, (heads // shared) * count, length)
    out = torch.bmm(weights, values.reshape(batch * shared, length, -1).to(query.dtype))
    return out.reshape(batch, heads, count, -1).transpose(1, 2)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, mmap.mmap | None]:
    """A zero tensor, and on CPU the pages that hold it.

    On CPU the pages take no memory before a sequence writes to them, whereas torch.zeros writes to all. Huge pages are
    off: with them the first token of a slot makes the kernel clear 2 MiB per layer.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device), None
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=_PRIVATE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape), pages


def _release_pages(cache: torch.Tensor, pages: mmap.mmap | None, command: Trim) -> None:
    """Release the whole pages behind the kept positions; they read as zeros afterwards. On a GPU this does nothing."""
    if pages is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    token_bytes = cache.stride(2) * cache.itemsize
    for head in cache[command.slot]:
        begin = head.storage_offset() * cache.itemsize
        first = -(-(begin + command.keep * token_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (begin + head.shape[0] * token_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            pages.madvise(mmap.MADV_DONTNEED, first, end - first)


class ShapeProbe:
    """Replaces a layer's cache for one pass and records the number and size of the layer's key-value heads."""

    def __init__(self) -> None:
        self.heads = self.key_dim = self.value_dim = 0
        self.window: int | None = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        **_: Any,
    ) -> torch.Tensor:
        self.window = window
        self.heads, self.key_dim, self.value_dim = key.shape[1], key.shape[3], value.shape[3]
        return query.new_zeros(1, query.shape[2], query.shape[1], self.value_dim)


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that may call the attention function: the modules with a layer index."""
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    cache: LayerCache | ShapeProbe = module.serve_app_cache  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(query, key, value, scale, sliding_window, softcap=softcap, sinks=s_aux), None


def layout_of(rows: Rows, device: torch.device) -> Layout:
    """The layout of a step's rows, with its index tensors on `device`."""
    slots, positions = torch.tensor(rows.slots, device=device), torch.tensor(rows.positions, device=device)
    return Layout(tuple(rows.runs), tuple(rows.chunks), slots, positions)
