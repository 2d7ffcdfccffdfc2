"""The bodies of the native endpoints, and the sampling fields that both dialects share."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from serve_app.api.schema_body import Body
from serve_app.config import SamplingDefaults
from serve_app.errors import InvalidRequest
from serve_app.types import Grammar, GrammarKind, SamplingParams

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
    """How tokens are chosen. What is absent comes from the model's defaults, or switches its rule off.

    `cache_salt` keeps what is computed of a prompt among the requests that carry the same one. Of a prompt only the
    last `truncate_prompt_tokens` tokens are kept; -1 keeps as many as the model takes. Of requests that wait, the
    lowest `priority` is served first.
    """

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[StopStrings, Field(default_factory=list)]
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True, default_factory=list)]
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    logit_bias: Annotated[Bias, Field(default_factory=dict)]
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    guided_json: dict[str, object] | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    guided_grammar: Text | None = None
    truncate_prompt_tokens: KeptTokens | None = None
    priority: Priority = 0
    cache_salt: Annotated[str, Field(max_length=128)] = ""

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
    max_tokens: TokenCount = 128
    do_sample: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

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


class StreamBody(GenerateBody):
    include_text: bool = True


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
    requests: list[object] | None = None

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
