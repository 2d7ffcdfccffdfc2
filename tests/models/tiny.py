"""Tiny models with random weights, one per model family, saved as folders or GGUF files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

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
    # Scales its queries by their positions.
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
    # Half of each head is rotated, which is an even number of elements.
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

# The families of FAMILIES that cover every code path of the Hugging Face path: plain, norms of queries and keys, a cap
# of the scores, layers with and without window, sinks and experts, latent attention with values of another size, Conv1D
# and learnt positions, one key-value head, scaled queries. The others run in the long tests.
REPRESENTATIVE = (
    "llama",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "gpt_bigcode",
    "ministral3",
    "mistral",
)

# Shapes that the native operations support: heads of 64, 96, 128 or 256 elements, rows in multiples of 16.
_WIDE: dict[str, Any] = _SHAPE | {"hidden_size": 64, "head_dim": 64, "intermediate_size": 96}
FUSED: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    # Wider rows with larger weights would amplify the rounding errors of both implementations.
    "qwen2": _WIDE | {"num_attention_heads": 6, "hidden_size": 384, "initializer_range": 0.1},
    "qwen3": _WIDE | {"head_dim": 128, "num_key_value_heads": 1},
    "mistral": _WIDE | {"sliding_window": WINDOW, "num_key_value_heads": 4},
    "gemma2": _WIDE
    | {
        "sliding_window": WINDOW,
        "head_dim": 256,
        "initializer_range": 0.1,
        "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": _WIDE
    | {
        "sliding_window": WINDOW,
        "head_dim": 256,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "granite": _WIDE
    | {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "initializer_range": 0.1,
    },
    "mixtral": _EXPERTS | _WIDE,
    "olmo2": _WIDE,
    "qwen2_moe": _EXPERTS | _WIDE | {"decoder_sparse_step": 2, "norm_topk_prob": False},
    "qwen3_moe": _EXPERTS | _WIDE | {"head_dim": 128, "norm_topk_prob": True, "mlp_only_layers": []},
    "phi3": _WIDE | {"head_dim": 96, "num_key_value_heads": 4, "sliding_window": None},
    "smollm3": _WIDE | {"no_rope_layers": [1, 0, 1]},
}

# The layers of these families attend within a window or chunk that only transformers' mask expresses.
MASKED_WINDOW = 40
MASKED: dict[str, dict[str, Any]] = {
    "doge": _SHAPE | {"sliding_window": MASKED_WINDOW},
    "qwen2_moe": _EXPERTS | {"sliding_window": MASKED_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "moshi": _SHAPE | {"sliding_window": MASKED_WINDOW, "ffn_dim": 96},
    "phimoe": _EXPERTS | {"sliding_window": MASKED_WINDOW},
    "llama4_text": _EXPERTS
    | {"attention_chunk_size": MASKED_WINDOW, "intermediate_size_mlp": 96, "num_experts_per_tok": 1},
}

# These families keep a state other than the keys and values that they pass to the attention interface.
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


def every(shapes: Iterable[str], representative: Iterable[str] = REPRESENTATIVE) -> list[ParameterSet]:
    """Parameters of a test over families; families other than the representative ones run in the long tests."""
    kept = set(representative)
    return [pytest.param(family, marks=[] if family in kept else pytest.mark.long) for family in shapes]


def save(family: str, folder: Path, shapes: dict[str, dict[str, Any]] | None = None) -> Path:
    """Write a model of this family to `folder`, with the same weights every time."""
    set_seed(7)
    config = AutoConfig.for_model(family, **(FAMILIES | UNSUPPORTED if shapes is None else shapes)[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and an end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return fast


def save_gguf(
    path: Path,
    without: str = "",
    extra: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str | float] | None = None,
    feed_forward_length: int = 96,
    hidden: int = 48,
    inner: int = 96,
    layers: int = 2,
    q4_0: bool = False,
) -> Path:
    """Write a Llama model to a GGUF file.

    `without` is a tensor that is left out, `extra` are further tensors, and `metadata` are further values. With `q4_0`,
    matrices have this quantization.
    """
    noise = torch.Generator().manual_seed(7)
    heads = 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward_length)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    tokens = _gguf_tokens()
    writer.add_vocab_size(len(tokens))
    _add_tokenizer(writer, tokens)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,), "output": (len(tokens), hidden)}
    for layer in range(layers):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,))
        mlp = {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {**square, **norms, **mlp}.items()}
    for name, shape in shapes.items():
        if q4_0 and len(shape) == 2:
            blocks = torch.randint(256, (shape[0], shape[1] // 32, 18), generator=noise, dtype=torch.uint8)
            blocks[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)  # the scale of a block
            writer.add_tensor(f"{name}.weight", blocks.flatten(1).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        elif name != without:
            writer.add_tensor(f"{name}.weight", (torch.randn(*shape, generator=noise) * 0.2).numpy())
    _finish(writer, extra or {}, metadata or {})
    return path


def save_gguf_of(
    family: str,
    architecture: str,
    path: Path,
    extra: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str | float],
    layers: int = 3,
) -> Path:
    """Write a model of FAMILIES to a GGUF file, with the names of tensors that transformers expects."""
    set_seed(7)
    tokens = _gguf_tokens()
    shape = FAMILIES[family] | {"vocab_size": len(tokens), "num_hidden_layers": layers, "layer_types": None}
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    _add_tokenizer(writer, tokens)
    weights = model.state_dict()
    for name, weight in get_gguf_hf_weights_map(model, TensorProcessor(config={})).items():
        if name != "output.weight" or not config.tie_word_embeddings:
            writer.add_tensor(name, weights[weight].numpy())
    _finish(writer, extra, metadata)
    return path


def save_gguf_part(path: Path, number: int, count: int) -> None:
    """Write a part of a split GGUF file, as llama-gguf-split writes all but the first: without an architecture."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_tensor("output_norm.weight", torch.ones(8).numpy())
    _finish(writer, {}, {})


def _gguf_tokens() -> list[str]:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*symbols, symbols[0] + symbols[1], "<end>"]  # a tokenizer in a GGUF file has at least one merge


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[str]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(0)


def _finish(writer: gguf.GGUFWriter, extra: Mapping[str, torch.Tensor], metadata: Mapping[str, str | float]) -> None:
    for name, values in extra.items():
        writer.add_tensor(name, values.numpy())
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in metadata.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
