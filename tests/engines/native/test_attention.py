"""Attention over the slots of the cache, compared with one sequence at a time in plain loops."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.engines.native.attention import (
    LayerCache,
    ShapeProbe,
    attention_modules,
    layout_of,
)
from serve_app.engines.native.kv_cache import Copy, Trim
from serve_app.engines.native.rows import DecodeRun, PromptChunk, Rows, span

pytestmark = pytest.mark.model

CPU = torch.device("cpu")
SLOTS, LENGTH, KEY_DIM, VALUE_DIM = 5, 24, 8, 6
SCALING = 0.4


def expected(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one row `[H, D]` over its own sequence, head by head: `[H, Dv]`."""
    seen = slice(max(0, len(keys) - window) if window else 0, None)
    out = []
    for head, q in enumerate(query):
        shared = head * keys[0].shape[0] // query.shape[0]
        scores = torch.stack([q @ key[shared] for key in keys[seen]]) * SCALING
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        sink = torch.zeros(0) if sinks is None else sinks[head : head + 1]
        weights = torch.softmax(torch.cat([scores, sink]), dim=0)[: len(scores)]
        out.append(sum(w * value[shared] for w, value in zip(weights, values[seen], strict=True)))
    return torch.stack(out)


class ReferenceCache:
    """A LayerCache, and the keys and values of each sequence in plain lists."""

    def __init__(self, heads: int, shared: int, seed: int) -> None:
        self.heads, self.shared = heads, shared
        self.cache = LayerCache(SLOTS, shared, LENGTH, KEY_DIM, VALUE_DIM, torch.float32, CPU)
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(SLOTS)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(SLOTS)]
        self._noise = torch.Generator().manual_seed(seed)

    def step(self, decode: list[int], chunks: list[tuple[int, int]], window: int | None, **extras: Any) -> None:
        """Decode these slots in order, then process chunks of (slot, count), and compare each row."""
        slots = [*decode, *(slot for slot, count in chunks for _ in range(count))]
        query, key, value = (
            torch.randn(1, heads, len(slots), dim, generator=self._noise)
            for heads, dim in ((self.heads, KEY_DIM), (self.shared, KEY_DIM), (self.shared, VALUE_DIM))
        )
        self.cache.layout = self._layout(decode, chunks)
        out = self.cache.attend(query, key, value, SCALING, window, **extras)
        assert out.shape == (1, len(slots), self.heads, VALUE_DIM)
        for row, slot in enumerate(slots):
            self.keys[slot].append(key[0, :, row])
            self.values[slot].append(value[0, :, row])
            want = expected(query[0, :, row], self.keys[slot], self.values[slot], window, **extras)
            torch.testing.assert_close(out[0, row], want, atol=2e-5, rtol=1e-4)

    def _layout(self, decode: list[int], chunks: list[tuple[int, int]]) -> Any:
        runs, placed = [], []
        slots, positions = [], []
        first = 0
        for row, slot in enumerate(decode):
            positions.append(len(self.keys[slot]))
            slots.append(slot)
            if row + 1 == len(decode) or decode[row + 1] != slot + 1:
                runs.append(DecodeRun(first, decode[first], tuple(positions[first:])))
                first = row + 1
        for slot, count in chunks:
            start = len(self.keys[slot])
            placed.append(PromptChunk(len(slots), slot, start, count))
            slots += [slot] * count
            positions += range(start, start + count)
        return layout_of(Rows([], slots, positions, [], runs, placed), CPU)


EXTRAS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "both": {"softcap": 0.7, "sinks": torch.tensor([1.0, 0.0, -2.0, 3.0])},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_a_mixture_of_decode_rows_and_chunks_equals_each_sequence_alone(
    shared: int, window: int | None, extras: dict[str, Any]
) -> None:
    """Four query heads over 1, 2 or 4 key-value heads. New sequences reuse slots that still hold old values."""
    cache, rng = ReferenceCache(4, shared, seed=shared), random.Random(shared)
    for _ in range(12):
        decode, chunks = [], []
        for slot in range(SLOTS):
            held = len(cache.keys[slot])
            if held and (held > LENGTH - 6 or rng.random() < 0.1):
                cache.keys[slot], cache.values[slot], held = [], [], 0
            if held and rng.random() < 0.6:
                decode.append(slot)
            elif rng.random() < 0.6:
                chunks.append((slot, rng.randint(2, 6)))
        if decode or chunks:
            rng.shuffle(chunks)
            cache.step(decode, chunks, window, **extras)


def test_nan_of_one_sequence_does_not_reach_others() -> None:
    """The next sequence in the slot and the adjacent slots read the positions with NaN and mask them."""
    cache = ReferenceCache(4, 2, seed=1)
    cache.cache.layout = layout_of(span([0] * 6, slot=1, start=0), CPU)
    broken = torch.full((1, 4, 6, KEY_DIM), torch.nan)
    cache.cache.attend(broken, broken[:, :2], torch.full((1, 2, 6, VALUE_DIM), torch.inf), SCALING, None)
    cache.step([], [(0, 5), (1, 2), (2, 3)], None)
    cache.step([0, 1, 2], [], None)


def test_layers_share_the_index_tensors_and_masks_of_a_step() -> None:
    cache = ReferenceCache(4, 2, seed=2)
    cache.step([], [(0, 5), (1, 3)], None)
    cache.step([0, 1], [(2, 4)], None)
    layout, other = cache.cache.layout, LayerCache(SLOTS, 2, LENGTH, KEY_DIM, VALUE_DIM, torch.float32, CPU)
    assert layout is not None
    other.layout, before = layout, dict(layout._shared)
    key = torch.zeros(1, 2, 6, KEY_DIM)
    other.attend(torch.zeros(1, 4, 6, KEY_DIM), key, torch.zeros(1, 2, 6, VALUE_DIM), SCALING, None)
    assert all(layout._shared[name] is tensor for name, tensor in before.items())
    assert layout._shared.keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_cache_is_zero_and_has_the_dtype(dtype: torch.dtype) -> None:
    cache = LayerCache(2, 1, 3, 4, 5, dtype, CPU)
    assert (cache.keys.shape, cache.values.shape) == ((2, 1, 3, 4), (2, 1, 3, 5))
    assert (cache.keys.dtype, cache.values.dtype) == (dtype, dtype)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_attention_over_a_bfloat16_cache_returns_the_dtype_of_the_query() -> None:
    cache = LayerCache(1, 1, 8, 4, 4, torch.bfloat16, CPU)
    cache.layout = layout_of(span([0] * 3, slot=0, start=0), CPU)
    rows = torch.randn(1, 1, 3, 4)
    assert cache.attend(rows, rows, rows, 1.0, None).dtype == torch.float32


def test_a_shape_probe_records_the_shapes_of_a_layer() -> None:
    probe = ShapeProbe()
    out = probe.attend(torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 6), 1.0, None)
    assert (probe.heads, probe.key_dim, probe.value_dim) == (2, 8, 6)
    assert out.shape == (1, 3, 4, 6)


def test_transformers_finds_the_attention_function_and_its_default_scale() -> None:
    from transformers import AttentionInterface

    import serve_app.engines.native.transformers_path  # noqa: F401 - registers the function

    forward = AttentionInterface()["serve_app_slots"]
    cache = LayerCache(1, 1, 8, 4, 4, torch.float32, CPU)
    module = SimpleNamespace(serve_app_cache=cache)
    rows = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    outs = []
    for scaling in (None, 0.5, 0.9):
        cache.layout = layout_of(span([0] * 3, slot=0, start=0), CPU)
        out, weights = forward(module, rows, rows, rows, None, scaling=scaling, position_ids=None)
        assert weights is None
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_attention_modules_are_the_modules_with_a_layer_index() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    model[1].layer_idx = 0  # type: ignore[assignment]
    assert attention_modules(model) == [model[1]]


def test_copy_and_trim_change_only_the_given_positions() -> None:
    cache = LayerCache(3, 2, 256, 64, 64, torch.float32, torch.device("cpu"))
    for tensor in (cache.keys, cache.values):
        tensor.copy_(torch.arange(3 * 2 * 256 * 64).view(3, 2, 256, 64))
    kept = cache.values.clone()
    cache.apply(Trim(0, 128))
    assert cache.values[0, :, :128].equal(kept[0, :, :128])
    assert cache.values[0, :, 128:].eq(0).all()
    cache.apply(Trim(1, 0))
    assert cache.keys[1].eq(0).all()
    assert cache.values[2].equal(kept[2])
    cache.apply(Copy(2, 0, 96))
    assert cache.values[0, :, :96].equal(kept[2, :, :96])
    assert cache.values[0, :, 96:128].equal(kept[0, :, 96:128])
