"""One request inside the engine, and the plain data of a step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import getrandbits
from typing import Protocol

from serve_app.engine.arena import Copy, Trim
from serve_app.engine.detokenizer import Decoder
from serve_app.engine.drafts import Drafter
from serve_app.engine.stream import Token, TokenStream
from serve_app.errors import ServeAppError
from serve_app.types import FinishReason, Grammar, Logprobs, Piece, Prompt, SamplingParams, ToolSyntax


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token that a step chose for one sequence."""

    token_id: int
    logprobs: Logprobs | None = None


class Constraint(Protocol):
    """Where one answer is in the grammar that it follows."""

    def allowed(self) -> bytes | bytearray | ServeAppError:
        """One bit for each token of the vocabulary, lowest first in a byte: whether it may come next.

        An error when that cannot be told; it ends the request.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take in the answer's next token; whether the answer is complete, and nothing more can follow."""
        ...


class Sequence:
    """Token ids so far, how many of them are in the KV arena, and where.

    `tokens` is the prompt and then the answer. `computed` counts the tokens whose keys and values
    are in slot `slot`; the sequence decodes when only its newest token is not. `order` counts arrivals;
    `long` is a prompt that may only advance as far as nobody notices.
    """

    __slots__ = (
        "computed",
        "constraint",
        "deadline",
        "drafter",
        "end_ids",
        "limit",
        "long",
        "order",
        "params",
        "prompt_len",
        "seed",
        "slot",
        "stream",
        "tokens",
    )

    def __init__(
        self,
        stream: TokenStream,
        prompt: Seq[int],
        end_ids: frozenset[int],
        context: int,
        constraint: Constraint | None = None,
    ) -> None:
        assert prompt, "a sequence without tokens would never advance"
        params = stream.request.params
        self.stream = stream
        self.params: SamplingParams = params
        self.constraint = constraint
        self.tokens = list(prompt)
        self.prompt_len = len(self.tokens)
        self.computed = 0
        self.long = False
        self.order = 0
        self.drafter = Drafter()
        self.slot: int | None = None
        self.deadline = stream.arrived + stream.request.timeout_s
        self.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else end_ids)
        self.seed = getrandbits(63) if params.seed is None else params.seed + stream.request.index
        room = context - self.prompt_len
        self.limit = room if params.max_tokens is None else min(room, params.max_tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV arena yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    def drafts(self, count: int) -> tuple[int, ...]:
        """At most `count` guesses at its next tokens; none where a token's choice depends on more than its place."""
        p = self.params
        plain = p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0
        if not plain or p.logprobs is not None or (self.end_ids and self.generated < p.min_tokens) or self.constraint:
            return ()
        return self.drafter.propose(self.tokens, min(count, self.limit - self.generated - 1))

    def accept(self, sampled: Sampled, now: float) -> Token:
        """Append a sampled token; say when it came, and whether the answer ends with it."""
        self.tokens.append(sampled.token_id)
        reason, complete = None, False
        if sampled.token_id in self.end_ids and self.generated >= self.params.min_tokens:
            reason = FinishReason.STOP
        elif self.constraint is not None and self.constraint.accept(sampled.token_id):
            reason, complete = FinishReason.STOP, True
        elif self.generated >= self.limit:
            reason = FinishReason.LENGTH
        return Token(sampled.token_id, now - self.stream.arrived, reason, sampled.logprobs, complete)


@dataclass(frozen=True, slots=True)
class Advance:
    """Feed the next `count` tokens of a sequence to the model; sample one when that completes its tokens.

    Prefill, chunk and decode differ only in the number. `drafts` are fed after them: each is right if it is what
    the row before it samples, and then its own row gives one token more.
    """

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.pending

    @property
    def rows(self) -> int:
        return self.count + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: decoding sequences by slot, then prompt chunks. `orders` come before it."""

    advances: tuple[Advance, ...]
    orders: tuple[Copy | Trim, ...] = ()

    @property
    def rows(self) -> int:
        return sum(advance.rows for advance in self.advances)


# What a step chose for a sequence: a token, and one more for every draft that may be right; or why it has none.
Outcome = tuple[Sampled, ...] | ServeAppError


class Text(Protocol):
    """A model's tokenizer, seen from the engine."""

    @property
    def end_ids(self) -> frozenset[int]: ...

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are signs rather than text."""
        ...

    @property
    def tools(self) -> ToolSyntax | None:
        """How the model writes calls of tools."""
        ...

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        """Token ids of each prompt, tokenised together; an error in the place of one that cannot be."""
        ...

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[Piece, ...] | ServeAppError:
        """See Tokenize."""
        ...

    def detokenize(self, token_ids: Seq[int], skip_special_tokens: bool) -> str | ServeAppError:
        """See Detokenize."""
        ...

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool) -> Decoder:
        """A decoder for what follows this prompt, which shows special tokens or not."""
        ...

    def constraint(self, grammar: Grammar, ignore_eos: bool) -> Constraint | ServeAppError:
        """The beginning of an answer in this grammar; an error if there can be none."""
        ...


class Runner(Protocol):
    """A model with a KV arena. Made and called on the engine's thread only."""

    @property
    def kind(self) -> str:
        """How it runs, in one word for an operator."""
        ...

    @property
    def slots(self) -> int: ...

    @property
    def kv_tokens(self) -> int:
        """How many tokens all slots together may hold."""
        ...

    @property
    def context(self) -> int:
        """The longest sequence, prompt and answer, in tokens."""
        ...

    @property
    def text(self) -> Text: ...

    def run(self, step: Step) -> list[Outcome]:
        """Carry out the orders, then one forward pass; for each advance that samples, in order, its outcome."""
        ...
