"""A model's text processing as an engine uses it: the protocols of tokenizers, decoders and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from serve_app.core.events import Delta, TextToken
from serve_app.core.queries import TokenizerInfo
from serve_app.core.requests import GenerationRequest, Prompt, SamplingParams
from serve_app.errors import ServeAppError


class Decoder(Protocol):
    """Incremental decoding of one sequence. Holds incomplete characters back."""

    def step(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is incomplete or if the token has no text."""
        ...


class Constraint(Protocol):
    """The position of one answer in the grammar that it follows."""

    def allowed(self) -> bytes | bytearray | ServeAppError:
        """One bit for each token of the vocabulary, lowest bit first: whether the token may come next.

        An error, which ends the request, if the grammar cannot be evaluated.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Append a token to the answer; True if the answer is complete and no token may follow."""
        ...


class AnswerParser(Protocol):
    """Divides the text of one answer into reasoning, content and tool calls."""

    def feed(self, text: str) -> list[Delta]:
        """The deltas that this text completes."""
        ...

    def end(self) -> list[Delta]:
        """The deltas still held back; called after the last text."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """How an engine generates one answer: `params` take the place of the request's.

    The answer follows the constraint, and the parser reads its text; None if the answer is free, or not divided.
    `stop_texts` has the stop string of the request for each stop token that stands for one.
    """

    params: SamplingParams
    constraint: Constraint | None = None
    parser: AnswerParser | None = None
    stop_texts: Mapping[int, str] = field(default_factory=dict)


class Text(Protocol):
    """A model's tokenizer, chat template and grammars. Called from several threads at a time."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens with which the model ends an answer."""
        ...

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which stand for no text."""
        ...

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        """Token ids of each prompt, all tokenized together; an error in the place of a prompt that is refused."""
        ...

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
        """The result of a Tokenize query."""
        ...

    def detokenize(self, token_ids: Seq[int], skip_special_tokens: bool) -> str | ServeAppError:
        """The result of a Detokenize query."""
        ...

    def info(self) -> TokenizerInfo:
        """The result of a GetTokenizerInfo query."""
        ...

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool) -> Decoder:
        """A decoder for the answer to this prompt."""
        ...

    def plan(self, request: GenerationRequest, prompt: Seq[int]) -> AnswerPlan | ServeAppError:
        """How to generate the answer to this prompt; an error if the request's grammar or tools are refused."""
        ...
