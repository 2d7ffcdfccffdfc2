"""The bodies of the native endpoints, and the sampling fields that both dialects share."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from serve_app.api.schema import Body
from serve_app.config import SamplingDefaults
from serve_app.core.requests import Grammar, GrammarKind, SamplingParams
from serve_app.errors import InvalidRequest

MOST_TOKENS = 2**31 - 1  # far above any context; keeps what crosses borders within 32 bits


def _one_or_many(value: object) -> object:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop_type", "Input should be a string or a list of strings")
    return [value] if isinstance(value, str) else value


def _something_is_left(count: int) -> int:
    if count == 0:
        raise PydanticCustomError("nothing_left", "Input should be 1 or more, or -1 for as many as the model takes")
    return count


TokenCount = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
KeptTokens = Annotated[
    int,
    Field(ge=-1, le=MOST_TOKENS, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_something_is_left),
]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
_StopStrings = Annotated[list[StopString], Field(max_length=16, fail_fast=True)]
StopStrings = Annotated[_StopStrings, BeforeValidator(_one_or_many, json_schema_input_type=StopString | _StopStrings)]


Text = Annotated[str, Field(min_length=1)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
# What an answer may look like, by vLLM's names, and what the engine calls it.
GUIDES: dict[str, GrammarKind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "lark",
}


class SamplingFields(Body):
    """How tokens are chosen, what an answer looks like, and how its request is treated."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """How far from greedy (0) tokens are drawn. Left out, the model's default."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens that together have this probability. Left out, the model's default."""
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    """Draw among so many of the likeliest tokens; 0 among all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Divides the logits of tokens that are in the prompt or the answer already; below 1 favours them."""
    presence_penalty: Penalty = 0.0
    """Taken from the logits of tokens that are in the answer already."""
    frequency_penalty: Penalty = 0.0
    """Taken from a token's logit for every time that it is in the answer."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """The same request with the same seed gets the same answer, alone or in a crowd."""
    stop: Annotated[StopStrings, Field(default_factory=list)]
    """A text or several; the answer ends before the first of them."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True, default_factory=list)]
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Go on where the model would end."""
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    """Nothing ends the answer before it has so many tokens."""
    logit_bias: Annotated[Bias, Field(default_factory=dict)]
    """By token id, what is added to its logit."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    include_stop_str_in_output: bool = False
    """Whether what ended the answer stays in its text."""
    guided_json: dict[str, object] | None = None
    """A JSON schema that the answer follows."""
    guided_regex: Text | None = None
    """A regular expression (Rust's syntax, without looking around) for the whole answer."""
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """The answer is one of these."""
    guided_grammar: Text | None = None
    """A grammar in llguidance's dialect of Lark that the answer follows."""
    truncate_prompt_tokens: KeptTokens | None = None
    """Only so many of the prompt's last tokens are kept; -1 for as many as the model takes."""
    priority: Priority = 0
    """Of requests that wait, the lowest is served first."""
    cache_salt: Annotated[str, Field(max_length=128)] = ""
    """Only requests with the same one share what is computed of a common beginning."""

    def grammars(self) -> list[Grammar]:
        """What the answer must look like, by each field that says so."""
        asked = [(name, getattr(self, name)) for name in GUIDES]
        return [
            Grammar(GUIDES[name], value if isinstance(value, str) else json.dumps(value), name)
            for name, value in asked
            if value is not None
        ]

    def _grammar(self) -> Grammar | None:
        """Raises InvalidRequest."""
        grammars = self.grammars()
        if len(grammars) > 1:
            names = " and ".join(grammar.field for grammar in grammars)
            raise InvalidRequest(f"{names} each say what the answer looks like; send one", param=grammars[1].field)
        return grammars[0] if grammars else None

    def sampling(
        self, defaults: SamplingDefaults, max_tokens: int | None, logprobs: int | None, greedy: bool = False
    ) -> SamplingParams:
        """Raises InvalidRequest when fields contradict each other."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is above max_tokens {max_tokens}; lower it", param="min_tokens"
            )
        temperature = defaults.temperature if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if greedy else temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            grammar=self._grammar(),
        )


class NativeFields(SamplingFields):
    model: str | None = None
    """Left out, the first of the configuration."""
    max_tokens: TokenCount = 128
    """The answer ends with so many tokens."""
    do_sample: bool | None = None
    """false is temperature 0."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to tell beside each one, with their log probabilities."""

    def params(self, defaults: SamplingDefaults) -> SamplingParams:
        params = self.sampling(defaults, self.max_tokens, self.logprobs, greedy=self.do_sample is False)
        if self.do_sample and params.temperature == 0:
            raise InvalidRequest(
                "do_sample: true needs a temperature above 0; raise temperature or leave do_sample out",
                param="do_sample",
            )
        return params


class GenerateBody(NativeFields):
    prompt: Text
    """The text to go on with."""


class StreamBody(GenerateBody):
    include_text: bool = True
    """Whether every frame has all text so far."""


def _one_way(schema: dict[str, Any]) -> None:
    """What BatchBody.items refuses, as a JSON schema."""
    nothing = {name: {"type": "null"} for name in schema["properties"]}
    several = {"type": "array", "minItems": 1}
    schema["oneOf"] = [
        {"required": ["prompts"], "properties": {"prompts": several, "requests": {"type": "null"}}},
        {"required": ["requests"], "properties": {**nothing, "requests": several}},
    ]


class BatchBody(NativeFields):
    """Prompts that share their fields, or requests that bring their own. Items are judged one by one, later."""

    model_config = ConfigDict(json_schema_extra=_one_way)

    prompts: list[object] | None = None
    """Texts that share the other fields."""
    requests: list[object] | None = None
    """Bodies of /generate."""

    def items(self) -> list[object]:
        """One native body each, not yet parsed. Raises InvalidRequest."""
        shared = self.model_dump(exclude={"prompts", "requests"}, exclude_unset=True)
        if self.prompts is not None and self.requests is None:
            return [{**shared, "prompt": prompt} for prompt in self.prompts]
        if self.requests is None or self.prompts is not None:
            raise InvalidRequest("send exactly one of prompts and requests", param="prompts")
        if shared:
            name = next(iter(shared))
            raise InvalidRequest(f"{name} goes with prompts; put it into each of the requests", param=name)
        return self.requests
