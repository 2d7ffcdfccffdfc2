"""The answers of Text Generation Inference's endpoints, as typed dictionaries."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from serve_app.api.responses import ErrorFormat, exact
from serve_app.errors import ServeAppError

TgiFinishReason = Literal["length", "eos_token", "stop_sequence"]
TgiErrorType = Literal[
    "overloaded", "incomplete_generation", "generation", "validation", "authentication", "permission"
]

# An error of any other status is a fault of the request.
_ERROR_TYPES: dict[int, TgiErrorType] = {
    401: "authentication",
    403: "permission",
    429: "overloaded",
    503: "overloaded",
    504: "incomplete_generation",
    500: "generation",
}


@exact
class TgiToken(TypedDict):
    id: int
    text: str
    logprob: float | None
    special: bool


@exact
class TgiStreamDetails(TypedDict):
    """`seed` is null if the answer was not sampled."""

    finish_reason: TgiFinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


@exact
class TgiEvent(TypedDict):
    """One token. The last event has `generated_text`, and `details` if the request wants them."""

    index: int
    token: TgiToken
    top_tokens: NotRequired[list[TgiToken]]
    generated_text: str | None
    details: TgiStreamDetails | None


@exact
class TgiPromptToken(TypedDict):
    """A token of the prompt; the first one has no log probability."""

    id: int
    text: str
    logprob: float | None


@exact
class TgiAnswerDetails(TypedDict):
    """`prefill` is filled if the request wants details of the prompt."""

    finish_reason: TgiFinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPromptToken]
    tokens: list[TgiToken]
    top_tokens: NotRequired[list[list[TgiToken]]]


class TgiSequence(TgiAnswerDetails):
    generated_text: str


class TgiDetails(TgiAnswerDetails):
    """The details of the best answer, with the other answers."""

    best_of_sequences: NotRequired[list[TgiSequence]]


@exact
class TgiAnswer(TypedDict):
    generated_text: str
    details: NotRequired[TgiDetails]


@exact
class TgiError(TypedDict):
    error: str
    error_type: TgiErrorType


@exact
class TgiInfo(TypedDict):
    """The values that only a loaded model knows are null until it was loaded once."""

    model_id: str
    model_sha: str | None
    model_dtype: str | None
    model_device_type: str
    quantization: str | None
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_client_batch_size: int
    router: str
    version: str
    sha: None
    docker_label: None


def tgi_error(error: ServeAppError) -> TgiError:
    return {"error": error.message, "error_type": _ERROR_TYPES.get(error.status, "validation")}


TGI_ERRORS = ErrorFormat(lambda error, request_id: tgi_error(error))
