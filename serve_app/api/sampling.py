"""The sampling fields that the native and OpenAI's bodies share, and the field types of all dialects."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.schema import Body
from serve_app.config import SamplingDefaults
from serve_app.core.requests import GenerationRequest, Grammar, GrammarKind, SamplingParams
from serve_app.errors import InvalidRequest

MAX_TOKENS = 2**31 - 1  # far above any context; keeps the integers of a request within 32 bits
MAX_ANSWERS = 16  # answers to one prompt; each takes a slot of the model


def _string_or_list(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop_type", "Input should be a string or a list of strings")
    return [value] * (value != "") if isinstance(value, str) else value


def _not_zero(count: int) -> int:
    if count == 0:
        raise PydanticCustomError("zero", "Input should be 1 or more, or -1 for as many tokens as the model takes")
    return count


TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TruncateTo = Annotated[
    int,
    Field(ge=-1, le=MAX_TOKENS, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_not_zero),
]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
_StopStrings = Annotated[list[StopString], Field(max_length=16, fail_fast=True)]
StopStrings = Annotated[
    _StopStrings,
    BeforeValidator(_string_or_list, json_schema_input_type=Annotated[str, Field(max_length=256)] | _StopStrings),
]
Text = Annotated[str, Field(min_length=1)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
# vLLM's fields for the form of an answer, and the kind of grammar of each.
GUIDED_FIELDS: dict[str, GrammarKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "lark",
}


class SamplingFields(Body):
    """Fields for sampling, for the form of the answer and for the scheduling of the request."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """The sampling temperature; 0 is greedy. The default is that of the model."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most likely tokens that together have this probability. The default is that of the model."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] = 0
    """Sample from this number of the most likely tokens; 0 and -1 sample from all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample from the tokens that have at least this fraction of the probability of the most likely token."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Divides the logits of tokens of the prompt and of the answer so far; a value below 1 makes them more likely."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens of the answer so far."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logit of a token once for each time that it occurs in the answer so far."""
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = None
    """The same request with the same seed gets the same answer; -1 is a random seed."""
    stop: Annotated[StopStrings, Field(default_factory=list)]
    """A string or a list of strings. The answer ends before the first one that occurs in it."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True, default_factory=list)]
    """Ids of tokens that end the answer."""
    ignore_eos: bool = False
    """Whether the answer continues after the model's end token."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0
    """The minimum number of tokens of the answer."""
    logit_bias: Annotated[LogitBias, Field(default_factory=dict)]
    """Maps token ids to values that are added to their logits."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    include_stop_str_in_output: bool = False
    """Whether the stop string or stop token that ended the answer stays in its text."""
    guided_json: dict[str, object] | None = None
    """A JSON schema that the answer follows."""
    guided_regex: Text | None = None
    """A regular expression (Rust's syntax, without look-around) that the whole answer matches."""
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """The answer is one of these strings."""
    guided_grammar: Text | None = None
    """A grammar in llguidance's dialect of Lark that the answer follows."""
    truncate_prompt_tokens: TruncateTo | None = None
    """Keep only this number of tokens from the end of the prompt; -1 keeps as many as the model takes."""
    priority: Priority = 0
    """The waiting request with the lowest value is served first."""
    cache_salt: Annotated[str, Field(max_length=128)] = ""
    """Requests share the computed beginning of their prompts only if they have the same salt."""

    def grammars(self) -> list[Grammar]:
        """One grammar for each field that sets the form of the answer."""
        given = [(name, getattr(self, name)) for name in GUIDED_FIELDS]
        return [
            Grammar(GUIDED_FIELDS[name], value if isinstance(value, str) else json.dumps(value), name)
            for name, value in given
            if value is not None
        ]

    def _grammar(self) -> Grammar | None:
        """Raises InvalidRequest."""
        grammars = self.grammars()
        if len(grammars) > 1:
            names = " and ".join(f"'{grammar.field}'" for grammar in grammars)
            raise InvalidRequest(
                f"Fields {names} each set the form of the answer. Send one of them.", param=grammars[1].field
            )
        return grammars[0] if grammars else None

    def sampling(
        self, defaults: SamplingDefaults, max_tokens: int | None, logprobs: int | None, greedy: bool = False
    ) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"Field 'min_tokens' is {self.min_tokens}, above max_tokens {max_tokens}. Lower it.",
                param="min_tokens",
            )
        temperature = defaults.temperature if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if greedy else temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed == -1 else self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            grammar=self._grammar(),
        )

    def scheduled(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the fields for its scheduling."""
        return replace(
            request,
            cache_salt=self.cache_salt,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority,
        )
