"""One request inside the engine, and the plain data of a step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import getrandbits
from typing import Protocol

from serve_app.core.events import FinishReason, Logprobs, TextToken
from serve_app.core.requests import Grammar, Prompt, SamplingParams
from serve_app.engines.native.drafts import Drafter
from serve_app.engines.native.kv_cache import Copy, Trim
from serve_app.engines.native.stream import Embedded, Token, TokenStream
from serve_app.engines.text.detokenizer import Decoder
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.errors import InternalError, ServeAppError


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


class Reading:
    """What is gathered of a prompt's first `rows` rows as they are computed; `done` of them are known.

    A row that is computed again after a preemption is not read again.
    """

    __slots__ = ("_sums", "done", "logprobs", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.done = 0
        self.logprobs: tuple[Logprobs, ...] = ()
        self._sums: tuple[float, ...] = ()

    def add_logprobs(self, logprobs: Seq[Logprobs]) -> None:
        """Of the tokens that come after the next rows."""
        self.logprobs += tuple(logprobs)
        self.done += len(logprobs)

    def add_states(self, sums: Seq[float], rows: int) -> None:
        """The sums of the next rows' last hidden states."""
        self._sums = tuple(map(sum, zip(self._sums, sums, strict=True))) if self._sums else tuple(sums)
        self.done += rows

    def embedding(self) -> tuple[float, ...] | ServeAppError:
        """The mean of all states, of length 1; of states that are all 0, as a padding token's may be, it is 0."""
        length = math.hypot(*self._sums)
        if not length < math.inf:
            return InternalError("the model computed no numbers for this text; it may be too unusual for its precision")
        return tuple(array("f", (value / (length or 1.0) for value in self._sums)))


class Sequence:
    """Token ids so far, how many of them are in the KV arena, and where.

    `tokens` is the prompt and then the answer. `computed` counts the tokens whose keys and values
    are in slot `slot`; the sequence decodes when only its newest token is not. `order` counts arrivals;
    `long` is a prompt that may only advance as far as nobody notices. `reading` is what is to be told of the prompt.
    One that `embeds` ends with its prompt.
    """

    __slots__ = (
        "computed",
        "constraint",
        "deadline",
        "drafter",
        "embeds",
        "end_ids",
        "limit",
        "long",
        "order",
        "params",
        "prompt_len",
        "reading",
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
        self.embeds = stream.request.embed
        self.reading = self._reading()
        self.computed = 0
        self.long = False
        self.order = 0
        self.drafter = Drafter()
        self.slot: int | None = None
        self.deadline = stream.request.deadline
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

    @property
    def unread(self) -> bool:
        """Whether rows of its prompt are still to be read, and so to be computed for it alone."""
        return self.reading is not None and self.reading.done < self.reading.rows

    def drafts(self, count: int) -> tuple[int, ...]:
        """At most `count` guesses at its next tokens; none where a token's choice depends on more than its place."""
        p = self.params
        plain = p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0
        if (
            not plain
            or self.embeds
            or p.logprobs is not None
            or (self.end_ids and self.generated < p.min_tokens)
            or self.constraint
        ):
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
        told = self.reading.logprobs if self.reading is not None and self.generated == 1 else None
        return Token(sampled.token_id, now - self.stream.arrived, reason, sampled.logprobs, complete, told)

    def embedded(self) -> Embedded | ServeAppError:
        """What it ends with, once its whole prompt was read."""
        assert self.reading is not None
        vector = self.reading.embedding()
        return vector if isinstance(vector, ServeAppError) else Embedded(vector)

    def _reading(self) -> Reading | None:
        if self.embeds:
            return Reading(self.prompt_len)
        return None if self.params.prompt_logprobs is None else Reading(self.prompt_len - 1)


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
        return self.completes and not self.sequence.embeds

    @property
    def completes(self) -> bool:
        """Whether all its tokens are in the arena after this."""
        return self.count == self.sequence.pending

    @property
    def reads(self) -> range:
        """Those of its rows that tell of the prompt what is not known yet."""
        reading, start = self.sequence.reading, self.sequence.computed
        if reading is None:
            return range(0)
        return range(max(0, reading.done - start), min(self.count, reading.rows - start))

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
    def tools(self) -> ToolCallFormat | None:
        """How the model writes calls of tools."""
        ...

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        """Token ids of each prompt, tokenised together; an error in the place of one that cannot be."""
        ...

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
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
        """Carry out the orders, then one forward pass; for each advance that samples, in order, its outcome.

        What each advance `reads` of its prompt goes to its sequence's `reading`.
        """
        ...
