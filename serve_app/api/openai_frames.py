"""OpenAI's shapes: completions and chat completions, whole and in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from serve_app.api.frames import finite
from serve_app.api.refusal import openai_error
from serve_app.api.sse import DONE, data
from serve_app.api.tally import Tally, together
from serve_app.errors import ServeAppError
from serve_app.types import Chunk, FinishReason, GenerationRequest, Logprobs, TokenEvent, TokenLogprob

Json = dict[str, object]


class OpenAIFrames(ABC):
    """What both kinds share. `created` is the wall clock in whole seconds."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, id: str, requests: Sequence[GenerationRequest], created: int, include_usage: bool) -> None:
        self._id = id
        self._request = requests[0]
        self._created = created
        self._include_usage = include_usage
        self._firsts = [number for number, request in enumerate(requests) if request.index == 0]
        self._tallies = [Tally() for _ in requests]

    @abstractmethod
    def answer(self, tally: Tally) -> Json:
        """What a choice of a whole answer says."""

    @abstractmethod
    def piece(self, event: TokenEvent) -> Json:
        """What a choice of a chunk says."""

    @abstractmethod
    def logprobs(self, events: Sequence[TokenEvent], offset: int) -> Json:
        """`offset` is where the text of the first event begins."""

    def opening(self, index: int) -> bytes:
        """Frames before a choice's first token."""
        return b""

    def whole(self, tallies: Sequence[Tally]) -> Json:
        choices = [
            self._choice(index, self.answer(tally), tally.events, 0, tally.finish_reason)
            for index, tally in enumerate(tallies)
        ]
        return self._body(self.whole_object, choices) | {"usage": together(tallies, self._firsts)}

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        tally = self._tallies[index]
        opening = self.opening(index) if tally.tokens == 0 else b""
        tally.arrived(chunk)
        return opening + b"".join(self._frame(event, index) for event in chunk.events)

    def end(self) -> bytes:
        usage = self._body(self.chunk_object, []) | {"usage": together(self._tallies, self._firsts)}
        return (data(usage) if self._include_usage else b"") + DONE

    def failure(self, error: ServeAppError) -> bytes:
        return data({"error": openai_error(error)}) + DONE

    def data(self, choice: Json) -> bytes:
        """One chunk with one choice. OpenAI writes `usage: null` when a later chunk will tell it."""
        body = self._body(self.chunk_object, [choice])
        return data(body | {"usage": None} if self._include_usage else body)

    def _frame(self, event: TokenEvent, index: int) -> bytes:
        tally = self._tallies[index]
        offset = len(tally.text)
        tally.count(event)
        return self.data(self._choice(index, self.piece(event), [event], offset, event.finish_reason))

    def _choice(
        self, index: int, said: Json, events: Sequence[TokenEvent], offset: int, finish: FinishReason | None
    ) -> Json:
        asked = self._request.params.logprobs is not None
        logprobs = self.logprobs(events, offset) if asked else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.prefix + self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
        }


class CompletionFrames(OpenAIFrames):
    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def answer(self, tally: Tally) -> Json:
        return {"text": tally.text}

    def piece(self, event: TokenEvent) -> Json:
        return {"text": event.text}

    def logprobs(self, events: Sequence[TokenEvent], offset: int) -> Json:
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
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


class ChatFrames(OpenAIFrames):
    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta: Json = {"role": "assistant", "content": ""}
        return self.data({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def answer(self, tally: Tally) -> Json:
        return {"message": {"role": "assistant", "content": tally.text}}

    def piece(self, event: TokenEvent) -> Json:
        return {"delta": {"content": event.text}}

    def logprobs(self, events: Sequence[TokenEvent], offset: int) -> Json:
        tokens = [event.logprobs for event in events if event.logprobs is not None]
        return {
            "content": [
                _chat_token(token.chosen) | {"top_logprobs": [_chat_token(top) for top in token.top]}
                for token in tokens
            ]
        }


def _alternatives(token: Logprobs) -> dict[str, float]:
    """The most likely tokens, and always the chosen one, as OpenAI has it."""
    return {one.token: finite(one.logprob) for one in (*token.top, token.chosen)}


def _chat_token(token: TokenLogprob) -> Json:
    return {"token": token.token, "bytes": list(token.token.encode()), "logprob": finite(token.logprob)}
