"""A model that is ready to run, except for its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from serve_app.engines.native.forward import LayerShape, SelfTest
from serve_app.engines.native.fused_weights import FusedWeights
from serve_app.engines.native.quantization import Quantization
from serve_app.engines.text.tokenizer import HFText

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a runner needs to know of a model besides its weights.

    `name` is the class of the model in transformers. `context` is the longest sequence that the model supports,
    `vocabulary` the number of its token ids, `end_ids` those that end an answer by the model's own settings.
    `quantization` was chosen for `reason`. `weight_count` is the number of weights that a row is multiplied with.
    `hidden_divisors` `[hidden]` are the divisors of the channels of the last hidden states, if the model was smoothed.
    """

    name: str
    context: int
    vocabulary: int
    end_ids: tuple[int, ...]
    dtype: torch.dtype
    quantization: Quantization
    reason: str
    weight_count: int
    shapes: tuple[LayerShape, ...]
    hidden_divisors: torch.Tensor | None
    test: SelfTest


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model with its text processing. Packed weights have passed the self-test, a transformers model has not.

    `mapped_bytes` is the size of the file that the weights are mapped from; 0 if they are in this process's memory.
    """

    facts: ModelFacts
    model: FusedWeights | PreTrainedModel
    text: HFText
    mapped_bytes: int = 0
