"""Several answers to one prompt, and which of them are the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serve_app.api.completion import CompletionState
from serve_app.api.native.encoder import finite
from serve_app.core.requests import GenerationRequest


def forks(request: GenerationRequest, count: int, each_tells: bool = False) -> list[GenerationRequest]:
    """Requests for several answers to one prompt, which is computed once for all of them.

    What a prompt tells is told by the first, unless each has to say it: then each computes it.
    """
    if count == 1:
        return [request]
    silent = replace(request, params=replace(request.params, prompt_logprobs=None), prompt_details=False)
    others = request if each_tells else silent
    each = (request, *[others] * (count - 1))
    return [replace(one, id=f"{request.id}-{i}", group=request.id, index=i) for i, one in enumerate(each)]


def measured(request: GenerationRequest) -> GenerationRequest:
    """The same request with what `best` judges by."""
    if request.params.logprobs is not None:
        return request
    return replace(request, params=replace(request.params, logprobs=0))


def best(tallies: Sequence[CompletionState], count: int) -> list[int]:
    """The numbers of the answers with the highest mean log probability a token, the best first, of equals the first."""
    return sorted(range(len(tallies)), key=lambda number: -_mean_logprob(tallies[number]))[:count]


def best_of_each(tallies: Sequence[CompletionState], drawn: int, count: int) -> list[int]:
    """The numbers of the best of every `drawn` answers, which are those to one prompt."""
    return [at + number for at in range(0, len(tallies), drawn) for number in best(tallies[at : at + drawn], count)]


def kept(body: dict[str, object], numbers: Sequence[int]) -> dict[str, object]:
    """OpenAI's answer with these of its choices, numbered anew; its usage is still of all."""
    choices: Any = body["choices"]
    return body | {"choices": [choices[number] | {"index": index} for index, number in enumerate(numbers)]}


def _mean_logprob(tally: CompletionState) -> float:
    logprobs = [finite(event.logprobs.chosen.logprob) for event in tally.events if event.logprobs is not None]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")
