"""Encodes the events of a model in Text Generation Inference's dialect: as a stream, and as a whole answer."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.api.choices import best
from serve_app.api.completion import CompletionState
from serve_app.api.responses import finite
from serve_app.api.sse import data
from serve_app.api.tgi.responses import (
    TgiAnswer,
    TgiAnswerDetails,
    TgiDetails,
    TgiEvent,
    TgiFinishReason,
    TgiPromptToken,
    TgiSequence,
    TgiToken,
    tgi_error,
)
from serve_app.core.events import Chunk, FinishReason, PromptDetails, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

SpecialIds = frozenset[int]


class TgiEncoder:
    """One event for each token. `special_ids` are set before the first chunk; `prefix` begins the generated text."""

    special_ids: SpecialIds = frozenset()

    def __init__(self, request: GenerationRequest, prefix: str, details: bool) -> None:
        self._state = CompletionState()
        self._request = request
        self._prefix = prefix
        self._details = details

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        self._state.add_facts(chunk)
        return b"".join(self._event(event) for event in chunk.events)

    def end(self) -> bytes:
        return b""

    def failure(self, error: ServeAppError) -> bytes:
        return data(tgi_error(error))

    def _event(self, event: TokenEvent) -> bytes:
        state = self._state
        state.add_event(event)
        body: TgiEvent = {
            "index": state.tokens,
            "token": _token(event, self.special_ids),
            "generated_text": None,
            "details": None,
        }
        if self._request.params.logprobs:
            body["top_tokens"] = _top_tokens(event, self.special_ids)
        if event.finish_reason is not None:
            body["generated_text"] = self._prefix + state.text
            if self._details:
                body["details"] = {
                    "finish_reason": _finish_reason(event.finish_reason, event.stopped_by),
                    "generated_tokens": state.tokens,
                    "seed": _seed(self._request),
                    "input_length": state.prompt_tokens,
                }
        return data(body)


def to_text(states: Sequence[CompletionState], prefix: str) -> TgiAnswer:
    """The text of the best answer."""
    (chosen,) = best(states, 1)
    return {"generated_text": prefix + states[chosen].text}


def to_details(
    requests: Sequence[GenerationRequest], states: Sequence[CompletionState], prefix: str, special_ids: SpecialIds
) -> TgiAnswer:
    """The best answer with its tokens, and with the other answers."""
    (chosen,) = best(states, 1)
    prefill = _prefill(states[0].prompt)  # only the first request has details of the prompt
    each = [_details(request, state, prefill, special_ids) for request, state in zip(requests, states, strict=True)]
    texts = [prefix + state.text for state in states]
    others = [_sequence(texts[number], other) for number, other in enumerate(each) if number != chosen]
    details = each[chosen]
    if others:
        details["best_of_sequences"] = others
    return {"generated_text": texts[chosen], "details": details}


def _sequence(text: str, details: TgiAnswerDetails) -> TgiSequence:
    return {"generated_text": text, **details}


def _details(
    request: GenerationRequest, state: CompletionState, prefill: list[TgiPromptToken], special_ids: SpecialIds
) -> TgiDetails:
    events = state.logprob_events
    details: TgiDetails = {
        "finish_reason": _finish_reason(state.reason, state.stopped_by),
        "generated_tokens": state.tokens,
        "seed": _seed(request),
        "prefill": prefill,
        "tokens": [_token(event, special_ids) for event in events],
    }
    if request.params.logprobs:
        details["top_tokens"] = [_top_tokens(event, special_ids) for event in events]
    return details


def _prefill(prompt: PromptDetails | None) -> list[TgiPromptToken]:
    """The tokens of the prompt. The first one has no prediction, and so no log probability."""
    if prompt is None:
        return []
    logprobs = [None, *(finite(token.chosen.logprob) for token in prompt.logprobs)]
    return [
        {"id": token.token_id, "text": token.text, "logprob": logprob}
        for token, logprob in zip(prompt.tokens, logprobs, strict=True)
    ]


def _finish_reason(reason: FinishReason, stopped_by: str | int | None) -> TgiFinishReason:
    if reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if stopped_by is None else "stop_sequence"


def _seed(request: GenerationRequest) -> int | None:
    """The seed that the answer was sampled with; None for a greedy one."""
    params = request.params
    return None if params.seed is None or params.temperature == 0 else params.seed + request.index


def _token(event: TokenEvent, special_ids: SpecialIds) -> TgiToken:
    """The texts of the tokens make up the answer; that of a special token is its name, as in TGI."""
    special, chosen = event.token_id in special_ids, event.logprobs.chosen if event.logprobs else None
    return {
        "id": event.token_id,
        "text": event.text + (chosen.token if chosen and special else ""),
        "logprob": None if chosen is None else finite(chosen.logprob),
        "special": special,
    }


def _top_tokens(event: TokenEvent, special_ids: SpecialIds) -> list[TgiToken]:
    return [_top_token(token, special_ids) for token in (event.logprobs.top if event.logprobs else ())]


def _top_token(token: TokenLogprob, special_ids: SpecialIds) -> TgiToken:
    return {
        "id": token.token_id,
        "text": token.token,
        "logprob": finite(token.logprob),
        "special": token.token_id in special_ids,
    }
