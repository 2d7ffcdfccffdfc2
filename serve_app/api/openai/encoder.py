"""The base class of the encoders of OpenAI's completions and chats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.api.completion import CompletionState
from serve_app.api.openai.responses import PromptFields, PromptToken, openai_error
from serve_app.api.responses import Usage, finite, usage
from serve_app.api.sse import DONE, data
from serve_app.core.events import Chunk, Logprobs, PromptDetails, TokenEvent
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError


@dataclass(frozen=True, slots=True)
class Show:
    """What an answer shows beside its text.

    `prompt_logprobs` is the number of alternatives to each prompt token. `usage` is whether a stream has the usage at
    its end, `usage_so_far` whether its other chunks have it too. Without `answer` the prompt is all that is shown.
    `legacy_calls` is the form of tool calls that `functions` asks for.
    """

    echo: bool = False
    answer: bool = True
    reasoning: bool = True
    legacy_calls: bool = False
    token_ids: bool = False
    prompt_logprobs: int | None = None
    usage: bool = False
    usage_so_far: bool = False


class OpenAIEncoder(ABC):
    """Encodes the answers to `requests`. `created` is the wall clock in whole seconds."""

    def __init__(self, id: str, requests: Sequence[GenerationRequest], created: int, show: Show) -> None:
        self._id = id
        self._request = requests[0]
        self._model = requests[0].served_name
        self._created = created
        self._show = show
        self._logprobs = requests[0].params.logprobs is not None
        self._states = [CompletionState() for _ in requests]
        # For each answer the number of the first answer to the same prompt, which has the details of the prompt.
        self._firsts = [number - request.index for number, request in enumerate(requests)]

    @abstractmethod
    def to_response(self, states: Sequence[CompletionState], shown: Sequence[int]) -> object:
        """The whole response. `shown` are the numbers of the answers that become choices; the usage is of all."""

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """The events before the first token of a choice."""

    @abstractmethod
    def event(self, event: TokenEvent, index: int) -> bytes:
        """The events for a token of a choice."""

    @abstractmethod
    def usage_event(self) -> bytes:
        """The event with the usage, and no choice."""

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        state = self._states[index]
        state.add_facts(chunk)
        opening = self.opening(index) if chunk.events and state.tokens == 0 else b""
        return opening + b"".join(self.event(event, index) for event in chunk.events)

    def end(self) -> bytes:
        return (self.usage_event() if self._show.usage else b"") + DONE

    def failure(self, error: ServeAppError) -> bytes:
        return data(openai_error(error)) + DONE

    def total_usage(self, states: Sequence[CompletionState]) -> Usage:
        """The usage of all answers; each prompt counts once."""
        firsts = sorted(set(self._firsts))
        return usage(
            sum(states[first].prompt_tokens for first in firsts),
            sum(states[first].cached_tokens for first in firsts),
            sum(state.tokens for state in states) * self._show.answer,
            sum(state.reasoning_tokens for state in states),
        )

    def chunk_usage(self) -> Usage | None:
        """The usage in a chunk of a stream that is not the last one."""
        return self.total_usage(self._states) if self._show.usage_so_far else None

    def add_prompt(self, target: PromptFields, prompt: PromptDetails | None) -> None:
        """Set vLLM's fields about the prompt, as far as the request wants them."""
        if prompt is None:
            return
        if self._show.token_ids:
            target["prompt_token_ids"] = [token.token_id for token in prompt.tokens]
        limit = self._show.prompt_logprobs
        if limit is not None:
            target["prompt_logprobs"] = [None, *(_ranked(one, limit) for one in prompt.logprobs)]


def _ranked(logprobs: Logprobs, limit: int) -> dict[str, PromptToken]:
    """By token id, as a string because JSON's keys are strings. Equally likely tokens have the rank of the first."""
    values = [one.logprob for one in logprobs.top]
    ranks = [(one, values.index(one.logprob) + 1) for one in logprobs.top[:limit]]
    return {
        str(one.token_id): {"logprob": finite(one.logprob), "rank": rank, "decoded_token": one.token}
        for one, rank in [*ranks, (logprobs.chosen, logprobs.rank or 1)]
    }
