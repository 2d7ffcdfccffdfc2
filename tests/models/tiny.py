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
_EXPERTS: dict[str, Any] = _SHAPE | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LATENT: dict[str, Any] = {name: value for name, value in _SHAPE.items() if name != "head_dim"} | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_BLOOM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 3, "n_head": 4}
_NO_HEAD_DIM: dict[str, Any] = {name: value for name, value in _SHAPE.items() if name != "head_dim"}
_GPT_2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.25,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
_GPT_J: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "rotary_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "qwen2": _SHAPE,
    "qwen3": _SHAPE,
    "gemma3_text": _SHAPE
    | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "gemma2": _SHAPE | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma": _SHAPE,
    "cohere": _SHAPE,
    "cohere2": _SHAPE | {"sliding_window": WINDOW},
    "exaone4": _SHAPE | {"sliding_window": WINDOW},
    "glm4": _SHAPE,
    "granite": _SHAPE,
    "gpt_neox": _SHAPE,
    "gpt_bigcode": _GPT_2,
    # Its queries grow with their positions.
    "ministral3": _SHAPE
    | {
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "olmo2": _SHAPE,
    "opt": _SHAPE | {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "phi": _SHAPE,
    "smollm3": _SHAPE,
    # As much rotary embedding as leaves an even part of each head.
    "stablelm": _NO_HEAD_DIM | {"partial_rotary_factor": 0.5},
    "starcoder2": _SHAPE | {"sliding_window": WINDOW},
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "gpt_oss": _EXPERTS | {"sliding_window": WINDOW},
    "deepseek_v3": _LATENT,
    "mistral": _SHAPE | {"sliding_window": WINDOW},
    "phi3": _SHAPE | {"sliding_window": None},
    "gpt2": _GPT_2,
}

# Shapes that the native operations take: heads of 64 or 128, rows in multiples of 16.
_WIDE: dict[str, Any] = _SHAPE | {"hidden_size": 64, "head_dim": 64, "intermediate_size": 96}
LEAN: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    # Wider rows with weights this large would only amplify rounding, transformers' own as much as ours.
    "qwen2": _WIDE | {"num_attention_heads": 6, "hidden_size": 384, "initializer_range": 0.1},
    "qwen3": _WIDE | {"head_dim": 128, "num_key_value_heads": 1},
    "mistral": _WIDE | {"sliding_window": WINDOW, "num_key_value_heads": 4},
}

# Their layers attend within a window, or chunks, and leave it to the mask to say so.
MASKED_WINDOW = 40
MASKED: dict[str, dict[str, Any]] = {
    "doge": _SHAPE | {"sliding_window": MASKED_WINDOW},
    "qwen2_moe": _EXPERTS | {"sliding_window": MASKED_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "moshi": _SHAPE | {"sliding_window": MASKED_WINDOW, "ffn_dim": 96},
    "phimoe": _EXPERTS | {"sliding_window": MASKED_WINDOW},
    "llama4_text": _EXPERTS
    | {"attention_chunk_size": MASKED_WINDOW, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
}

# What these remember is not, or not only, keys and values that the attention interface is given.
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "bloom": _BLOOM,
    "falcon": _NO_HEAD_DIM,
    "gpt_neo": _BLOOM | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "minimax": _EXPERTS,
    "mpt": _BLOOM | {"d_model": 48, "n_layers": 3, "n_heads": 4},
    "gptj": _GPT_J,
    "codegen": _GPT_J,
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "attention_hidden_size": 48},
    "recurrent_gemma": _SHAPE,
    "lfm2": _SHAPE | {"layer_types": ["conv", "full_attention", "conv"]},
}


def save(family: str, folder: Path, shapes: dict[str, dict[str, Any]] | None = None) -> Path:
    """A model of this family in `folder`, the same weights every time."""
    set_seed(7)
    config = AutoConfig.for_model(family, **(FAMILIES | UNSUPPORTED if shapes is None else shapes)[family])
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
