"""A model's text processing as an engine uses it: the protocols of tokenizers, decoders and constraints."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from serve_app.core.events import TextToken
from serve_app.core.requests import Grammar, Prompt, SamplingParams, ToolChoice
from serve_app.engines.text.tool_use import ToolUse
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

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool) -> Decoder:
        """A decoder for the answer to this prompt."""
        ...

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        """The start of an answer in this grammar; an error if the grammar is refused."""
        ...

    def tool_use(self, choice: ToolChoice, params: SamplingParams) -> ToolUse | ServeAppError:
        """The grammar, parameters and parser of an answer that may call tools; an error if the tools are refused."""
        ...
