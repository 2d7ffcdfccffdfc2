"""Queries to a model (they need no step of its engine), the results of the queries, and the known state of a model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from serve_app.core.events import TextToken
from serve_app.core.requests import Adapter, Prompt

A = TypeVar("A", covariant=True)


class Query(Generic[A]):
    """A query to a model, whose result has type `A`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Tokenize(Query[tuple[TextToken, ...]]):
    """The tokens of a prompt, with or without the special tokens that the tokenizer adds to a text.

    A chat template writes its special tokens itself. A token that stands for no character of the prompt covers none.
    """

    prompt: Prompt
    special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Detokenize(Query[str]):
    """The text of tokens; special tokens are written by name or left out."""

    token_ids: tuple[int, ...]
    skip_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a loaded model. `context` is the largest number of tokens of a prompt and its answer.

    `quantization` of the weights is `none`, `int8` or `int4`, and `dtype` their dtype before quantization; empty for a
    model without weights.
    """

    context: int
    vocabulary: int
    special_ids: frozenset[int]
    quantization: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class GetModelInfo(Query[ModelInfo]):
    """The facts of a loaded model."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is no part of the tokenizer's vocabulary of subwords, with the fields of the tokenizers library."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """Facts of a model's tokenizer. `added_tokens` are by id; the chat template is the one that the model uses."""

    kind: str
    added_tokens: dict[int, AddedToken]
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class GetTokenizerInfo(Query[TokenizerInfo]):
    """The facts of a model's tokenizer."""


@dataclass(frozen=True, slots=True)
class LoadAdapter(Query[str]):
    """Read the files of an adapter anew and load it; the result is the digest of their content."""

    adapter: Adapter


class ModelState(StrEnum):
    """`asleep` is scaled to zero as configured: the next request wakes the model."""

    READY = "ready"
    LOADING = "loading"
    ASLEEP = "asleep"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """The state of one model. `detail` is the reason why it is not ready."""

    name: str
    state: ModelState
    detail: str = ""
