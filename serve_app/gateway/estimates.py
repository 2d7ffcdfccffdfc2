"""Expects the tokens of requests before they are known, from those of earlier requests of the same model."""

from __future__ import annotations

from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.core.routing import prompt_tokens

# Tokens of an answer before one has ended.
_USUAL_ANSWER = 128.0
# Weight of the newest request in the means.
_SMOOTHING = 0.05


class Estimates:
    """The tokens that the requests of one model need, as far as they can be known at their arrival.

    The length of an answer is not known before it ends: a request is expected to generate as many tokens as the mean
    answer, and at most its `max_tokens`. A prompt is expected to be found in the prefix cache to the share that earlier
    prompts were.
    """

    def __init__(self) -> None:
        self._answer = _USUAL_ANSWER
        self._per_estimate = 1.0  # computed tokens of a prompt, as a share of the estimate

    def prompt(self, request: GenerationRequest) -> float:
        """The tokens of the prompt that must be computed."""
        return prompt_tokens(request) * self._per_estimate

    def answer(self, request: GenerationRequest) -> float:
        """The tokens of the answer; 0 for an embedding."""
        if request.embed:
            return 0.0
        limit = request.params.max_tokens
        return self._answer if limit is None else min(self._answer, limit)

    def learn_prompt(self, request: GenerationRequest, first: Chunk) -> None:
        """Learn from the first chunk of a request."""
        computed = (first.prompt_tokens - first.cached_tokens) / max(1.0, prompt_tokens(request))
        self._per_estimate += _SMOOTHING * (computed - self._per_estimate)

    def learn_answer(self, tokens: int) -> None:
        """Learn from the number of tokens of a complete answer."""
        self._answer += _SMOOTHING * (tokens - self._answer)
