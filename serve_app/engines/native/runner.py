"""Runs the steps of a model: one forward pass for all sequences of a step, then sampling."""

from __future__ import annotations

import gc
import logging
import time
from itertools import islice, takewhile

import torch

from serve_app.config import Lora, Model, NativeOptions
from serve_app.core.requests import Adapter
from serve_app.engines.files.adapter_files import read_adapter
from serve_app.engines.files.disk_cache import Report
from serve_app.engines.files.sources import resolve
from serve_app.engines.native import kernels, packed_files
from serve_app.engines.native.attention import LayerCache
from serve_app.engines.native.failure import Failure
from serve_app.engines.native.forward import ForwardPass
from serve_app.engines.native.fused import FusedModel
from serve_app.engines.native.fused_weights import FusedWeights
from serve_app.engines.native.kv_cache import BLOCK, CacheOp
from serve_app.engines.native.machine import (
    available_bytes,
    keep_step_memory,
    kv_tokens_that_fit,
    return_memory,
    usable_cores,
)
from serve_app.engines.native.prepared import ModelFacts, Prepared
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import rows_of
from serve_app.engines.native.sampler import prompt_logprobs, sample
from serve_app.engines.native.sequence import Advance, Outcome, PromptReadout, Sampled, Step
from serve_app.engines.native.threads import one_thread
from serve_app.errors import ServeAppError

logger = logging.getLogger(__name__)

# The context on a GPU if the configuration sets none.
_GPU_CONTEXT = 2048


class TorchRunner:
    """One model with a KV cache of `slots` sequences of `context` tokens each.

    `kind` is the path on which the model runs, `fused` or `transformers`, and `quantization` the quantization of its
    weights. `token_bytes` is the size of a token in the KV cache, `kv_tokens` the number of tokens that all slots
    together may hold, `weight_count` the number of weights that a row is multiplied with, `sampling_s` the time spent
    on sampling. Create and use a runner on one thread: torch's thread pool belongs to the thread that first used it.
    Raises SourceError when the path does not support the model; NotEnoughMemory when the KV cache cannot hold one
    sequence.
    """

    def __init__(self, prepared: Prepared, engine: NativeOptions, lora: Lora | None = None) -> None:
        facts = prepared.facts
        logger.info("%s: quantization %s (%s)", facts.name, facts.quantization, facts.reason)
        self._lora = lora
        self.text = prepared.text
        self.sampling_s = 0.0
        self.dtype = facts.dtype
        self.quantization: Quantization = facts.quantization
        self.weight_count = facts.weight_count
        # The divisors of the channels of the last hidden states, if the model was smoothed.
        self._hidden_divisors = facts.hidden_divisors
        # On a GPU all slots are allocated at once, so a long context costs memory that no sequence may ever use.
        on_cpu = facts.shapes[0].device.type == "cpu"
        own = facts.context if on_cpu else min(facts.context, _GPU_CONTEXT)
        self.context = min(engine.max_context or own, facts.context)
        self._caches = self._make_caches(facts, engine, prepared.mapped_bytes)
        self._model: ForwardPass
        if isinstance(prepared.model, FusedWeights):
            self.kind = "fused"
            self._model = FusedModel(prepared.model, self._caches)
        else:
            from serve_app.engines.native.transformers_path import tested

            self.kind = "transformers"
            self._model = tested(prepared.model, self._caches, facts.quantization, lora is not None, facts.test)

    @classmethod
    def from_config(cls, model: Model, report: Report) -> TorchRunner:
        """Load a model with the settings of its configuration."""
        options = model.native_options
        torch.set_num_threads(options.threads or usable_cores())
        on_cpu = not model.resources.num_gpus and model.device != "cuda"
        if on_cpu:
            kernels.start_build()
        folder = resolve(model, report)

        def prepare() -> Prepared:
            from serve_app.engines.native.preparation import prepare_from_files  # imports transformers, which takes 3 s

            return prepare_from_files(model, folder, report)

        cached = on_cpu and options.cache_weights
        prepared = packed_files.prepared(model, folder, prepare, report) if cached else prepare()
        report("preparing the KV cache")
        runner = cls(prepared, options, model.lora)
        if not prepared.mapped_bytes:
            del prepared  # the fused path has its own weights
            return_memory()
        keep_step_memory()
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
    def apply(self, op: CacheOp) -> None:
        """See Runner."""
        for cache in self._caches:
            cache.apply(op)

    def free_memory(self) -> None:
        """See Runner."""
        gc.collect()
        return_memory()
        if self._caches[0].keys.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, step: Step) -> list[Outcome]:
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

    def _make_caches(self, facts: ModelFacts, engine: NativeOptions, mapped_bytes: int) -> list[LayerCache]:
        """One cache per layer. On a GPU with as many slots as fit into the memory budget.

        On CPU there are `max_running` slots, because a slot takes memory only for the tokens written to it.
        """
        shapes, dtype = facts.shapes, facts.dtype
        length = -(-self.context // BLOCK) * BLOCK
        self.token_bytes = sum(s.heads * (s.key_dim + s.value_dim) for s in shapes) * dtype.itemsize
        device = shapes[0].device
        free_bytes = 0 if engine.kv_memory_bytes else _free_bytes(device, mapped_bytes)
        tokens = kv_tokens_that_fit(engine, free_bytes, self.token_bytes, length if engine.max_context else BLOCK)
        if tokens < length:
            length = self.context = tokens // BLOCK * BLOCK
            logger.warning("the context is %d tokens: the KV cache of a longer one does not fit into memory", length)
        self.slots = engine.max_running if device.type == "cpu" else min(engine.max_running, tokens // length)
        self.kv_tokens = min(tokens, self.slots * length)
        return [LayerCache(self.slots, s.heads, length, s.key_dim, s.value_dim, dtype, s.device) for s in shapes]


def _outcome(sampled: list[Sampled | ServeAppError | Failure]) -> Outcome:
    """All tokens before the first error; the error if it comes first."""
    tokens = tuple(takewhile(lambda one: isinstance(one, Sampled), sampled))
    return tokens or sampled[0]  # type: ignore[return-value]


def _free_bytes(device: torch.device, mapped_bytes: int) -> int:
    """The free memory of a device. The pages of mapped weights count as free to the kernel, but a step needs them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, available_bytes() - mapped_bytes)
