"""Runs a step: one packed forward pass through unmodified transformers modelling code, then sampling."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from serve_app.config import Engine, Model
from serve_app.engine import attention
from serve_app.engine.attention import DecodeRun, LayerCache, Layout, PromptChunk, ShapeProbe
from serve_app.engine.loader import Loaded, Report, SourceError, load
from serve_app.engine.memory import available_bytes, slots_that_fit
from serve_app.engine.sampler import sample
from serve_app.engine.sequence import Advance, Sampled, Step
from serve_app.errors import ServeAppError

_SELF_TEST_TOKENS = 12


class TorchRunner:
    """One model with a KV arena of `slots` sequences of `context` tokens each.

    Make and use it on one thread: torch's thread pool belongs to the thread that first used it.
    Raises SourceError when the architecture does not run packed, NotEnoughMemory when no slot fits.
    """

    def __init__(self, loaded: Loaded, engine: Engine) -> None:
        self.text = loaded.text
        self.context = min(engine.max_context, loaded.context)
        self._model = loaded.model
        with torch.inference_mode():
            reference = self._reference()
            self._caches = self._make_caches(engine)
            self._self_test(reference)

    @classmethod
    def from_config(cls, model: Model, report: Report) -> TorchRunner:
        """Load a model as the configuration says, on as many threads as it says."""
        torch.set_num_threads(model.engine.threads or usable_cores())
        loaded = load(model, report)
        report("preparing the KV arena")
        return cls(loaded, model.engine)

    @torch.inference_mode()
    def run(self, step: Step) -> list[Sampled | ServeAppError]:
        logits = self._forward(step)
        sampling = [advance.sequence for advance in step.advances if advance.samples]
        return sample(logits, sampling, self.text.token_text) if sampling else []

    def _forward(self, step: Step) -> torch.Tensor:
        """Logits `[S, V]` of the rows whose next token is wanted."""
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for advance in step.advances:
            start = advance.sequence.computed
            tokens += advance.sequence.tokens[start : start + advance.count]
            positions += range(start, start + advance.count)
            if advance.samples:
                wanted.append(len(tokens) - 1)
        self._lay_out(step, positions)
        return self._packed(tokens, positions, wanted)

    def _packed(self, tokens: list[int], positions: list[int], wanted: list[int]) -> torch.Tensor:
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _lay_out(self, step: Step, positions: list[int]) -> None:
        runs, chunks, slots = _place(step.advances)
        self._set_layouts(runs, chunks, slots, positions)

    def _set_layouts(
        self, runs: list[DecodeRun], chunks: list[PromptChunk], slots: list[int], positions: list[int]
    ) -> None:
        layouts: dict[torch.device, Layout] = {}
        for cache in self._caches:
            device = cache.keys.device
            if device not in layouts:
                layouts[device] = attention.layout_of(runs, chunks, slots, positions, device)
            cache.layout = layouts[device]

    def _reference(self) -> torch.Tensor:
        """Logits `[V]` after the self-test's tokens, by the model's own attention."""
        logits: torch.Tensor = self._model(input_ids=self._test_tokens()[None], use_cache=False).logits[0, -1]
        return logits

    def _make_caches(self, engine: Engine) -> list[LayerCache]:
        """Probe the layers' shapes, fit the arena into the memory budget, and hang a cache on every layer."""
        self._model.set_attn_implementation(attention.IMPLEMENTATION)
        modules = attention.attention_modules(self._model)
        probes = [ShapeProbe() for _ in modules]
        for module, probe in zip(modules, probes, strict=True):
            module.serve_app_cache = probe  # type: ignore[assignment]
        self._packed([0], [0], [0])
        layers = [(module, probe) for module, probe in zip(modules, probes, strict=True) if probe.heads]
        wanted = self._model.config.get_text_config().num_hidden_layers
        if len(layers) != wanted:
            raise SourceError(
                f"{type(self._model).__name__}: {len(layers)} of {wanted} layers call transformers' attention "
                "interface, and what the others remember would be lost; this architecture is not supported"
            )
        dtype = self._model.dtype
        slot_bytes = sum(p.heads * (p.key_dim + p.value_dim) for _, p in layers) * self.context * dtype.itemsize
        self.slots = slots_that_fit(replace_context(engine, self.context), self._free_bytes(), slot_bytes)
        caches = []
        for module, p in layers:
            device = next(module.parameters()).device
            cache = LayerCache(self.slots, p.heads, self.context, p.key_dim, p.value_dim, dtype, device)
            module.serve_app_cache = cache  # type: ignore[assignment]
            caches.append(cache)
        return caches

    def _free_bytes(self) -> int:
        if self._model.device.type == "cuda":
            return int(torch.cuda.mem_get_info()[0])
        return available_bytes()

    def _self_test(self, reference: torch.Tensor) -> None:
        """Two chunks and a decode step must give what the model's own attention gives for the whole.

        This finds an attention that wants more than keys and values of earlier tokens. Rounding alone differs by
        up to 6 % of the largest logit in bfloat16 (30 layers), by 0.01 % in float32.
        """
        tokens = self._test_tokens().tolist()
        last = len(tokens) - 1
        for start, end in ((0, last // 2), (last // 2, last), (last, last + 1)):
            positions = list(range(start, end))
            runs = [DecodeRun(0, 0, (start,))] if start == last else []
            chunks = [] if runs else [PromptChunk(0, 0, start, end - start)]
            self._set_layouts(runs, chunks, [0] * len(positions), positions)
            logits = self._packed(tokens[start:end], positions, [len(positions) - 1])[0]
        error = ((logits - reference).abs().max() / reference.abs().max().clamp_min(1e-6)).item()
        allowed = 0.01 if self._model.dtype == torch.float32 else 0.15
        if not error < allowed:
            raise SourceError(
                f"{type(self._model).__name__} does not give its own answers when run packed "
                f"(logits differ by {error:.1%}); this architecture is not supported"
            )

    def _test_tokens(self) -> torch.Tensor:
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        count = min(_SELF_TEST_TOKENS, self.context)
        tokens: torch.Tensor = torch.arange(1, count + 1, device=self._model.device) * 7919 % vocabulary
        return tokens


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def replace_context(engine: Engine, context: int) -> Engine:
    return engine.model_copy(update={"max_context": context})


def _place(advances: tuple[Advance, ...]) -> tuple[list[DecodeRun], list[PromptChunk], list[int]]:
    """Group decoding rows of neighbouring slots; every row's slot besides."""
    runs: list[DecodeRun] = []
    chunks: list[PromptChunk] = []
    slots: list[int] = []
    for advance in advances:
        sequence, row = advance.sequence, len(slots)
        slot = sequence.slot
        assert slot is not None
        slots += [slot] * advance.count
        if advance.count > 1:
            chunks.append(PromptChunk(row, slot, sequence.computed, advance.count))
        elif runs and not chunks and slot == runs[-1].first_slot + len(runs[-1].positions):
            runs[-1] = replace(runs[-1], positions=(*runs[-1].positions, sequence.computed))
        else:
            runs.append(DecodeRun(row, slot, (sequence.computed,)))
    return runs, chunks, slots
