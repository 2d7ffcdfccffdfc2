"""The body of Text Generation Inference's endpoints: the parameters this service honours, and those it refuses."""

from __future__ import annotations

import json
from random import getrandbits
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.native.schema import MOST_TOKENS, Penalty, StopString, Text, TokenCount
from serve_app.api.openai.schema import MOST_ANSWERS
from serve_app.api.schema import Body, Nested
from serve_app.config import SamplingDefaults
from serve_app.core.requests import Grammar, GrammarKind, SamplingParams
from serve_app.errors import InvalidRequest

MOST_STOPS = 16
# A seed of ours is told to the caller, who may read it as a double.
SEED_BITS = 48

KINDS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "json_schema": "json_schema",
    "regex": "regex",
}


def _refused(why: str) -> BeforeValidator:
    """For a parameter of TGI's that is not honoured; false says the same as leaving it out."""

    def refuse(value: object) -> None:
        if value is not False:
            raise PydanticCustomError("not_honoured", "Input {why}", {"why": why})

    return BeforeValidator(refuse, json_schema_input_type=Literal[False] | None)


_NAMED = {
    "type": "object",
    "required": ["schema"],
    "properties": {"schema": {"type": "object"}, "name": {"type": "string"}, "strict": {}},
    "additionalProperties": False,
}
# What GrammarField judges, as a JSON schema.
_FORMS: Any = {
    "oneOf": [
        {"properties": {"type": {"const": "regex"}, "value": {"type": "string", "minLength": 1}}},
        {"properties": {"type": {"const": "json_schema"}, "value": _NAMED}},
        {"properties": {"type": {"enum": ["json", "json_object"]}, "value": {"type": ["object", "string"]}}},
    ]
}


class GrammarField(Body):
    """`value` is a JSON schema (an object, or its text), a regular expression, or {"name", "schema"}."""

    model_config = ConfigDict(json_schema_extra=_FORMS)

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: object

    @model_validator(mode="after")
    def _value_goes_with_its_type(self) -> Self:
        if self.type == "regex":
            fits, wanted = isinstance(self.value, str) and self.value != "", "a regular expression"
        elif self.type == "json_schema":
            fits, wanted = _is_named_schema(self.value), 'an object with "schema", and "name" or not'
        else:
            fits, wanted = isinstance(self.value, dict | str), "a JSON schema"
        if not fits:
            message = "Input should have {wanted} as its value when its type is {type}"
            raise PydanticCustomError("grammar_value", message, {"wanted": wanted, "type": self.type})
        return self

    def grammar(self) -> Grammar:
        """Raises InvalidRequest when a schema's text is none."""
        value = self.value
        if self.type in ("json", "json_object") and isinstance(value, str):
            _check_schema(value, self.type)
        if self.type == "json_schema":
            assert isinstance(value, dict), "it was judged so"
            value = value["schema"]
        text = value if isinstance(value, str) else json.dumps(value)
        return Grammar(KINDS[self.type], text, "parameters.grammar")


def _check_schema(text: str, type_: str) -> None:
    try:
        fits = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        fits = False
    if not fits:
        message = f"parameters.grammar should have a JSON schema as its value when its type is {type_}"
        raise InvalidRequest(message, param="parameters.grammar")


def _is_named_schema(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"name", "schema", "strict"}:
        return False
    return isinstance(value.get("schema"), dict) and isinstance(value.get("name", ""), str)


class Parameters(Body):
    """TGI's names. What is absent switches its rule off. Where nothing says whether to sample, a temperature or a
    filter does, as in TGI.
    """

    max_new_tokens: TokenCount = 100
    """The answer ends with so many tokens."""
    do_sample: bool | None = None
    """false is greedy; left out, a temperature or a filter says so."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """How far from greedy tokens are drawn."""
    top_k: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """Draw among so many of the likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Draw among the likeliest tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits of tokens that are in the prompt or the answer already."""
    frequency_penalty: Penalty = 0.0
    """Taken from a token's logit for every time that it is in the answer."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """The same request with the same seed gets the same answer."""
    stop: Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True, default_factory=list)]
    """The answer ends with the first of these."""
    truncate: TokenCount | None = None
    """Only so many of the prompt's last tokens are kept."""
    return_full_text: bool = False
    """Whether the prompt stands before its answer."""
    details: bool = False
    """Whether tokens and their log probabilities, the seed and the reason of the end are told."""
    decoder_input_details: bool = False
    best_of: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    """Draw so many answers, and tell the one whose tokens were the likeliest on average."""
    top_n_tokens: Annotated[int, Field(ge=0, le=20)] = 0
    """How many of the likeliest tokens to tell beside each one."""
    grammar: GrammarField | None = None
    """What the answer looks like."""
    typical_p: Annotated[None, _refused("is not honoured here; leave it out, or use top_p")] = None
    watermark: Annotated[None, _refused("is not honoured here; leave it out or send false")] = None
    adapter_id: Annotated[None, _refused("is not honoured here: the model serves without adapters; leave it out")] = (
        None
    )

    @property
    def detailed(self) -> bool:
        """Who asks for the details of the prompt has those of the answer, as in TGI."""
        return self.details or self.decoder_input_details

    @property
    def samples(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p is not None

    def sampling(self, defaults: SamplingDefaults, logprobs: int | None) -> SamplingParams:
        """With a seed that can be told, where it matters."""
        samples = self.samples
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=(self.temperature or defaults.temperature or 1.0) if samples else 0.0,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=getrandbits(SEED_BITS) if samples and self.seed is None else self.seed,
            stop=tuple(self.stop),
            logprobs=logprobs,
            include_stop_str_in_output=True,
            grammar=None if self.grammar is None else self.grammar.grammar(),
            prompt_logprobs=0 if self.decoder_input_details else None,
        )


class TgiBody(Body):
    """`stream` decides at `/` only; elsewhere the path does, and it must not say otherwise."""

    model: str | None = None
    """Left out, that of `?model=` or the first of the configuration."""
    inputs: Text
    """The text to go on with."""
    parameters: Annotated[Parameters, Field(default_factory=lambda: Parameters())]
    stream: bool | None = None
    """Whether the answer comes in events; at /generate and /generate_stream the path decides."""

    nested: ClassVar[Nested] = {"parameters": Parameters, "grammar": GrammarField}

    @property
    def prefix(self) -> str:
        """What the text of an answer begins with."""
        return self.inputs if self.parameters.return_full_text else ""

    def params(self, defaults: SamplingDefaults, streams: bool) -> SamplingParams:
        """Raises InvalidRequest when fields contradict each other."""
        asked = self.parameters
        if asked.decoder_input_details and streams:
            raise InvalidRequest(
                "parameters.decoder_input_details is told with a whole answer; do not stream, or leave it out",
                param="parameters.decoder_input_details",
            )
        if asked.best_of > 1 and streams:
            raise InvalidRequest(
                f"parameters.best_of {asked.best_of} is known when all answers have ended; do not stream, or send 1",
                param="parameters.best_of",
            )
        if asked.best_of > 1 and not asked.samples:
            raise InvalidRequest(
                f"parameters.best_of {asked.best_of} would be the same greedy answer again; set parameters.do_sample",
                param="parameters.best_of",
            )
        told = streams or asked.detailed or asked.best_of > 1
        return asked.sampling(defaults, asked.top_n_tokens if told else None)
