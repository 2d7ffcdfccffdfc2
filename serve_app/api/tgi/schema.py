"""The body of Text Generation Inference's endpoints."""

from __future__ import annotations

import json
from random import getrandbits
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.sampling import MAX_ANSWERS, MAX_TOKENS, Penalty, StopString, Text, TokenCount
from serve_app.api.schema import Body, Nested
from serve_app.api.unused import Only
from serve_app.config import SamplingDefaults
from serve_app.core.requests import Grammar, GrammarKind, SamplingParams
from serve_app.errors import InvalidRequest

MAX_STOP_SEQUENCES = 16
# The service reports a seed that it drew itself, and callers can read it as a double.
SEED_BITS = 48

GRAMMAR_KINDS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "json_schema": "json_schema",
    "regex": "regex",
}


_NAMED_SCHEMA = {
    "type": "object",
    "required": ["schema"],
    "properties": {"schema": {"type": "object"}, "name": {"type": "string"}, "strict": {}},
    "additionalProperties": False,
}
# The rules of GrammarField's validator as a JSON schema.
_GRAMMAR_TYPES: Any = {
    "oneOf": [
        {"properties": {"type": {"const": "regex"}, "value": {"type": "string", "minLength": 1}}},
        {"properties": {"type": {"const": "json_schema"}, "value": _NAMED_SCHEMA}},
        {"properties": {"type": {"enum": ["json", "json_object"]}, "value": {"type": ["object", "string"]}}},
    ]
}


class GrammarField(Body):
    model_config = ConfigDict(json_schema_extra=_GRAMMAR_TYPES)

    type: Literal["json", "json_object", "regex", "json_schema"]
    """What `value` is."""
    value: object
    """A JSON schema (an object or its text), a regular expression, or an object with "schema" and a "name"."""

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if self.type == "regex":
            valid, expected = isinstance(self.value, str) and self.value != "", "a regular expression"
        elif self.type == "json_schema":
            valid, expected = _is_named_schema(self.value), 'an object with "schema" and an optional "name"'
        else:
            valid, expected = isinstance(self.value, dict | str), "a JSON schema"
        if not valid:
            message = "Input should have {expected} as its value when its type is '{type}'"
            raise PydanticCustomError("grammar_value", message, {"expected": expected, "type": self.type})
        return self

    def grammar(self) -> Grammar:
        """Raises InvalidRequest if the text of a schema is no JSON schema."""
        value = self.value
        if self.type in ("json", "json_object") and isinstance(value, str):
            _check_schema(value, self.type)
        if self.type == "json_schema":
            assert isinstance(value, dict), "the validator checked it"
            value = value["schema"]
        text = value if isinstance(value, str) else json.dumps(value)
        return Grammar(GRAMMAR_KINDS[self.type], text, "parameters.grammar")


def _check_schema(text: str, type_: str) -> None:
    try:
        valid = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise InvalidRequest(
            f"Field 'parameters.grammar' should have a JSON schema as its value when its type is '{type_}'.",
            param="parameters.grammar",
        )


def _is_named_schema(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"name", "schema", "strict"}:
        return False
    return isinstance(value.get("schema"), dict) and isinstance(value.get("name", ""), str)


class Parameters(Body):
    """TGI's parameters. As in TGI, the answer is sampled if `do_sample`, a temperature or a filter is set."""

    max_new_tokens: TokenCount = 100
    """The maximum number of tokens of the answer."""
    do_sample: bool | None = None
    """Whether to sample. By default the answer is sampled if a temperature or a filter is set."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """The sampling temperature."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """Sample from this number of the most likely tokens."""
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Sample from the most likely tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits of tokens of the prompt and of the answer so far."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logit of a token once for each time that it occurs in the answer so far."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """The same request with the same seed gets the same answer."""
    stop: Annotated[list[StopString], Field(max_length=MAX_STOP_SEQUENCES, fail_fast=True, default_factory=list)]
    """The answer ends with the first of these strings that occurs in it."""
    truncate: TokenCount | None = None
    """Keep only this number of tokens from the end of the prompt."""
    return_full_text: bool = False
    """Whether the prompt precedes its answer."""
    details: bool = False
    """Whether the answer has details: its tokens with log probabilities, the seed and the finish reason."""
    decoder_input_details: bool = False
    """Whether the details have the tokens of the prompt with log probabilities. Not in a stream."""
    best_of: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    """Sample this number of answers, and return the one with the highest mean log probability of a token."""
    top_n_tokens: Annotated[int, Field(ge=0, le=20)] = 0
    """Report this number of the most likely tokens at the place of each token."""
    grammar: GrammarField | None = None
    """The form of the answer."""
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accepted if it has no effect: with the value 1, or with `do_sample: false`."""
    watermark: Annotated[object, Only(False, reason="the service adds no watermarks")] = None
    """The service adds no watermarks."""
    adapter_id: Annotated[object, Only(reason="name the adapter in the field model")] = None
    """Name the adapter in the field `model`."""

    @property
    def wants_details(self) -> bool:
        """As in TGI, details of the prompt come with details of the answer."""
        return self.details or self.decoder_input_details

    @property
    def samples(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p is not None

    def sampling(self, defaults: SamplingDefaults, logprobs: int | None) -> SamplingParams:
        """A sampled answer without a seed of the caller gets a random one, which the details report."""
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
    model: str | None = None
    """The name of the model. The default is that of `?model=`, else the first model of the configuration."""
    inputs: Text
    """The text that the model continues."""
    parameters: Annotated[Parameters, Field(default_factory=lambda: Parameters())]
    """How the answer is generated."""
    stream: bool | None = None
    """Whether the answer comes as events. It decides at / only; at /generate and /generate_stream the path decides."""

    nested: ClassVar[Nested] = {"parameters": Parameters, "grammar": GrammarField}

    @property
    def prefix(self) -> str:
        """The beginning of the generated text."""
        return self.inputs if self.parameters.return_full_text else ""

    def params(self, defaults: SamplingDefaults, stream: bool) -> SamplingParams:
        """Raises InvalidRequest if fields contradict each other."""
        parameters = self.parameters
        if parameters.decoder_input_details and stream:
            raise InvalidRequest(
                "Field 'parameters.decoder_input_details' is not available in a stream. Do not stream, or leave it "
                "out.",
                param="parameters.decoder_input_details",
            )
        if parameters.typical_p not in (None, 1) and parameters.do_sample is not False:
            raise InvalidRequest(
                "Field 'parameters.typical_p' asks for typical sampling, which the service does not have. Use "
                "'parameters.top_p', or send 1.",
                param="parameters.typical_p",
            )
        best_of = parameters.best_of
        if best_of > 1 and stream:
            raise InvalidRequest(
                f"Field 'parameters.best_of' is {best_of}, and the best answer is known only when all have ended. Do "
                "not stream, or send 1.",
                param="parameters.best_of",
            )
        if best_of > 1 and not parameters.samples:
            raise InvalidRequest(
                f"Field 'parameters.best_of' is {best_of}, but greedy answers are all the same. Set "
                "'parameters.do_sample'.",
                param="parameters.best_of",
            )
        needs_logprobs = stream or parameters.wants_details or best_of > 1
        return parameters.sampling(defaults, parameters.top_n_tokens if needs_logprobs else None)
