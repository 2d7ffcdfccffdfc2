"""Several answers to one prompt, and the choice of the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from serve_app.api.completion import CompletionState
from serve_app.api.responses import finite
from serve_app.core.requests import GenerationRequest


def fork(request: GenerationRequest, count: int, details_for_each: bool = False) -> list[GenerationRequest]:
    """Requests for `count` answers to one prompt, which is computed once for all of them.

    Only the first request has details of the prompt, unless each needs them: then each computes the prompt.
    """
    if count == 1:
        return [request]
    plain = replace(request, params=replace(request.params, prompt_logprobs=None), prompt_details=False)
    others = request if details_for_each else plain
    each = (request, *[others] * (count - 1))
    return [replace(one, id=f"{request.id}-{i}", group=request.id, index=i) for i, one in enumerate(each)]


def with_logprobs(request: GenerationRequest) -> GenerationRequest:
    """The same request with the log probabilities that `best` compares."""
    if request.params.logprobs is not None:
        return request
    return replace(request, params=replace(request.params, logprobs=0))


def best(states: Sequence[CompletionState], count: int) -> list[int]:
    """The numbers of the `count` answers with the highest mean log probability of a token, the best first.

    Of equal answers the first one wins.
    """
    return sorted(range(len(states)), key=lambda number: -_mean_logprob(states[number]))[:count]


def best_of_each(states: Sequence[CompletionState], sampled: int, count: int) -> list[int]:
    """The numbers of the `count` best of every `sampled` answers, which are the answers to one prompt."""
    return [
        first + number
        for first in range(0, len(states), sampled)
        for number in best(states[first : first + sampled], count)
    ]


def _mean_logprob(state: CompletionState) -> float:
    logprobs = [finite(event.logprobs.chosen.logprob) for event in state.logprob_events if event.logprobs is not None]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
