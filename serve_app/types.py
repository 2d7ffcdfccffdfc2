"""What crosses borders between rooms and processes: frozen data, no behaviour beyond derived values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Literal, TypeVar


class FinishReason(StrEnum):
    """Why a sequence ended. `stop` covers the end token, stop token ids and stop strings."""

    STOP = "stop"
    LENGTH = "length"


# How a request ended that has all of its answer, beside its finish reason; and one whose caller left.
EMBEDDED = "embedded"
CANCELLED = "cancelled"

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, to its last character.

    `text` is nothing for a `json_object`, a JSON schema (an object), a regular expression for the whole answer
    (Rust's syntax, without looking around), a JSON list of strings to choose from, or a grammar in llguidance's
    dialect of Lark. `field` is what the caller calls it, for a refusal. `parts` are what a caller gave of it, each by
    its own name: if the whole cannot be used, the first of them that cannot either is refused.
    """

    kind: GrammarKind
    text: str = ""
    field: str = "grammar"
    parts: tuple[Grammar, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request wants its tokens chosen.

    `temperature` 0 is greedy. `max_tokens` None means up to the model's context.
    `top_k` 0, `top_p` 1 and `min_p` 0 switch the filter off. `logprobs` is how many
    alternatives to report beside the chosen token; None reports nothing.

    `skip_special_tokens` false shows special tokens in the text. `include_stop_str_in_output` leaves what ended the
    answer at its end: the stop string, the stop token, or, if special tokens are shown, the model's end token.

    `logit_bias` is pairs of a token id and what is added to its logit, before penalties, temperature and filters, also
    for a greedy choice; the logprobs that are reported are without it.

    `prompt_logprobs` is how many alternatives to report for each token of the prompt but the first, which nothing
    foretells; None reports nothing. Such a prompt is computed afresh.

    `grammar` comes before everything else that is asked for: penalties and filters choose among the tokens that it
    allows, `min_tokens` and `ignore_eos` keep an answer going only while it can go on, and an answer that can not ends
    there with `stop`. Stop strings, stop tokens and `max_tokens` still end an answer before it is complete.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What an assistant asked for. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of role `tool` is what the tool called `name` said to the call `tool_call_id`."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's own chat template, which adds the assistant's turn.

    `tools` are those that it may call, each as JSON in OpenAI's form.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[str, ...] = ()


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one model. `timeout_s` is what is left of the request's time at the receiver's door.

    Requests share what is computed of a common beginning only if their `cache_salt` is the same.

    Requests for several answers to one prompt have the same `group`, a name that nobody else has, and count themselves
    by `index` from 0: the prompt is computed once for all of them, and number i draws with seed + i, as a request of
    its own with that seed would.

    Of a prompt only the last `truncate_prompt_tokens` tokens are kept, special tokens and a chat's template counted;
    -1 keeps as many as the model takes, None all.

    Of those who wait, the lowest `priority` is served first, and of equals who came first. Whoever runs goes on, except
    when memory runs out: then the highest is put off first.

    `show_prompt` has the first chunk tell the prompt's tokens and text. `embed` asks for the prompt's embedding instead
    of an answer: the mean of the model's last hidden states over all tokens, of length 1.

    `traceparent`, as in W3C Trace Context, is the span that the request's spans belong under; "" if it is not traced.
    """

    id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    timeout_s: float
    cache_salt: str = ""
    group: str = ""
    index: int = 0
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    show_prompt: bool = False
    embed: bool = False
    traceparent: str = ""

    @property
    def operation(self) -> str:
        """What is asked for, by OpenTelemetry's semantic conventions for generative AI."""
        if self.embed:
            return "embeddings"
        return "chat" if isinstance(self.prompt, ChatPrompt) else "text_completion"


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
class Piece:
    """A token of a text: its id, what it looks like by itself, and which characters of the text it covers."""

    token_id: int
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ShownPrompt:
    """What a request asked to be told of its prompt: `pieces` of `text`, and `logprobs` of every token but the first.

    A text is as it was sent, from the first token that was kept; anything else is as it is decoded.
    """

    pieces: tuple[Piece, ...] = ()
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
    prompt: ShownPrompt | None = None
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


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One HTTP call that has ended. `route` is a pattern of ours or "other"; sizes are of bodies, in bytes.

    `status` is None if the client left before it was sent one.
    """

    route: str
    method: str
    status: int | None
    seconds: float
    received: int
    sent: int


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


class Question(Generic[A]):
    """What can be asked of a model besides an answer, and takes no step of it; `A` is the type of what is said."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Tokenize(Question[tuple[Piece, ...]]):
    """The tokens of a prompt, with those that the tokenizer puts around a text or without.

    A chat's template writes its own. What is no character of the prompt covers none.
    """

    prompt: Prompt
    special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Detokenize(Question[str]):
    """The text of tokens, special ones by name or left out."""

    token_ids: tuple[int, ...]
    skip_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class ToolSyntax:
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
    tools: ToolSyntax | None = None


@dataclass(frozen=True, slots=True)
class Describe(Question[ModelInfo]):
    """What the model is."""
