"""Events that a model emits for a request: frozen data that crosses process borders."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended. `stop` covers the end token, stop token ids and stop strings."""

    STOP = "stop"
    LENGTH = "length"


# How a request ended that has all of its answer, beside its finish reason; and one whose caller left.
EMBEDDED = "embedded"
CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the vocabulary with its log probability before temperature and filters."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """`rank` is 1 and how many tokens are likelier than the chosen one; it is told of a prompt's tokens only."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token.

    `text` is what this token released: "" while a stop string or half a character is held back.
    `elapsed_s` counts from the request's arrival. `finish_reason` is set on the last event only. `stopped_by` is the
    stop string or the stop token id of the request that ended it, None where the model ended by itself.
    """

    token_id: int
    text: str
    elapsed_s: float
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    stopped_by: str | int | None = None


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a text: its id, what it looks like by itself, and which characters of the text it covers."""

    token_id: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PromptDetails:
    """What a request asked to be told of its prompt: `pieces` of `text`, and `logprobs` of every token but the first.

    A text is as it was sent, from the first token that was kept; anything else is as it is decoded.
    """

    pieces: tuple[TextToken, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one flush, oldest first, with what is known of the request since admission.

    `queue_s` is the time before the model began with this request's prompt, of which `cached_tokens` were computed
    already. The first chunk has the `prompt` if that was asked for. An `embedding`, of length 1 and in numbers that
    float32 holds, comes without tokens in the only chunk. The first chunk of a traced request tells in `began_ns` when
    that was by the model's clock, since 1970.
    """

    events: tuple[TokenEvent, ...]
    prompt_tokens: int
    queue_s: float
    cached_tokens: int = 0
    prompt: PromptDetails | None = None
    embedding: tuple[float, ...] | None = None
    began_ns: int = 0

    @property
    def finished(self) -> bool:
        """Whether it is the request's last."""
        return self.embedding is not None or (bool(self.events) and self.events[-1].finish_reason is not None)

    @property
    def outcome(self) -> str:
        """How a request ended whose last this is: the answer's finish reason, or EMBEDDED."""
        reason = self.events[-1].finish_reason if self.events else None
        return EMBEDDED if reason is None else reason.value
