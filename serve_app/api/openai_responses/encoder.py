"""Encodes the events of a model as a response of OpenAI's Responses API, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import count

from serve_app.api.completion import CompletionState
from serve_app.api.openai.responses import openai_error
from serve_app.api.openai_responses.events import LifecycleEventType, ResponseEvent, StreamEvent
from serve_app.api.openai_responses.objects import (
    RequestEcho,
    ResponseError,
    ResponseObject,
    ResponseStatus,
    ResponseUsage,
)
from serve_app.api.openai_responses.output import Output
from serve_app.api.sse import named
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError


class ResponseEncoder:
    """Encodes the answer to one request. `keep` gets the response when it has ended, before the client does."""

    def __init__(
        self, response_id: str, request: GenerationRequest, echo: RequestEcho, keep: Callable[[ResponseObject], None]
    ) -> None:
        self._id = response_id
        self._model = request.served_name
        self._echo = echo
        self._keep = keep
        self._created = _now()
        self._state = CompletionState()
        self._numbers = count()
        self._output = Output(self._numbers, request.params.logprobs is not None)
        self._begun = False

    def to_response(self, state: CompletionState) -> ResponseObject:
        """The response for a whole answer."""
        self._state = state
        for event in state.logprob_events or [_whole(state)]:
            self._output.add(event)
        self._output.end(state.reason)
        return self._final()

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        events = self._begin()
        self._state.add_facts(chunk)
        for event in chunk.events:
            self._state.add_event(event)
            events += self._output.add(event)
        return _encoded(events)

    def end(self) -> bytes:
        events: list[StreamEvent] = [*self._output.end(self._state.reason)]
        response = self._final()
        kind: LifecycleEventType = "response.incomplete" if response["incomplete_details"] else "response.completed"
        return _encoded([*events, self._lifecycle(kind, response)])

    def failure(self, error: ServeAppError) -> bytes:
        details = openai_error(error)["error"]
        events = self._begin()
        events.append(
            {
                "type": "error",
                "sequence_number": next(self._numbers),
                "code": details["code"],
                "message": details["message"],
                "param": details["param"],
                "error": details,
            }
        )
        failed = self._response("failed") | {"error": _error(error)}
        return _encoded([*events, self._lifecycle("response.failed", failed)])

    def _begin(self) -> list[StreamEvent]:
        """The events before those of the output, the first time."""
        if self._begun:
            return []
        self._begun = True
        response = self._response("in_progress")
        return [self._lifecycle("response.created", response), self._lifecycle("response.in_progress", response)]

    def _lifecycle(self, kind: LifecycleEventType, response: ResponseObject) -> ResponseEvent:
        return {"type": kind, "sequence_number": next(self._numbers), "response": response}

    def _final(self) -> ResponseObject:
        if self._state.reason is FinishReason.LENGTH:
            response = self._response("incomplete")
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response = self._response("completed")
            response["completed_at"] = _now()
        response["usage"] = _usage(self._state)
        self._keep(response)
        return response

    def _response(self, status: ResponseStatus) -> ResponseObject:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": self._output.items,
            "usage": None,
            **self._echo,
        }


def _encoded(events: Iterable[StreamEvent]) -> bytes:
    return b"".join(named(event["type"], event) for event in events)


def _whole(state: CompletionState) -> TokenEvent:
    """An answer without log probabilities as one event."""
    deltas = None if state.deltas is None else tuple(state.deltas)
    return TokenEvent(0, state.text, state.last_s, state.finish_reason, deltas=deltas)


def _usage(state: CompletionState) -> ResponseUsage:
    return {
        "input_tokens": state.prompt_tokens,
        "input_tokens_details": {"cached_tokens": state.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": state.tokens,
        "output_tokens_details": {"reasoning_tokens": state.reasoning_tokens},
        "total_tokens": state.prompt_tokens + state.tokens,
    }


def _error(error: ServeAppError) -> ResponseError:
    """The closed list of codes that OpenAI's clients know in a response."""
    if error.status == 429:
        return {"code": "rate_limit_exceeded", "message": error.message}
    return {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}


def _now() -> int:
    """OpenAI's objects have the wall clock in whole seconds."""
    return int(time.time())
