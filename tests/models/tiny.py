"""Tiny models with random weights, one for each family, saved as a user's folder would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

VOCABULARY = 257
WINDOW = 8

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "qwen2": _SHAPE,
    "qwen3": _SHAPE,
    "gemma3_text": _SHAPE
    | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "gemma2": _SHAPE | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "mistral": _SHAPE | {"sliding_window": WINDOW},
    "phi3": _SHAPE | {"sliding_window": None},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.25,
        "bos_token_id": 256,
        "eos_token_id": 256,
    },
}


def save(family: str, folder: Path) -> Path:
    """A model of this family in `folder`, the same weights every time."""
    set_seed(7)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return fast
