"""What every way to compute a model offers to the runner: a forward pass over rows, and a test of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from serve_app.engines.files.adapter_files import AdapterFiles
from serve_app.engines.native.lora import LoraWeights, Target
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.native.rows import Rows, span

SELF_TEST_TOKENS = 12
# The least cosine of the logits of two paths that rounding explains. Measured on 30 layers: 1.0000, 0.9983, 1.0000;
# int8 0.94, int4 0.9987. On three layers with random weights int4 has 0.8 and less.
_MIN_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.98, torch.float16: 0.999}
_MIN_COSINE_QUANTIZED = {"int8": 0.85, "int4": 0.7}


class ForwardOutput(NamedTuple):
    """`logits` `[S, V]` of `sample_rows`, then `logprob_rows`; last `hidden` states `[E, H]` of `embedding_rows`."""

    logits: torch.Tensor
    hidden: torch.Tensor


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


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values that one layer keeps of a token: their number `heads`, their sizes and the device.

    `window` is the number of positions that a row attends to, None where the layer does not pass any.
    """

    heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    window: int | None


@dataclass(frozen=True, slots=True)
class SelfTest:
    """A few tokens, and the logits `[V]` of the unmodified model after them."""

    tokens: tuple[int, ...]
    logits: torch.Tensor

    def fault(self, model: ForwardPass, quantization: Quantization) -> str | None:
        """What is wrong with the logits of a forward pass after two chunks and a decode step; None if nothing is.

        Finds an attention that needs more than keys and values of earlier tokens, operations that compute wrong
        results on this processor, and damaged weights.
        """
        last = len(self.tokens) - 1
        for start, end in ((0, last // 2), (last // 2, last), (last, last + 1)):
            logits, _ = model.forward(span(list(self.tokens[start:end]), slot=0, start=start))
            if len(logits) != 1:
                return f"returns logits of {len(logits)} rows instead of one"
        cosine = torch.cosine_similarity(logits[0].float(), self.logits.float(), dim=0).item()
        if cosine >= (_MIN_COSINE_QUANTIZED.get(quantization) or _MIN_COSINE[self.logits.dtype]):
            return None
        return f"does not compute the logits of the unmodified model (their cosine is {cosine:.3f})"
