"""Runs a step on a model: one forward pass for everybody, then sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import Protocol

import torch
from transformers import PreTrainedModel

from serve_app.config import Engine, Model
from serve_app.core.requests import TextPrompt
from serve_app.engines.native import calibration, kernels
from serve_app.engines.native.attention import LayerCache
from serve_app.engines.native.fused import LeanModel, why_not
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.linear import Quantization, mark
from serve_app.engines.native.loader import Loaded, Report, SourceError, load, return_memory
from serve_app.engines.native.machine import NotEnoughMemory, available_bytes, kv_tokens_that_fit, usable_cores
from serve_app.engines.native.packed import Computed, LayerShape, PackedModel, layer_shapes, unmasked_context
from serve_app.engines.native.rows import Rows, rows_of, span
from serve_app.engines.native.sampler import how_likely, sample
from serve_app.engines.native.sequence import Advance, Outcome, PromptReadout, Sampled, Step
from serve_app.engines.native.smooth import smooth, smooth_head
from serve_app.errors import ServeAppError

logger = logging.getLogger(__name__)

_SELF_TEST_TOKENS = 12
# Least cosine of two ways' logits that rounding explains. Measured on 30 layers: 1.0000, 0.9983, 1.0000; int8 0.94.
_LIKE = {torch.float32: 0.9999, torch.bfloat16: 0.98, torch.float16: 0.999}
# int4 0.9987, but 0.8 and less on three layers of noise, which have no digits to spare.
_LIKE_QUANTIZED = {"int8": 0.85, "int4": 0.7}


class ForwardPass(Protocol):
    """A model with its arena. `weight_bytes` is what a step reads of weights."""

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, rows: Rows) -> Computed:
        """What the rows ask for; keys and values of all of them go to the arena."""
        ...


class TorchRunner:
    """One model with a KV arena of `slots` sequences of `context` tokens each.

    `kind` is `lean` or `packed`: how it runs, see docs/architecture.md. `token_bytes` is what the arena keeps of a
    token, `kv_tokens` how many tokens all slots together may hold, `weight_count` how many weights a row is multiplied
    with, `sampling_s` the time that sampling took so far. Make and use it on one thread: torch's thread pool belongs to
    the thread that first used it.
    Raises SourceError when the architecture does not run packed, or is to give `embeddings` and does not tell its
    hidden states; NotEnoughMemory when no slot fits.
    """

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        quantization: Quantization = "none",
        report: Report = lambda stage: None,
        embeddings: bool = False,
    ) -> None:
        self.text = loaded.text
        self.sampling_s = 0.0
        self.dtype = loaded.model.dtype
        self.context = min(engine.max_context, loaded.context)
        self._quantization = quantization
        # What the channels of the last hidden states were divided by, for the sake of the head.
        self._divided: torch.Tensor | None = None
        model = loaded.model
        self.weight_count = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        with _in_a_sentence(model), torch.inference_mode():
            test = _SelfTest(model, self.context, quantization, embeddings)
            if quantization != "none" and model.device.type == "cpu":
                self._divided = _calibrate(loaded, quantization, smoothable=why_not(model) is None)
            shapes = layer_shapes(model)
            self.context = min(self.context, unmasked_context(model, shapes) or self.context)
            self._caches = caches = self._make_caches(shapes, engine, model.dtype)
            self._model, self.kind = self._fastest(model, caches, shapes, test, report)

    @classmethod
    def from_config(cls, model: Model, report: Report) -> TorchRunner:
        """Load a model as the configuration says, on as many threads as it says."""
        torch.set_num_threads(model.engine.threads or usable_cores())
        if not model.resources.num_gpus:
            kernels.begin()
        loaded = load(model, report)
        report("preparing the KV arena")
        runner = cls(loaded, model.engine, model.quantization, report, model.embeddings)
        del loaded  # a lean model has weights of its own
        return_memory()
        return runner

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    @torch.inference_mode()
    def run(self, step: Step) -> list[Outcome]:
        for order in step.cache_ops:
            for cache in self._caches:
                cache.carry_out(order)
        rows = rows_of(step)
        logits, hidden = self._model.forward(rows)
        computed = time.perf_counter()
        self._read(step, logits[len(rows.sample_rows) :], hidden)
        sampling = [advance for advance in step.advances if advance.samples]
        if not sampling:
            return []
        wanted = [advance.sequence for advance in sampling for _ in range(1 + len(advance.drafts))]
        ahead = [number for advance in sampling for number in range(1 + len(advance.drafts))]
        sampled = iter(sample(logits[: len(rows.sample_rows)], wanted, self.text.token_text, ahead))
        self.sampling_s += time.perf_counter() - computed
        return [_outcome(list(islice(sampled, 1 + len(advance.drafts)))) for advance in sampling]

    def _read(self, step: Step, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """What the step tells of prompts, to those who asked."""
        for advance in step.advances:
            count, readout = len(advance.readout_rows), advance.sequence.readout
            if readout is None or not count:
                continue
            if advance.sequence.embeds:
                self._sum(hidden[:count], readout)
                hidden = hidden[count:]
            else:
                self._tell(logits[:count], advance, readout)
                logits = logits[count:]

    def _sum(self, hidden: torch.Tensor, readout: PromptReadout) -> None:
        sums = hidden.double().sum(0)
        readout.add_states((sums if self._divided is None else sums * self._divided).tolist(), len(hidden))

    def _tell(self, logits: torch.Tensor, advance: Advance, readout: PromptReadout) -> None:
        sequence = advance.sequence
        first = sequence.computed + advance.readout_rows.start + 1
        tokens = sequence.tokens[first : first + len(logits)]
        readout.add_logprobs(how_likely(logits, tokens, sequence.params.prompt_logprobs or 0, self.text.token_text))

    def _make_caches(self, shapes: list[LayerShape], engine: Engine, dtype: torch.dtype) -> list[LayerCache]:
        """All slots on CPU, where only what is written to takes memory; else as many as the memory budget holds."""
        length = -(-self.context // BLOCK) * BLOCK
        self.token_bytes = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        device = shapes[0].device
        free_bytes = 0 if engine.kv_memory_bytes else _free_bytes(device)
        tokens = kv_tokens_that_fit(engine, free_bytes, self.token_bytes, length)
        self.slots = engine.max_running if device.type == "cpu" else min(engine.max_running, tokens // length)
        self.kv_tokens = min(tokens, self.slots * length)
        return [LayerCache(self.slots, s.heads, length, s.key_dim, s.value_dim, dtype, s.device) for s in shapes]

    def _fastest(
        self,
        model: PreTrainedModel,
        caches: list[LayerCache],
        shapes: list[LayerShape],
        test: _SelfTest,
        report: Report,
    ) -> tuple[ForwardPass, str]:
        """The lean model if it can be had and gives what the model's own code gives; the packed one otherwise."""
        name, reason = type(model).__name__, why_not(model)
        if reason is None and kernels.available(report):
            lean = LeanModel(model, caches, [shape.window for shape in shapes], self._quantization)
            error = test.fault(lean)
            if error is None:
                return lean, "lean"
            logger.warning("%s runs packed, not lean: %s", name, error)
        elif reason is not None:
            logger.info("%s runs packed, not lean: %s", name, reason)
        packed = PackedModel(model, caches, self._quantization)
        error = test.fault(packed)
        if error is not None:
            raise SourceError(f"{name} {error}; this architecture is not supported")
        return packed, "packed"


class _SelfTest:
    """A few tokens, and what the model's own code says after them; seen before its weights are changed."""

    def __init__(self, model: PreTrainedModel, context: int, quantization: Quantization, embeddings: bool) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self._tokens = [(i + 1) * 7919 % vocabulary for i in range(min(_SELF_TEST_TOKENS, context))]
        ids = torch.tensor([self._tokens], device=model.device)
        output = model(input_ids=ids, use_cache=False, output_hidden_states=embeddings)
        if embeddings and not output.hidden_states:
            raise SourceError(f"{type(model).__name__} tells no hidden states to embed with; set embeddings: false")
        self._reference: torch.Tensor = output.logits[0, -1]
        self._like = _LIKE_QUANTIZED.get(quantization) or _LIKE[self._reference.dtype]

    def fault(self, model: ForwardPass) -> str | None:
        """What is wrong if two chunks and a decode step do not give what the model's own attention gives.

        This finds an attention that wants more than keys and values of earlier tokens, and an operation that does not
        compute here what it should.
        """
        last = len(self._tokens) - 1
        for start, end in ((0, last // 2), (last // 2, last), (last, last + 1)):
            logits, _ = model.forward(span(self._tokens[start:end], slot=0, start=start))
            if len(logits) != 1:
                return f"gives logits of {len(logits)} rows when one is wanted"
        likeness = torch.cosine_similarity(logits[0].float(), self._reference.float(), dim=0).item()
        if likeness >= self._like:
            return None
        return f"does not give its own answers when run packed (their cosine is {likeness:.3f})"


def _calibrate(loaded: Loaded, quantization: Quantization, smoothable: bool) -> torch.Tensor | None:
    """Read a text once, to spend the few digits where they count.

    What the channels of the last hidden states are divided by from now on, if they are.
    """
    (ids,) = loaded.text.encode([TextPrompt(calibration.TEXT)])
    assert isinstance(ids, list)
    ids = ids[: loaded.context]
    if quantization == "int4":
        mark(calibration.inputs(loaded.model, ids, calibration.importance))
    return (smooth if quantization == "int8" else smooth_head)(loaded.model, ids) if smoothable else None


@contextmanager
def _in_a_sentence(model: torch.nn.Module) -> Iterator[None]:
    """Foreign code, called as it may not expect, raises whatever it likes: all of it is a SourceError here."""
    try:
        yield
    except (SourceError, NotEnoughMemory):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{type(model).__name__} cannot be run here: {reason}") from error


def _outcome(sampled: list[Sampled | ServeAppError]) -> Outcome:
    """All tokens before the first that is none; that one's error if there are no others."""
    tokens = tuple(takewhile(lambda one: isinstance(one, Sampled), sampled))
    return tokens or sampled[0]  # type: ignore[return-value]


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()
