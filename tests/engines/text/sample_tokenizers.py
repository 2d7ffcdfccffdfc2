"""Tokenizers for tests. torch and transformers are imported by the functions, so that collection does not load them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve_app.engines.text.tokenizer import HFText

END = 256
BYTE_VOCABULARY = 257
EMBEDDED_END = 2
EMBEDDED_VOCABULARY = 49152


def byte_tokenizer() -> Any:
    """A transformers tokenizer with one token for each byte, and an end token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = fast_tokenizer(backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def byte_text() -> HFText:
    return HFText(byte_tokenizer(), frozenset({END}), BYTE_VOCABULARY)


def fast_tokenizer(backend: Tokenizer) -> Any:
    """A transformers tokenizer of this Rust tokenizer, with the end token `<end>`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@cache
def embedded_folder() -> Path:
    from serve_app.engines.files.conversion import convert_gguf
    from serve_app.engines.files.sources import builtin_gguf

    return convert_gguf(builtin_gguf(), lambda stage: None)


def embedded_tokenizer(chat_template: str | None = None) -> Any:
    """The embedded model's tokenizer, with its own chat template or with this one. Must not be given more tokens."""
    tokenizer = copy.copy(_embedded_tokenizer())
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def extended_tokenizer(chat_template: str, tokens: list[str], special_tokens: list[str]) -> Any:
    """The embedded model's tokenizer with more tokens."""
    tokenizer = copy.deepcopy(_embedded_tokenizer())
    tokenizer.add_tokens(tokens)
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _embedded_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded_folder())
