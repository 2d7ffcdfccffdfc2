"""Events that a model emits for a request: frozen data that crosses process borders."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why an answer ended. `stop` covers the end token, stop token ids and stop strings."""

    STOP = "stop"
    LENGTH = "length"


# Outcomes of a request besides the finish reasons: an embedding was returned; the client left.
EMBEDDED = "embedded"
CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the vocabulary with its log probability before temperature and filters.

    `raw` are the token's bytes if they are not a text of whole characters; None if they are `token` in UTF-8.
    """

    token_id: int
    token: str
    logprob: float
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The chosen token and the likeliest alternatives.

    `rank` is 1 plus the number of likelier tokens; it is reported for tokens of a prompt only.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of the answer that is not part of a tool call."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text of the model's reasoning, before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A part of tool call number `index`, counted from 0.

    The first delta of a call carries its `name`; later ones carry more of its `arguments`, exactly as generated.
    """

    index: int
    name: str = ""
    arguments: str = ""


Delta = TextDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token.

    `text` is the text that this token completed: "" while a stop string or part of a character is held back.
    `elapsed_s` counts from the request's arrival. `finish_reason` is set on the last event only. `stopped_by` is the
    stop string or stop token id of the request that ended the answer; None if the model ended by itself.

    `deltas` is the same text, divided into reasoning, content and tool calls; None if the answer is not divided: the
    text is the content then. All events of an answer are divided, or none. Text whose kind is not certain yet is held
    back in the deltas, so that they can be behind `text`; the last event completes them.
    """

    token_id: int
    text: str
    elapsed_s: float
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    stopped_by: str | int | None = None
    deltas: tuple[Delta, ...] | None = None


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token of a text: its id, its text when decoded alone, and the characters `start` to `end` that it covers."""

    token_id: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PromptDetails:
    """A prompt as the engine read it: the tokens of `text`, and `logprobs` of every token except the first.

    The text of a text prompt is as it was sent, from the first token that was kept; that of other prompts is decoded.
    """

    tokens: tuple[TextToken, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one flush, oldest first, with the facts about the request that are known since its admission.

    `queue_s` is the time from arrival until the engine began to compute the prompt, of which `cached_tokens` were in
    the prefix cache. `prompt` is set in the first chunk if the request asked for it. An `embedding`, whose numbers fit
    float32, comes in the only chunk of its request, without events. `began_ns` is set in the first chunk of a traced
    request: the instant when the engine began with the prompt, by its wall clock, in ns since 1970.

    A `replayed` chunk was computed for another request: its token counts are those of that request, and its times are
    the receiver's own.
    """

    events: tuple[TokenEvent, ...]
    prompt_tokens: int
    queue_s: float
    cached_tokens: int = 0
    prompt: PromptDetails | None = None
    embedding: tuple[float, ...] | None = None
    began_ns: int = 0
    replayed: bool = False

    @property
    def finished(self) -> bool:
        """Whether this is the request's last chunk."""
        return self.embedding is not None or (bool(self.events) and self.events[-1].finish_reason is not None)

    @property
    def outcome(self) -> str:
        """The outcome of the request whose last chunk this is: the finish reason, or EMBEDDED."""
        reason = self.events[-1].finish_reason if self.events else None
        return EMBEDDED if reason is None else reason.value
