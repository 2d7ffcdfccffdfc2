"""Encodes the events of a model in the native dialect: as a stream, and as a whole answer."""

from __future__ import annotations

from serve_app.api.completion import CompletionState
from serve_app.api.native.responses import (
    NativeAnswer,
    NativeErrorEvent,
    NativeEvent,
    NativeLogprobs,
    NativeToken,
    native_error,
)
from serve_app.api.responses import finite
from serve_app.api.sse import data, named
from serve_app.core.events import Chunk, Logprobs, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError


class NativeEncoder:
    """One event for each token. `request_id` is the id that an error event quotes."""

    def __init__(self, request: GenerationRequest, request_id: str, include_text: bool) -> None:
        self._state = CompletionState()
        self._request_id = request_id
        self._include_text = include_text
        self._logprobs = request.params.logprobs is not None

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        self._state.add_facts(chunk)
        return b"".join(self._event(event) for event in chunk.events)

    def end(self) -> bytes:
        return b""

    def failure(self, error: ServeAppError) -> bytes:
        body: NativeErrorEvent = {"error": native_error(error, self._request_id)["error"], "finished": True}
        return named("error", body)

    def _event(self, event: TokenEvent) -> bytes:
        state, finished = self._state, event.finish_reason is not None
        state.add_event(event)
        body: NativeEvent
        if self._include_text:
            body = {"token": event.text, "text": state.text, "finished": finished, "metrics": state.metrics()}
        else:
            body = {"token": event.text, "finished": finished, "metrics": state.metrics()}
        if self._logprobs:
            body["logprobs"] = None if event.logprobs is None else _logprobs(event.logprobs)
        if event.finish_reason is not None:
            body["finish_reason"] = event.finish_reason
            body["usage"] = state.usage()
        return data(body)


def to_answer(request: GenerationRequest, state: CompletionState) -> NativeAnswer:
    """The answer of /generate, and of one item of /generate_batch."""
    body: NativeAnswer = {
        "id": request.id,
        "model": request.served_name,
        "text": state.text,
        "finish_reason": state.reason,
        "usage": state.usage(),
        "metrics": state.metrics(),
    }
    if request.params.logprobs is not None:
        body["logprobs"] = [_logprobs(event.logprobs) for event in state.logprob_events if event.logprobs is not None]
    return body


def _logprobs(logprobs: Logprobs) -> NativeLogprobs:
    chosen = _token(logprobs.chosen)
    return {**chosen, "top": [_token(token) for token in logprobs.top]}


def _token(token: TokenLogprob) -> NativeToken:
    return {"token_id": token.token_id, "token": token.token, "logprob": finite(token.logprob)}
