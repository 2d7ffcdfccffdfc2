"""Requests to a model: frozen data that crosses process borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    With `prompt_details` the first chunk carries the prompt's tokens and text. `embed` requests the prompt's embedding
    instead of an answer: the mean of the model's last hidden states over all tokens, of length 1.

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
    prompt_details: bool = False
    embed: bool = False
    traceparent: str = ""

    @property
    def operation(self) -> str:
        """What is asked for, by OpenTelemetry's semantic conventions for generative AI."""
        if self.embed:
            return "embeddings"
        return "chat" if isinstance(self.prompt, ChatPrompt) else "text_completion"
