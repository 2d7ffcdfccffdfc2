"""OpenAI's shapes: completions and chat completions, whole and in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from serve_app.api.completion import CompletionState, together
from serve_app.api.error_handlers import openai_error
from serve_app.api.native.encoder import finite
from serve_app.api.openai.schema import Show
from serve_app.api.sse import DONE, data
from serve_app.core.events import Chunk, FinishReason, Logprobs, PromptDetails, TokenEvent, TokenLogprob
from serve_app.core.requests import GenerationRequest
from serve_app.errors import ServeAppError

Json = dict[str, object]


class OpenAIEncoder(ABC):
    """What both kinds share. `created` is the wall clock in whole seconds."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, id: str, requests: Sequence[GenerationRequest], created: int, include_usage: bool, show: Show
    ) -> None:
        self._id = id
        self._request = requests[0]
        self._created = created
        self._include_usage = include_usage
        self._show = show
        self._firsts = [number for number, request in enumerate(requests) if request.index == 0]
        self._tallies = [CompletionState() for _ in requests]
        # The number of the first answer to the same prompt.
        self._siblings = [number - request.index for number, request in enumerate(requests)]

    @abstractmethod
    def answer(self, tally: CompletionState) -> Json:
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

    def begun(self, choice: Json, prompt: PromptDetails | None) -> Json:
        """All of a choice, or its first part, with what it says of its prompt."""
        return choice

    def above(self, prompt: PromptDetails | None) -> Json:
        """What is said of the prompt above the choices."""
        return {}

    def of_prompt(self, prompt: PromptDetails) -> Json:
        """vLLM's fields, as far as they were asked for."""
        said: Json = {}
        if self._show.token_ids:
            said["prompt_token_ids"] = [piece.token_id for piece in prompt.tokens]
        if self._show.prompt_logprobs is not None:
            said["prompt_logprobs"] = [None, *(_ranked(one, self._show.prompt_logprobs) for one in prompt.logprobs)]
        return said

    def whole(self, tallies: Sequence[CompletionState]) -> Json:
        choices = []
        for index, tally in enumerate(tallies):
            choice = self._choice(index, self.answer(tally), tally.events, 0, tally.finish_reason)
            choice |= self._beside(tally.token_ids, tally.finish_reason, tally.stopped_by)
            choices.append(self.begun(choice, tallies[self._siblings[index]].prompt))
        body = self._body(self.whole_object, choices) | {"usage": together(tallies, self._firsts)}
        return body | self.above(tallies[0].prompt)

    def chunk(self, chunk: Chunk, index: int) -> bytes:
        tally = self._tallies[index]
        tally.arrived(chunk)
        opening = self.opening(index) if tally.tokens == 0 else b""
        return opening + b"".join(self._frame(event, index) for event in chunk.events)

    def end(self) -> bytes:
        usage = self._body(self.chunk_object, []) | {"usage": together(self._tallies, self._firsts)}
        return (data(usage) if self._include_usage else b"") + DONE

    def failure(self, error: ServeAppError) -> bytes:
        return data({"error": openai_error(error)}) + DONE

    def data(self, choice: Json, above: Json | None = None) -> bytes:
        """One chunk with one choice. OpenAI writes `usage: null` when a later chunk will tell it."""
        body = self._body(self.chunk_object, [choice]) | (above or {})
        return data(body | {"usage": None} if self._include_usage else body)

    def _frame(self, event: TokenEvent, index: int) -> bytes:
        tally = self._tallies[index]
        first, offset = tally.tokens == 0, len(tally.text)
        if self._show.echo and tally.prompt is not None and not first:
            offset += len(tally.prompt.text)
        tally.count(event)
        choice = self._choice(index, self.piece(event), [event], offset, event.finish_reason)
        choice |= self._beside([event.token_id], event.finish_reason, event.stopped_by)
        return self.data(self.begun(choice, tally.prompt) if first else choice)

    def _beside(self, token_ids: list[int], finish: FinishReason | None, stopped_by: str | int | None) -> Json:
        said: Json = {} if finish is None else {"stop_reason": stopped_by}
        return said | {"token_ids": token_ids} if self._show.token_ids else said

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


class CompletionEncoder(OpenAIEncoder):
    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def answer(self, tally: CompletionState) -> Json:
        return {"text": tally.text}

    def piece(self, event: TokenEvent) -> Json:
        return {"text": event.text}

    def begun(self, choice: Json, prompt: PromptDetails | None) -> Json:
        if prompt is None:
            return choice
        if self._show.echo:
            choice["text"] = prompt.text + str(choice["text"])
            choice["logprobs"] = self._echoed(choice["logprobs"], prompt)
        return choice | self.of_prompt(prompt)

    def _echoed(self, said: Any, prompt: PromptDetails) -> Json | None:
        """The prompt's tokens before those of the answer; nothing foretells the first."""
        most = self._request.params.logprobs
        if most is None:
            return None
        told = [replace(one, top=one.top[:most]) for one in prompt.logprobs]
        return {
            "tokens": [*(piece.text for piece in prompt.tokens), *said["tokens"]],
            "token_logprobs": [None, *(finite(one.chosen.logprob) for one in told), *said["token_logprobs"]],
            "top_logprobs": [None, *map(_alternatives, told), *said["top_logprobs"]],
            "text_offset": [
                *(piece.start for piece in prompt.tokens),
                *(len(prompt.text) + offset for offset in said["text_offset"]),
            ],
        }

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


class ChatEncoder(OpenAIEncoder):
    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        delta: Json = {"role": "assistant", "content": ""}
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self.data(choice, self.above(self._tallies[index].prompt))

    def above(self, prompt: PromptDetails | None) -> Json:
        return {} if prompt is None else self.of_prompt(prompt)

    def answer(self, tally: CompletionState) -> Json:
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


def _ranked(told: Logprobs, most: int) -> Json:
    """By token id, as JSON has keys. Of equally likely tokens each has the rank of the first."""
    values = [one.logprob for one in told.top]
    ranks = [(one, values.index(one.logprob) + 1) for one in told.top[:most]]
    return {
        str(one.token_id): {"logprob": finite(one.logprob), "rank": rank, "decoded_token": one.token}
        for one, rank in [*ranks, (told.chosen, told.rank)]
    }


def _chat_token(token: TokenLogprob) -> Json:
    return {"token": token.token, "bytes": list(token.token.encode()), "logprob": finite(token.logprob)}
