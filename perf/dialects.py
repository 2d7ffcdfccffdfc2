"""The three APIs that a server may speak: how each is asked, and what its answers and events say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from perf.workload import Ask

Json: TypeAlias = dict[str, Any]
Api: TypeAlias = Literal["native", "openai", "tgi"]


class NotUnderstood(Exception):
    """The server answered in another way than its API would."""


@dataclass(slots=True)
class Told:
    """What one event, or a whole answer, says. None: nothing of that."""

    token: bool = False
    tokens: int | None = None
    prompt_tokens: int | None = None
    error: str | None = None
    detail: str = ""


class Dialect(ABC):
    """`model` is asked for by name if it is given. `fixed_length` asks to go on to max_tokens whatever comes."""

    api: ClassVar[Api]
    end: ClassVar[bytes | None] = None  # what the last event's data is, where events do not tell

    def __init__(self, model: str | None, fixed_length: bool) -> None:
        self.model = model
        self.fixed_length = fixed_length

    @abstractmethod
    def path(self, ask: Ask) -> str: ...

    @abstractmethod
    def body(self, ask: Ask) -> Json: ...

    @abstractmethod
    def event(self, document: Json) -> Told: ...

    @abstractmethod
    def answer(self, document: Any) -> Told: ...

    def _named(self, body: Json) -> Json:
        return body if self.model is None else {"model": self.model, **body}


class Native(Dialect):
    """serve_app's own."""

    api = "native"

    def path(self, ask: Ask) -> str:
        if len(ask.prompts) > 1:
            return "/generate_batch"
        return "/generate_stream" if ask.streaming else "/generate"

    def body(self, ask: Ask) -> Json:
        body: Json = {"max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": self.fixed_length}
        if len(ask.prompts) > 1:
            return self._named({"prompts": ask.prompts, **body})
        if ask.streaming:
            body["include_text"] = False
        return self._named({"prompt": ask.prompts[0], **body})

    def event(self, document: Json) -> Told:
        if "error" in document:
            return Told(error=f"in band {document['error']['code']}", detail=document["error"]["message"])
        usage = document.get("usage")
        return Told(token=True) if usage is None else _used(usage, token=True)

    def answer(self, document: Any) -> Told:
        failed = [item["error"] for item in document.get("results", []) if "error" in item]
        if failed:
            return Told(error=f"in batch {failed[0]['code']}", detail=failed[0]["message"])
        return _used(document["usage"])


class OpenAI(Dialect):
    """/v1/completions, as vLLM, llama.cpp, TGI and others have it too."""

    api = "openai"
    end = b"[DONE]"

    def path(self, ask: Ask) -> str:
        return "/v1/completions"

    def body(self, ask: Ask) -> Json:
        prompt = ask.prompts[0] if len(ask.prompts) == 1 else ask.prompts
        body: Json = {"prompt": prompt, "max_tokens": ask.max_tokens, "temperature": 0}
        if self.fixed_length:
            body["ignore_eos"] = True
        if ask.streaming:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self._named(body)

    def event(self, document: Json) -> Told:
        if "error" in document:
            return _openai_error(document["error"])
        told = _used(document["usage"]) if document.get("usage") else Told()
        choices = document.get("choices") or []
        # The last one may say no more than why it ended.
        told.token = any(choice.get("text") or choice.get("finish_reason") is None for choice in choices)
        return told

    def answer(self, document: Any) -> Told:
        return _used(document["usage"])


class Tgi(Dialect):
    """Text Generation Inference's. It has no call for several prompts, and no way to ignore the end of text."""

    api = "tgi"

    def path(self, ask: Ask) -> str:
        path = "/generate_stream" if ask.streaming else "/generate"
        return path if self.model is None else f"{path}?model={self.model}"

    def body(self, ask: Ask) -> Json:
        return {"inputs": ask.prompts[0], "parameters": {"max_new_tokens": ask.max_tokens, "details": True}}

    def event(self, document: Json) -> Told:
        if "error" in document:
            return Told(error=f"in band {document.get('error_type', 'error')}", detail=str(document["error"]))
        details = document.get("details") or {}
        return Told(True, details.get("generated_tokens"), details.get("input_length"))

    def answer(self, document: Any) -> Told:
        details = document["details"]
        return Told(tokens=details["generated_tokens"], prompt_tokens=len(details.get("prefill") or []) or None)


DIALECTS: dict[Api, type[Dialect]] = {one.api: one for one in (Native, OpenAI, Tgi)}


def _used(usage: Json, token: bool = False) -> Told:
    return Told(token, usage["completion_tokens"], usage["prompt_tokens"])


def _openai_error(error: Any) -> Told:
    if isinstance(error, str):
        return Told(error="in band error", detail=error)
    return Told(error=f"in band {error.get('code') or error.get('type') or 'error'}", detail=error.get("message", ""))
