"""The most tokens and dollars that a request can use, before its prompt is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from serve_app.config import Price
from serve_app.core.requests import ChatPrompt, GenerationRequest, TokenPrompt
from serve_app.core.routing import prompt_tokens
from serve_app.gateway.counters import BUDGETS, DOLLARS, Counter, Kind, remaining

# A request without `max_tokens` is refused if less than this is left of a budget for its answer.
LEAST_ANSWER = 64
# Tokens of a chat template for each message, for the first estimate.
_PER_MESSAGE = 8
_FIRST_RATE = 1.3
# Weight of a prompt that was shorter than expected. A longer one counts at once.
_SMOOTHING = 0.02


class PromptEstimate:
    """Estimates the tokens of the prompts of one model, which is learned from their sizes and their tokens.

    An ingress has no tokenizer. The estimate is above most prompts; a request whose prompt is longer is sent again with
    the number that the engine has found, so that a wrong estimate costs time and no more.
    """

    def __init__(self) -> None:
        self._rate = _FIRST_RATE

    def tokens(self, request: GenerationRequest) -> int:
        """The estimate, at least 1; exact for a prompt of token ids."""
        prompt, kept = request.prompt, request.truncate_prompt_tokens
        estimate = len(prompt.token_ids) if isinstance(prompt, TokenPrompt) else ceil(self._rate * _size(request))
        return max(1, estimate if kept is None or kept < 1 else min(estimate, kept))

    def learn(self, request: GenerationRequest, tokens: int) -> None:
        """Learn from a prompt that had so many tokens."""
        if isinstance(request.prompt, TokenPrompt) or request.truncate_prompt_tokens is not None:
            return
        found = tokens / _size(request)
        self._rate = found if found > self._rate else self._rate + _SMOOTHING * (found - self._rate)


def _size(request: GenerationRequest) -> float:
    messages = len(request.prompt.messages) if isinstance(request.prompt, ChatPrompt) else 0
    return 2 + _PER_MESSAGE * messages + prompt_tokens(request)


@dataclass(frozen=True, slots=True)
class WorstCase:
    """A request with bounds that the engine keeps, and the most that it can use."""

    request: GenerationRequest
    tokens: int
    nanodollars: int


def worst_case(request: GenerationRequest, prompt: int, answer: int | None, context: int, price: Price) -> WorstCase:
    """The bounds of a request with `prompt` and `answer` tokens, in a context of so many tokens.

    The answer None is as long as the context allows.
    """
    prompt = min(prompt, context)
    bounded = replace(request, prompt_limit=prompt)
    if request.embed:
        return WorstCase(bounded, prompt, price.nanodollars(prompt, 0, 0))
    if answer is None:
        # The prompt can be shorter than expected, and the answer longer.
        dearest = max(price.nanodollars(0, 0, context), price.nanodollars(prompt, 0, context - prompt))
        return WorstCase(bounded, context, dearest)
    answer = min(answer, context)
    if answer != request.params.max_tokens:
        bounded = replace(bounded, params=replace(request.params, max_tokens=answer))
    return WorstCase(bounded, min(prompt + answer, context), price.nanodollars(prompt, 0, answer))


def most_at_once(prompt: int, counters: Sequence[Counter], context: int) -> int | None:
    """The longest answer that the tokens per minute ever allow; None if they allow the whole context."""
    limits = [counter.limit for counter in counters if counter.kind is Kind.TOKENS_PER_MINUTE]
    least = min(limits, default=context)
    return None if least >= context else least - prompt


def affordable(prompt: int, counters: Sequence[Counter], values: Sequence[int], price: Price) -> int | None:
    """The longest answer for which all budgets have enough; None if they have no limit for it."""
    output = price.nanodollars(0, 0, 1)
    answers = []
    for counter, value in zip(counters, values, strict=True):
        if counter.kind not in BUDGETS:
            continue
        left = remaining(counter, value)
        if counter.kind not in DOLLARS:
            answers.append(left - prompt)
        elif output:
            answers.append((left - price.nanodollars(prompt, 0, 0)) // output)
    return min(answers, default=None)
