"""The native dialect: the frames of a stream, and the whole answer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from serve_app.api.completion import CompletionState
from serve_app.api.error_handlers import native_error
from serve_app.api.sse import data, named
from serve_app.core.events import Chunk, Logprobs, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

# JSON has neither infinity nor NaN; OpenAI writes a token that cannot occur in the same way.
LOWEST_LOGPROB = -9999.0


class TokenEncoder(ABC):
    """One answer's frames: one a token, and nothing after the last."""

    def __init__(self) -> None:
        self._tally = CompletionState()

    @abstractmethod
    def frame(self, event: TokenEvent) -> dict[str, object]:
        """Of a token that is counted already."""

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        self._tally.arrived(chunk)
        return b"".join(self._next(event) for event in chunk.events)

    def end(self) -> bytes:
        return b""

    def _next(self, event: TokenEvent) -> bytes:
        self._tally.count(event)
        return data(self.frame(event))


class NativeEncoder(TokenEncoder):
    """`request_id` is what an error quotes."""

    def __init__(self, request: GenerationRequest, request_id: str, include_text: bool) -> None:
        super().__init__()
        self._request_id = request_id
        self._include_text = include_text
        self._logprobs = request.params.logprobs is not None

    def failure(self, error: ServeAppError) -> bytes:
        return named("error", {"error": native_error(error, self._request_id), "finished": True})

    def frame(self, event: TokenEvent) -> dict[str, object]:
        frame: dict[str, object] = {"token": event.text}
        if self._include_text:
            frame["text"] = self._tally.text
        frame |= {"finished": event.finish_reason is not None, "metrics": self._tally.metrics()}
        if self._logprobs:
            frame["logprobs"] = native_logprobs(event.logprobs)
        if event.finish_reason is not None:
            frame |= {"finish_reason": event.finish_reason, "usage": self._tally.usage()}
        return frame


def whole(request: GenerationRequest, tally: CompletionState) -> dict[str, object]:
    """The answer of /generate, and of one item of /generate_batch."""
    body: dict[str, object] = {
        "id": request.id,
        "model": request.model,
        "text": tally.text,
        "finish_reason": tally.finish_reason,
        "usage": tally.usage(),
        "metrics": tally.metrics(),
    }
    if request.params.logprobs is not None:
        body["logprobs"] = [native_logprobs(event.logprobs) for event in tally.events]
    return body


def native_logprobs(logprobs: Logprobs | None) -> dict[str, object] | None:
    if logprobs is None:
        return None
    return {**_logprob(logprobs.chosen), "top": [_logprob(token) for token in logprobs.top]}


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def _logprob(token: TokenLogprob) -> dict[str, object]:
    return {"token_id": token.token_id, "token": token.token, "logprob": finite(token.logprob)}
