"""One request inside the engine, and the plain data of a step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import getrandbits
from typing import Protocol

from serve_app.core.events import Logprobs
from serve_app.core.requests import Adapter, SamplingParams
from serve_app.engines.ending import Ending
from serve_app.engines.native.drafts import Drafter
from serve_app.engines.native.kv_cache import CacheOp
from serve_app.engines.stream import Embedding, Token, TokenStream
from serve_app.engines.text.protocol import Constraint, Text
from serve_app.errors import InternalError, ServeAppError


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token that a step sampled for one sequence."""

    token_id: int
    logprobs: Logprobs | None = None


class PromptReadout:
    """Collects the log probabilities, or the embedding, of a prompt's first `rows` rows as they are computed.

    `collected` rows are known. A row that is computed again after a preemption is not collected again.
    """

    __slots__ = ("_sums", "collected", "logprobs", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.collected = 0
        self.logprobs: tuple[Logprobs, ...] = ()
        self._sums: tuple[float, ...] = ()

    @property
    def complete(self) -> bool:
        return self.collected >= self.rows

    def add_logprobs(self, logprobs: Seq[Logprobs]) -> None:
        """Add the log probabilities that the next rows give to the tokens after them."""
        self.logprobs += tuple(logprobs)
        self.collected += len(logprobs)

    def add_states(self, sums: Seq[float], rows: int) -> None:
        """Add the sums of the last hidden states of the next `rows` rows, one number for each dimension."""
        self._sums = tuple(map(sum, zip(self._sums, sums, strict=True))) if self._sums else tuple(sums)
        self.collected += rows

    def embedding(self) -> tuple[float, ...] | ServeAppError:
        """The mean of all hidden states, scaled to length 1. States that are all 0, as of padding tokens, give 0."""
        length = math.hypot(*self._sums)
        if not length < math.inf:
            return InternalError("the model computed no numbers for this text; it may be too unusual for its precision")
        return tuple(array("f", (value / (length or 1.0) for value in self._sums)))


class Sequence:
    """The tokens of one request and their state in the KV cache.

    `tokens` is the prompt followed by the answer. The keys and values of the first `computed` tokens are in slot
    `slot`; while the sequence decodes, only its last token is not computed. `arrival` counts sequences in the order
    of their arrival. The chunks of a `long_prompt` are limited to bound the delay of running sequences. `readout`
    collects what the request wants to know of its prompt. A sequence that `embeds` ends with its prompt. Computed
    tokens are shared only with sequences of the same `salt`, which includes the content of the LoRA adapter.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "computed",
        "deadline",
        "drafter",
        "embeds",
        "ending",
        "long_prompt",
        "params",
        "prompt_len",
        "readout",
        "salt",
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
        assert prompt, "a sequence needs at least one token"
        params = stream.params
        self.stream = stream
        self.params: SamplingParams = params
        self.tokens = [*prompt, *stream.request.resumed]
        self.prompt_len = len(prompt)
        self.adapter = stream.adapter
        self.salt = _salt(stream)
        self.embeds = stream.request.embed
        self.readout = self._make_readout()
        self.computed = 0
        self.long_prompt = False
        self.arrival = 0
        self.drafter = Drafter()
        self.slot: int | None = None
        self.deadline = stream.request.deadline
        self.seed = getrandbits(63) if params.seed is None else params.seed + stream.request.index
        self.ending = Ending.of(params, constraint, end_ids, context - self.prompt_len)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end the answer."""
        return self.ending.end_ids

    @property
    def max_tokens(self) -> int:
        """The maximum number of tokens of the answer."""
        return self.ending.max_tokens

    @property
    def constraint(self) -> Constraint | None:
        """The position of the answer in its grammar."""
        return self.ending.constraint

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def pending(self) -> int:
        """The number of tokens that are not in the KV cache yet: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def needs_readout(self) -> bool:
        """Whether rows of the prompt still have to be collected, so that they cannot come from the prefix cache."""
        return self.readout is not None and not self.readout.complete

    def propose_drafts(self, count: int) -> tuple[int, ...]:
        """At most `count` draft tokens; none if the choice of a token depends on the answer so far."""
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
        return self.drafter.propose(self.tokens, min(count, self.max_tokens - self.generated - 1))

    def accept(self, sampled: Sampled, now: float) -> Token:
        """Append a sampled token. The returned token has a finish reason if it ends the answer."""
        self.tokens.append(sampled.token_id)
        reason, complete = self.ending.reason(sampled.token_id, self.generated)
        prompt_logprobs = self.readout.logprobs if self.readout is not None and self.generated == 1 else None
        elapsed_s = now - self.stream.arrived
        return Token(sampled.token_id, elapsed_s, reason, sampled.logprobs, complete, prompt_logprobs)

    def embedding(self) -> Embedding | ServeAppError:
        """The embedding of the prompt, once all of it is computed."""
        assert self.readout is not None
        vector = self.readout.embedding()
        return vector if isinstance(vector, ServeAppError) else Embedding(vector)

    def _make_readout(self) -> PromptReadout | None:
        if self.embeds:
            return PromptReadout(self.prompt_len)
        return None if self.params.prompt_logprobs is None else PromptReadout(self.prompt_len - 1)


def _salt(stream: TokenStream) -> str:
    """Different for any two pairs of an adapter's content, or none, and the caller's salt."""
    salt = stream.request.prefix_salt
    if stream.adapter is not None:
        return f"{stream.adapter.digest}\0{salt}"
    return f"\0{salt}" if "\0" in salt else salt


@dataclass(frozen=True, slots=True)
class Advance:
    """Computes the next `count` tokens of a sequence and, if these are its last, samples the token after them.

    Prefill, chunked prefill and decode differ only in `count`. `drafts` are computed after these tokens: a draft is
    accepted if it equals the token sampled before it, and then one more token is sampled after it.
    """

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        return self.completes and not self.sequence.embeds

    @property
    def completes(self) -> bool:
        """Whether all tokens of the sequence are in the KV cache after this step."""
        return self.count == self.sequence.pending

    @property
    def readout_rows(self) -> range:
        """The rows of this advance, counted from 0, that the sequence's readout still has to collect."""
        readout, start = self.sequence.readout, self.sequence.computed
        if readout is None:
            return range(0)
        return range(max(0, readout.collected - start), min(self.count, readout.rows - start))

    @property
    def rows(self) -> int:
        return self.count + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: decoding sequences by slot, then prompt chunks. The runner executes `cache_ops` before it."""

    advances: tuple[Advance, ...]
    cache_ops: tuple[CacheOp, ...] = ()

    @property
    def rows(self) -> int:
        return sum(advance.rows for advance in self.advances)


# The result of a step for one sequence: a token, and one more for each draft that may be accepted; or an error.
Outcome = tuple[Sampled, ...] | ServeAppError


class Runner(Protocol):
    """A model with a KV cache. Created and called on the engine's thread only."""

    @property
    def kind(self) -> str:
        """How steps are computed: `fused`, `transformers` or `toy`."""
        ...

    @property
    def quantization(self) -> str:
        """The quantization of the weights: `none`, `int8` or `int4`."""
        ...

    @property
    def dtype_name(self) -> str:
        """The dtype of the weights before quantization, such as `bfloat16`; empty for a runner without weights."""
        ...

    @property
    def slots(self) -> int: ...

    @property
    def kv_tokens(self) -> int:
        """The number of tokens that all slots together can hold."""
        ...

    @property
    def context(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        ...

    @property
    def text(self) -> Text: ...

    def load_adapter(self, adapter: Adapter) -> tuple[str, object]:
        """Read a LoRA adapter: the digest of its files, and its weights. Called on any thread. Raises ServeAppError."""
        ...

    def run(self, step: Step) -> list[Outcome]:
        """Execute the cache operations, then one forward pass; one outcome for each advance that samples, in order.

        Adds the `readout_rows` of each advance to the readout of its sequence.
        """
        ...
