"""Text Generation Inference's answers: whole, and the events of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.api.choices import best
from serve_app.api.completion import CompletionState
from serve_app.api.error_handlers import tgi_error
from serve_app.api.native.encoder import TokenEncoder, finite
from serve_app.api.sse import data
from serve_app.core.events import FinishReason, PromptDetails, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

Json = dict[str, object]
SpecialIds = frozenset[int]


class TgiEncoder(TokenEncoder):
    """One event a token. `special` is set before the first chunk; `prefix` is what the text begins with."""

    special: SpecialIds = frozenset()

    def __init__(self, request: GenerationRequest, prefix: str, details: bool) -> None:
        super().__init__()
        self._request = request
        self._prefix = prefix
        self._details = details

    def failure(self, error: ServeAppError) -> bytes:
        return data(tgi_error(error))

    def frame(self, event: TokenEvent) -> Json:
        frame: Json = {"index": self._tally.tokens, "token": _token(event, self.special)}
        if self._request.params.logprobs:
            frame["top_tokens"] = _top_tokens(event, self.special)
        ended = event.finish_reason is not None
        frame["generated_text"] = self._prefix + self._tally.text if ended else None
        frame["details"] = self._ending(event) if ended and self._details else None
        return frame

    def _ending(self, event: TokenEvent) -> Json:
        return {
            "finish_reason": _finish_reason(event),
            "generated_tokens": self._tally.tokens,
            "seed": _seed(self._request),
            "input_length": self._tally.prompt_tokens,
        }


def whole(tallies: Sequence[CompletionState], prefix: str) -> Json:
    """The best of the answers, as text alone."""
    (chosen,) = best(tallies, 1)
    return {"generated_text": prefix + tallies[chosen].text}


def detailed(
    requests: Sequence[GenerationRequest], tallies: Sequence[CompletionState], prefix: str, special: SpecialIds
) -> Json:
    """The best of the answers, with its tokens and with the other answers."""
    (chosen,) = best(tallies, 1)
    prefill = _prefill(tallies[0].prompt)  # only the first answer tells it, for all
    answers = [_answer(*pair, prefix, prefill, special) for pair in zip(requests, tallies, strict=True)]
    text, details = answers.pop(chosen)
    if answers:
        details["best_of_sequences"] = [{"generated_text": other, **about} for other, about in answers]
    return {"generated_text": text, "details": details}


def _answer(
    request: GenerationRequest, tally: CompletionState, prefix: str, prefill: list[Json], special: SpecialIds
) -> tuple[str, Json]:
    details: Json = {
        "finish_reason": _finish_reason(tally.events[-1]),
        "generated_tokens": tally.tokens,
        "seed": _seed(request),
        "prefill": prefill,
        "tokens": [_token(event, special) for event in tally.events],
    }
    if request.params.logprobs:
        details["top_tokens"] = [_top_tokens(event, special) for event in tally.events]
    return prefix + tally.text, details


def _prefill(prompt: PromptDetails | None) -> list[Json]:
    """The tokens of a prompt that was asked for; nothing foretells the first."""
    if prompt is None:
        return []
    logprobs = [None, *(finite(token.chosen.logprob) for token in prompt.logprobs)]
    return [
        {"id": piece.token_id, "text": piece.text, "logprob": logprob}
        for piece, logprob in zip(prompt.tokens, logprobs, strict=True)
    ]


def _finish_reason(event: TokenEvent) -> str:
    if event.finish_reason is FinishReason.LENGTH:
        return "length"
    return "eos_token" if event.stopped_by is None else "stop_sequence"


def _seed(request: GenerationRequest) -> int | None:
    """What this answer was drawn with. Nothing was where the choice is greedy."""
    params = request.params
    return None if params.seed is None or params.temperature == 0 else params.seed + request.index


def _token(event: TokenEvent, special: SpecialIds) -> Json:
    """The texts of tokens make up the answer; only a special one says its name, as in TGI."""
    is_special, chosen = event.token_id in special, event.logprobs.chosen if event.logprobs else None
    text = event.text + (chosen.token if chosen and is_special else "")
    return {
        "id": event.token_id,
        "text": text,
        "logprob": None if chosen is None else finite(chosen.logprob),
        "special": is_special,
    }


def _top_tokens(event: TokenEvent, special: SpecialIds) -> list[Json]:
    return [_alternative(token, special) for token in (event.logprobs.top if event.logprobs else ())]


def _alternative(token: TokenLogprob, special: SpecialIds) -> Json:
    return {
        "id": token.token_id,
        "text": token.token,
        "logprob": finite(token.logprob),
        "special": token.token_id in special,
    }
