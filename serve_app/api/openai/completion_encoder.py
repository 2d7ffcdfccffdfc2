"""Encodes the events of a model as OpenAI's completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from serve_app.api.completion import CompletionState
from serve_app.api.openai.encoder import OpenAIEncoder
from serve_app.api.openai.responses import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
)
from serve_app.api.responses import finite
from serve_app.api.sse import data
from serve_app.core.events import FinishReason, Logprobs, PromptDetails, TokenEvent


class CompletionEncoder(OpenAIEncoder):
    def to_response(self, states: Sequence[CompletionState], shown: Sequence[int]) -> Completion:
        return {
            "id": f"cmpl-{self._id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                self._choice(index, states[number], states[self._firsts[number]].prompt)
                for index, number in enumerate(shown)
            ],
            "usage": self.total_usage(states),
        }

    def opening(self, index: int) -> bytes:
        return b""

    def event(self, event: TokenEvent, index: int) -> bytes:
        event = event if self._show.answer else _emptied(event)
        state = self._states[index]
        first, offset = state.tokens == 0, len(state.text)
        if self._show.echo and state.prompt is not None and not first:
            offset += len(state.prompt.text)
        state.add_event(event)
        prompt = state.prompt if first else None
        text, logprobs = self._text_and_logprobs(event.text, [event], offset, prompt)
        choice: CompletionChunkChoice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
        if event.finish_reason is not None:
            choice["stop_reason"] = event.stopped_by
        if self._show.token_ids:
            choice["token_ids"] = [event.token_id] * self._show.answer
        self.add_prompt(choice, prompt)
        return data(self._chunk([choice]))

    def usage_event(self) -> bytes:
        body = self._chunk([])
        body["usage"] = self.total_usage(self._states)
        return data(body)

    def _choice(self, index: int, state: CompletionState, prompt: PromptDetails | None) -> CompletionChoice:
        if not self._show.answer:
            state = replace(state, text="", token_ids=[], logprob_events=[], finish_reason=FinishReason.LENGTH)
        text, logprobs = self._text_and_logprobs(state.text, state.logprob_events, 0, prompt)
        choice: CompletionChoice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": state.reason,
            "stop_reason": state.stopped_by,
        }
        if self._show.token_ids:
            choice["token_ids"] = state.token_ids
        self.add_prompt(choice, prompt)
        return choice

    def _chunk(self, choices: list[CompletionChunkChoice]) -> CompletionChunk:
        body: CompletionChunk = {
            "id": f"cmpl-{self._id}",
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        if self._show.usage:
            body["usage"] = self.chunk_usage()
        return body

    def _text_and_logprobs(
        self, text: str, events: Sequence[TokenEvent], offset: int, prompt: PromptDetails | None
    ) -> tuple[str, CompletionLogprobs | None]:
        """A text with the log probabilities of its tokens, after the prompt if it is echoed."""
        logprobs = _logprobs(events, offset) if self._logprobs else None
        if prompt is None or not self._show.echo:
            return text, logprobs
        return prompt.text + text, None if logprobs is None else self._with_prompt(logprobs, prompt)

    def _with_prompt(self, logprobs: CompletionLogprobs, prompt: PromptDetails) -> CompletionLogprobs:
        limit = self._request.params.logprobs
        of_prompt = [replace(one, top=one.top[:limit]) for one in prompt.logprobs]
        return {
            "tokens": [*(token.text for token in prompt.tokens), *logprobs["tokens"]],
            "token_logprobs": [None, *(finite(one.chosen.logprob) for one in of_prompt), *logprobs["token_logprobs"]],
            "top_logprobs": [None, *map(_top, of_prompt), *logprobs["top_logprobs"]],
            "text_offset": [
                *(token.start for token in prompt.tokens),
                *(len(prompt.text) + offset for offset in logprobs["text_offset"]),
            ],
        }


def _emptied(event: TokenEvent) -> TokenEvent:
    """The end of an answer that is not shown."""
    return replace(event, text="", logprobs=None, finish_reason=FinishReason.LENGTH, stopped_by=None)


def _logprobs(events: Sequence[TokenEvent], offset: int) -> CompletionLogprobs:
    """`offset` is the number of characters before the text of the first event."""
    tokens: list[Logprobs] = []
    offsets: list[int] = []
    for event in events:
        if event.logprobs is not None:
            tokens.append(event.logprobs)
            offsets.append(offset)
        offset += len(event.text)
    return {
        "tokens": [token.chosen.token for token in tokens],
        "token_logprobs": [finite(token.chosen.logprob) for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: Logprobs) -> dict[str, float]:
    """The most likely tokens, and always the chosen one, as in OpenAI's API."""
    return {one.token: finite(one.logprob) for one in (*token.top, token.chosen)}
