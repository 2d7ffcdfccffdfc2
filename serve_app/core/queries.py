"""Queries to a model, which take no step of its engine, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from serve_app.core.events import TextToken
from serve_app.core.requests import Prompt


class ModelState(StrEnum):
    """`asleep` is scaled to zero by intent: the next request wakes it."""

    READY = "ready"
    LOADING = "loading"
    ASLEEP = "asleep"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model as an operator or a load balancer wants to see it. `detail` says why it is not ready."""

    name: str
    state: ModelState
    detail: str = ""


A = TypeVar("A", covariant=True)


class Query(Generic[A]):
    """What can be asked of a model besides an answer, and takes no step of it; `A` is the type of what is said."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Tokenize(Query[tuple[TextToken, ...]]):
    """The tokens of a prompt, with those that the tokenizer puts around a text or without.

    A chat's template writes its own. What is no character of the prompt covers none.
    """

    prompt: Prompt
    special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Detokenize(Query[str]):
    """The text of tokens, special ones by name or left out."""

    token_ids: tuple[int, ...]
    skip_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a model writes calls of tools: `before`, two parts with `middle` between them, `after`.

    The parts are the tool's name and its arguments, a JSON object, in this order if `name_first`. With several calls
    `between` stands from one's second part to the next one's first; None: a message has one call only. From `trigger`
    on, a beginning of `before`, an answer is calls and nothing else; if not `anywhere`, only if it begins with that.

    Some of these texts' pieces are tokens of their own, no text to a grammar: `signs`, by text and id. Those that are
    special are `hidden`, and have to be asked for. `free` are ranges of the other such tokens, first and last id, that
    may stand in an answer before its calls.
    """

    before: str
    middle: str
    between: str | None
    after: str
    name_first: bool
    trigger: str
    anywhere: bool
    signs: tuple[tuple[str, int], ...] = ()
    hidden: tuple[str, ...] = ()
    free: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model once it is loaded. `context` is the most tokens of a prompt and its answer.

    `tools` is how it writes calls; None: its chat template takes no tools, or writes calls in a way of its own.
    """

    context: int
    vocabulary: int
    special_ids: frozenset[int]
    tools: ToolCallFormat | None = None


@dataclass(frozen=True, slots=True)
class GetModelInfo(Query[ModelInfo]):
    """What the model is."""
