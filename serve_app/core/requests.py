"""Requests to a model: frozen data that crosses process borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve_app.core.experiments import Assignment

# What a request asks of the response cache, in the words of HTTP: with `no-cache` its answer is computed and stored,
# with `no-store` it is neither looked up nor stored.
CacheControl = Literal["", "no-cache", "no-store"]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The language of an answer, which the answer follows to its last character.

    `text` is empty for a `json_object`; otherwise it is a JSON schema (an object), a regular expression for the whole
    answer (Rust's syntax, without look-around), a JSON list of strings to choose from, or a grammar in llguidance's
    dialect of Lark. `field` is the caller's name for the grammar, for error messages. `parts` are grammars that the
    caller gave and this grammar was made from: if the whole is refused, the error names the first part that is refused
    alone. If not `strict`, the answer may break rules of a JSON schema that the grammar compiler does not support.
    """

    kind: GrammarKind
    text: str = ""
    field: str = "grammar"
    parts: tuple[Grammar, ...] = ()
    strict: bool = True


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one answer are chosen.

    `temperature` 0 is greedy. `max_tokens` None means up to the model's context. `top_k` 0, `top_p` 1 and `min_p` 0
    switch the filter off. `logprobs` is the number of alternatives to report beside each chosen token; None reports no
    log probabilities.

    `skip_special_tokens` false keeps special tokens in the text. `include_stop_str_in_output` keeps at the end of the
    answer what ended it: the stop string, the stop token, or, if special tokens are kept, the model's end token.

    `logit_bias` is pairs of a token id and a value that is added to the token's logit before penalties, temperature and
    filters, also for greedy sampling; reported log probabilities do not include it.

    `prompt_logprobs` is the number of alternatives to report for each token of the prompt except the first, which has
    no prediction; None reports none. The engine computes such a prompt in full and does not use its prefix cache.

    `grammar` takes precedence over the other fields: penalties and filters choose among the tokens that the grammar
    allows, and `min_tokens` and `ignore_eos` extend an answer only while the grammar allows another token. An answer
    that the grammar does not allow to go on ends with `stop`. Stop strings, stop tokens and `max_tokens` can end an
    answer before it is complete.
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
    """A tool call in an earlier assistant message. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of role `tool` is the result of the tool `name` for the call `tool_call_id`.

    `reasoning` is the model's reasoning before an earlier answer; a chat template shows it or leaves it out.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text. With `special_tokens` the tokenizer adds its own, for example one for the beginning of a text."""

    text: str
    special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's chat template, which adds the beginning of the assistant's turn if `begins_answer`.

    `tools` are the tools that the template shows to the model, each as JSON in OpenAI's form. `variables` is the text
    of a JSON object with further variables for the template. With `continues` the answer continues the last message.
    `template` is the source of a chat template in place of the model's own; "" is the model's own.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[str, ...] = ()
    variables: str = "{}"
    continues: bool = False
    begins_answer: bool = True
    template: str = ""


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that an answer may call. `schema` is the JSON schema of its arguments, as text.

    The arguments follow the schema. What the grammar compiler does not support in it refuses the request if `strict`,
    else it is left out. `field` is the path of the schema in the caller's body, for error messages.
    """

    name: str
    schema: str
    field: str
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools that an answer may call. `required`: the answer is a call. `parallel`: it may hold several calls.

    The engine constrains the answer to the model's own tool-call format and to the schemas of `tools`, and emits
    `deltas` with every event. A model whose chat template takes no tools refuses the request.
    """

    tools: tuple[Tool, ...]
    required: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter by its name, and where its files are: a folder, or a hub id with its `revision`.

    `digest` identifies the content of the files. An engine refuses other files if it is given; with "" it takes the
    files as it finds them when it loads the adapter.
    """

    name: str
    source: str
    revision: str | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one model, or for one of its LoRA adapters.

    `arrived` and `deadline` are instants of this process's monotonic clock, in seconds. Every stage and every item of
    a batch call spends from the same deadline; RemoteEngine converts both to the clock of the receiving process.
    `first_token_deadline` is the instant by which the answer must have begun, if the caller set one.
    `wake_wait_s` bounds the wait for a model that is scaled to zero, in seconds; None waits until the deadline.

    Requests share the computed beginning of their prompts only if their tenant and their `cache_salt` are equal.

    Requests for several answers to one prompt have the same unique `group` and differ in `index`, which counts from 0:
    the prompt is computed once for all of them, and answer i is sampled with seed + i, as a separate request with that
    seed would be.

    Only the last `truncate_prompt_tokens` tokens of the prompt are kept, special tokens and chat template included;
    -1 keeps as many as the model takes, None keeps all.

    Among waiting requests, the one with the lowest `priority` goes first, and among equals the one that arrived first.
    Running sequences continue, but when memory runs out, the sequence with the highest `priority` is preempted first.

    With `separate_reasoning` the events of a model that reasons divide the answer into reasoning and the rest.

    With `prompt_details` the first chunk carries the prompt's tokens and text. `embed` requests the prompt's embedding
    instead of an answer: the mean of the model's last hidden states over all tokens, scaled to length 1.

    `traceparent` (W3C Trace Context) is the parent of the request's spans; "" if the request is not traced.

    `resumed` are the first tokens of the answer, which a replica that was lost has sent. The engine computes them after
    the prompt, as after a preemption, and yields the tokens after them.

    Requests with the same `session`, a name of the caller's, go to the same replica unless it is much busier.

    `cache_control` is for the response cache.
    `assignment` is the variant that answers a request for an experiment.

    `tenant` and `key` are those of the caller's identity; "" without keys. An engine refuses a prompt with more than
    `prompt_limit` tokens, for which nothing is reserved, with PromptTooLong.

    `background` is a line of a batch job: no client waits for its answer, and its times are no measure of the service.
    """

    id: str
    model: str
    prompt: Prompt
    params: SamplingParams
    arrived: float
    deadline: float
    wake_wait_s: float | None = None
    cache_salt: str = ""
    group: str = ""
    index: int = 0
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    prompt_details: bool = False
    embed: bool = False
    tool_choice: ToolChoice | None = None
    separate_reasoning: bool = False
    traceparent: str = ""
    adapter: Adapter | None = None
    resumed: tuple[int, ...] = ()
    session: str = ""
    cache_control: CacheControl = ""
    assignment: Assignment | None = None
    tenant: str = ""
    key: str = ""
    prompt_limit: int | None = None
    first_token_deadline: float | None = None
    background: bool = False

    @property
    def prefix_salt(self) -> str:
        """Texts that differ if two requests must not share the computed beginning of their prompts.

        The time to the first token tells whether a prompt was computed before, so that a tenant could otherwise guess
        the prompts of another one. Without tenant it is the caller's own salt. No tenant has NUL in its name.
        """
        return f"{self.tenant}\0{self.cache_salt}" if self.tenant else self.cache_salt

    @property
    def served_name(self) -> str:
        """The name by which the caller knows the model: that of the experiment or the adapter, if there is one."""
        if self.assignment is not None:
            return self.assignment.experiment
        return self.weights_name

    @property
    def weights_name(self) -> str:
        """The name of what computes the answer: the adapter, if there is one, or the model."""
        return self.model if self.adapter is None else self.adapter.name

    @property
    def operation(self) -> str:
        """The operation's name in OpenTelemetry's semantic conventions for generative AI."""
        if self.embed:
            return "embeddings"
        return "chat" if isinstance(self.prompt, ChatPrompt) else "text_completion"

    @property
    def starts_by(self) -> float:
        """The instant by which the answer must have begun."""
        return self.deadline if self.first_token_deadline is None else min(self.deadline, self.first_token_deadline)

    @property
    def timeout_s(self) -> float:
        """The seconds between arrival and deadline."""
        return self.deadline - self.arrived
