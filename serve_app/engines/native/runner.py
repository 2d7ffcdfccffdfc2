"""Runs the steps of a model: one forward pass for all sequences of a step, then sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import Protocol

import torch
from transformers import PreTrainedModel

from serve_app.config import Lora, Model, NativeOptions
from serve_app.core.requests import Adapter, TextPrompt
from serve_app.engines.files.adapter_files import AdapterFiles, read_adapter
from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.native import calibration, kernels
from serve_app.engines.native.attention import LayerCache
from serve_app.engines.native.fused import FusedModel, unsupported_reason
from serve_app.engines.native.kv_cache import BLOCK
from serve_app.engines.native.linear import attach_importance
from serve_app.engines.native.loader import Loaded, load, return_memory
from serve_app.engines.native.lora import LoraWeights, Target
from serve_app.engines.native.machine import (
    NotEnoughMemory,
    available_bytes,
    kv_tokens_that_fit,
    processor_flags,
    usable_cores,
)
from serve_app.engines.native.quantization import Choice, Quantization, RequestedQuantization, choose_quantization
from serve_app.engines.native.rows import Rows, rows_of, span
from serve_app.engines.native.sampler import prompt_logprobs, sample
from serve_app.engines.native.sequence import Advance, Outcome, PromptReadout, Sampled, Step
from serve_app.engines.native.smooth import smooth, smooth_head
from serve_app.engines.native.threads import one_thread
from serve_app.engines.native.transformers_path import (
    ForwardOutput,
    LayerShape,
    TransformersModel,
    layer_shapes,
    unmasked_context,
)
from serve_app.errors import ServeAppError

logger = logging.getLogger(__name__)

# The context on a GPU if the configuration sets none.
_GPU_CONTEXT = 2048
_SELF_TEST_TOKENS = 12
# The least cosine of the logits of two paths that rounding explains. Measured on 30 layers: 1.0000, 0.9983, 1.0000;
# int8 0.94, int4 0.9987. On three layers with random weights int4 has 0.8 and less.
_MIN_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.98, torch.float16: 0.999}
_MIN_COSINE_QUANTIZED = {"int8": 0.85, "int4": 0.7}


class ForwardPass(Protocol):
    """A model with its KV cache. `weight_bytes` is the number of bytes of weights that a step reads."""

    @property
    def weight_bytes(self) -> int: ...

    @property
    def targets(self) -> dict[str, Target]:
        """The layers that LoRA adapters can change, by their names."""
        ...

    def make_adapter(self, files: AdapterFiles) -> LoraWeights:
        """The weights of a LoRA adapter for this model. Called on any thread. Raises InvalidRequest."""
        ...

    def forward(self, rows: Rows) -> ForwardOutput:
        """The outputs that the rows request. The keys and values of all rows are written to the KV cache."""
        ...


class TorchRunner:
    """One model with a KV cache of `slots` sequences of `context` tokens each.

    `kind` is the path on which the model runs, `fused` or `transformers`, and `quantization` the quantization of its
    weights, which `auto` chooses by the processor's instruction sets (`flags`). `token_bytes` is the size of a token in
    the KV cache, `kv_tokens` the number of tokens that all slots together may hold, `weight_count` the number of
    weights that a row is multiplied with, `sampling_s` the time spent on sampling.
    Create and use a runner on one thread: torch's thread pool belongs to the thread that first used it.
    Raises SourceError when neither path supports the model, or when `embeddings` are requested and the model does not
    return its hidden states; NotEnoughMemory when the KV cache cannot hold one sequence.
    """

    def __init__(
        self,
        loaded: Loaded,
        engine: NativeOptions,
        quantization: RequestedQuantization = "none",
        report: Report = lambda stage: None,
        embeddings: bool = False,
        flags: Set[str] | None = None,
        lora: Lora | None = None,
    ) -> None:
        self._lora = lora
        self.text = loaded.text
        self.sampling_s = 0.0
        self.dtype = loaded.model.dtype
        model = loaded.model
        # On a GPU all slots are allocated at once, so a long context costs memory that no sequence may ever use.
        own = loaded.context if model.device.type == "cpu" else min(loaded.context, _GPU_CONTEXT)
        self.context = min(engine.max_context or own, loaded.context)
        choice = _choose_quantization(quantization, model, processor_flags() if flags is None else flags, report)
        logger.info("%s: quantization %s (%s)", type(model).__name__, choice.quantization, choice.reason)
        self.quantization: Quantization = choice.quantization
        # The divisors of the channels of the last hidden states, if the model was smoothed.
        self._hidden_divisors: torch.Tensor | None = None
        self.weight_count = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        with _as_source_error(model), torch.inference_mode():
            test = _SelfTest(model, self.context, embeddings)
            if self.quantization != "none" and model.device.type == "cpu":
                smoothable = unsupported_reason(model) is None
                self._hidden_divisors = _calibrate(loaded, self.quantization, smoothable)
            shapes = layer_shapes(model)
            self.context = min(self.context, unmasked_context(model, shapes) or self.context)
            self._caches = caches = self._make_caches(shapes, engine, model.dtype)
            windows = [shape.window for shape in shapes]
            fused = self._fused_path(model, caches, windows, test, report)
            if fused is None and quantization == "auto":
                self.quantization = "none"
            self.kind = "transformers" if fused is None else "fused"
            self._model = fused or self._transformers_path(model, caches, test)

    @classmethod
    def from_config(cls, model: Model, report: Report) -> TorchRunner:
        """Load a model with the settings of its configuration."""
        torch.set_num_threads(model.native_options.threads or usable_cores())
        if not model.resources.num_gpus:
            kernels.start_build()
        loaded = load(model, report)
        report("preparing the KV cache")
        runner = cls(loaded, model.native_options, model.quantization, report, model.embeddings, lora=model.lora)
        del loaded  # the fused path has its own weights
        return_memory()
        return runner

    @property
    def forward_pass(self) -> ForwardPass:
        return self._model

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def load_adapter(self, adapter: Adapter) -> tuple[str, object]:
        """See Runner."""
        assert self._lora is not None, "a request has an adapter only if the model has some"
        files = read_adapter(adapter, self._lora)
        with torch.inference_mode(), one_thread():
            return files.digest, self._model.make_adapter(files)

    @torch.inference_mode()
    def run(self, step: Step) -> list[Outcome]:
        for command in step.cache_ops:
            for cache in self._caches:
                cache.apply(command)
        rows = rows_of(step)
        logits, hidden = self._model.forward(rows)
        computed = time.perf_counter()
        self._record_prompt_results(step, logits[len(rows.sample_rows) :], hidden)
        sampling = [advance for advance in step.advances if advance.samples]
        if not sampling:
            return []
        wanted = [advance.sequence for advance in sampling for _ in range(1 + len(advance.drafts))]
        ahead = [number for advance in sampling for number in range(1 + len(advance.drafts))]
        sampled = iter(sample(logits[: len(rows.sample_rows)], wanted, self.text.token_logprob, ahead))
        self.sampling_s += time.perf_counter() - computed
        return [_outcome(list(islice(sampled, 1 + len(advance.drafts)))) for advance in sampling]

    def _record_prompt_results(self, step: Step, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add the log probabilities and hidden states of prompt tokens to the sequences that requested them."""
        for advance in step.advances:
            count, readout = len(advance.readout_rows), advance.sequence.readout
            if readout is None or not count:
                continue
            if advance.sequence.embeds:
                self._add_states(hidden[:count], readout)
                hidden = hidden[count:]
            else:
                self._add_logprobs(logits[:count], advance, readout)
                logits = logits[count:]

    def _add_states(self, hidden: torch.Tensor, readout: PromptReadout) -> None:
        sums = hidden.double().sum(0)
        readout.add_states(
            (sums if self._hidden_divisors is None else sums * self._hidden_divisors).tolist(), len(hidden)
        )

    def _add_logprobs(self, logits: torch.Tensor, advance: Advance, readout: PromptReadout) -> None:
        sequence = advance.sequence
        first = sequence.computed + advance.readout_rows.start + 1
        tokens = sequence.tokens[first : first + len(logits)]
        readout.add_logprobs(
            prompt_logprobs(logits, tokens, sequence.params.prompt_logprobs or 0, self.text.token_logprob)
        )

    def _make_caches(self, shapes: list[LayerShape], engine: NativeOptions, dtype: torch.dtype) -> list[LayerCache]:
        """One cache per layer. On a GPU with as many slots as fit into the memory budget.

        On CPU there are `max_running` slots, because a slot takes memory only for the tokens written to it.
        """
        length = -(-self.context // BLOCK) * BLOCK
        self.token_bytes = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        device = shapes[0].device
        free_bytes = 0 if engine.kv_memory_bytes else _free_bytes(device)
        tokens = kv_tokens_that_fit(engine, free_bytes, self.token_bytes, length if engine.max_context else BLOCK)
        if tokens < length:
            length = self.context = tokens // BLOCK * BLOCK
            logger.warning("the context is %d tokens: the KV cache of a longer one does not fit into memory", length)
        self.slots = engine.max_running if device.type == "cpu" else min(engine.max_running, tokens // length)
        self.kv_tokens = min(tokens, self.slots * length)
        return [LayerCache(self.slots, s.heads, length, s.key_dim, s.value_dim, dtype, s.device) for s in shapes]

    def _fused_path(
        self,
        model: PreTrainedModel,
        caches: list[LayerCache],
        windows: list[int | None],
        test: _SelfTest,
        report: Report,
    ) -> ForwardPass | None:
        """None if the fused path does not support the model or fails the self-test."""
        name, reason = type(model).__name__, unsupported_reason(model)
        if reason is not None:
            logger.info("%s runs on the Hugging Face path: %s", name, reason)
            return None
        if not kernels.available(report):
            return None
        fused = FusedModel(model, caches, windows, self.quantization)
        error = test.fault(fused, self.quantization)
        if error is not None:
            logger.warning("%s runs on the Hugging Face path: on the fused path it %s", name, error)
            return None
        return fused

    def _transformers_path(self, model: PreTrainedModel, caches: list[LayerCache], test: _SelfTest) -> ForwardPass:
        transformers = TransformersModel(model, caches, self.quantization, self._lora is not None)
        error = test.fault(transformers, self.quantization)
        if error is not None:
            raise SourceError(f"{type(model).__name__} {error}; this architecture is not supported")
        return transformers


def _choose_quantization(
    requested: RequestedQuantization, model: PreTrainedModel, flags: Set[str], report: Report
) -> Choice:
    choice = choose_quantization(requested, flags, model.device.type, unsupported_reason(model))
    if requested == "auto" and choice.quantization != "none" and not kernels.available(report):
        return Choice("none", "auto quantizes on the fused path only, which needs the native kernels")
    return choice


class _SelfTest:
    """A few tokens, and the logits of the unmodified model after them. Create it before the weights are changed."""

    def __init__(self, model: PreTrainedModel, context: int, embeddings: bool) -> None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self._tokens = [(i + 1) * 7919 % vocabulary for i in range(min(_SELF_TEST_TOKENS, context))]
        ids = torch.tensor([self._tokens], device=model.device)
        output = model(input_ids=ids, use_cache=False, output_hidden_states=embeddings)
        if embeddings and not output.hidden_states:
            raise SourceError(
                f"{type(model).__name__} does not return hidden states, which embeddings need; set embeddings: false"
            )
        self._reference: torch.Tensor = output.logits[0, -1]

    def fault(self, model: ForwardPass, quantization: Quantization) -> str | None:
        """What is wrong with the logits of a forward pass after two chunks and a decode step; None if nothing is.

        Finds an attention that needs more than keys and values of earlier tokens, and operations that compute wrong
        results on this processor.
        """
        last = len(self._tokens) - 1
        for start, end in ((0, last // 2), (last // 2, last), (last, last + 1)):
            logits, _ = model.forward(span(self._tokens[start:end], slot=0, start=start))
            if len(logits) != 1:
                return f"returns logits of {len(logits)} rows instead of one"
        cosine = torch.cosine_similarity(logits[0].float(), self._reference.float(), dim=0).item()
        if cosine >= (_MIN_COSINE_QUANTIZED.get(quantization) or _MIN_COSINE[self._reference.dtype]):
            return None
        return f"does not compute the logits of the unmodified model (their cosine is {cosine:.3f})"


def _calibrate(loaded: Loaded, quantization: Quantization, smoothable: bool) -> torch.Tensor | None:
    """Prepare the model's weights for quantization by one pass over a short text.

    Returns the divisors of the channels of the last hidden states, if the model is smoothed.
    """
    (ids,) = loaded.text.encode([TextPrompt(calibration.TEXT)])
    assert isinstance(ids, list)
    ids = ids[: loaded.context]
    if quantization == "int4":
        attach_importance(calibration.input_statistics(loaded.model, ids, calibration.mean_square))
    return (smooth if quantization == "int8" else smooth_head)(loaded.model, ids) if smoothable else None


@contextmanager
def _as_source_error(model: torch.nn.Module) -> Iterator[None]:
    """Turn any exception of the model's code, which may not support this kind of call, into a SourceError."""
    try:
        yield
    except (SourceError, NotEnoughMemory):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{type(model).__name__} cannot be run: {reason}") from error


def _outcome(sampled: list[Sampled | ServeAppError]) -> Outcome:
    """All tokens before the first error; the error if it comes first."""
    tokens = tuple(takewhile(lambda one: isinstance(one, Sampled), sampled))
    return tokens or sampled[0]  # type: ignore[return-value]


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()
