"""The three APIs that a server may have: paths, request bodies, and the parsing of events and responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from perf.workload import Request

Json: TypeAlias = dict[str, Any]
Api: TypeAlias = Literal["native", "openai", "tgi"]


class ProtocolError(Exception):
    """The response does not follow the server's API."""


@dataclass(slots=True)
class ResponseData:
    """The content of one event or of a whole response; None where it has no such value."""

    token: bool = False
    tokens: int | None = None
    prompt_tokens: int | None = None
    error: str | None = None
    detail: str = ""


class Dialect(ABC):
    """`model` is sent if it is set. With `fixed_length`, requests set `ignore_eos` where the API has it."""

    api: ClassVar[Api]
    end: ClassVar[bytes | None] = None  # data of the last event; None: the event with the usage is the last one

    def __init__(self, model: str | None, fixed_length: bool) -> None:
        self.model = model
        self.fixed_length = fixed_length

    @abstractmethod
    def path(self, request: Request) -> str: ...

    @abstractmethod
    def body(self, request: Request) -> Json: ...

    @abstractmethod
    def parse_event(self, document: Json) -> ResponseData: ...

    @abstractmethod
    def parse_response(self, document: Any) -> ResponseData: ...

    def _with_model(self, body: Json) -> Json:
        return body if self.model is None else {"model": self.model, **body}


class Native(Dialect):
    """The native API of serve_app."""

    api = "native"

    def path(self, request: Request) -> str:
        if len(request.prompts) > 1:
            return "/generate_batch"
        return "/generate_stream" if request.streaming else "/generate"

    def body(self, request: Request) -> Json:
        body: Json = {"max_tokens": request.max_tokens, "temperature": 0, "ignore_eos": self.fixed_length}
        if len(request.prompts) > 1:
            return self._with_model({"prompts": request.prompts, **body})
        if request.streaming:
            body["include_text"] = False
        return self._with_model({"prompt": request.prompts[0], **body})

    def parse_event(self, document: Json) -> ResponseData:
        if "error" in document:
            return ResponseData(error=f"in band {document['error']['code']}", detail=document["error"]["message"])
        usage = document.get("usage")
        return ResponseData(token=True) if usage is None else _usage(usage, token=True)

    def parse_response(self, document: Any) -> ResponseData:
        failed = [item["error"] for item in document.get("results", []) if "error" in item]
        if failed:
            return ResponseData(error=f"in batch {failed[0]['code']}", detail=failed[0]["message"])
        return _usage(document["usage"])


class OpenAI(Dialect):
    """/v1/completions, which vLLM, llama.cpp, TGI and others also have."""

    api = "openai"
    end = b"[DONE]"

    def path(self, request: Request) -> str:
        return "/v1/completions"

    def body(self, request: Request) -> Json:
        prompt = request.prompts[0] if len(request.prompts) == 1 else request.prompts
        body: Json = {"prompt": prompt, "max_tokens": request.max_tokens, "temperature": 0}
        if self.fixed_length:
            body["ignore_eos"] = True
        if request.streaming:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self._with_model(body)

    def parse_event(self, document: Json) -> ResponseData:
        if "error" in document:
            return _openai_error(document["error"])
        data = _usage(document["usage"]) if document.get("usage") else ResponseData()
        choices = document.get("choices") or []
        # The last chunk of a choice may have a finish reason and no text: it is not a token.
        data.token = any(choice.get("text") or choice.get("finish_reason") is None for choice in choices)
        return data

    def parse_response(self, document: Any) -> ResponseData:
        return _usage(document["usage"])


class Tgi(Dialect):
    """Text Generation Inference. It has no call for several prompts and no option to ignore the end of text."""

    api = "tgi"

    def path(self, request: Request) -> str:
        path = "/generate_stream" if request.streaming else "/generate"
        return path if self.model is None else f"{path}?model={self.model}"

    def body(self, request: Request) -> Json:
        return {"inputs": request.prompts[0], "parameters": {"max_new_tokens": request.max_tokens, "details": True}}

    def parse_event(self, document: Json) -> ResponseData:
        if "error" in document:
            return ResponseData(error=f"in band {document.get('error_type', 'error')}", detail=str(document["error"]))
        details = document.get("details") or {}
        return ResponseData(True, details.get("generated_tokens"), details.get("input_length"))

    def parse_response(self, document: Any) -> ResponseData:
        details = document["details"]
        return ResponseData(tokens=details["generated_tokens"], prompt_tokens=len(details.get("prefill") or []) or None)


DIALECTS: dict[Api, type[Dialect]] = {dialect.api: dialect for dialect in (Native, OpenAI, Tgi)}


def _usage(usage: Json, token: bool = False) -> ResponseData:
    return ResponseData(token, usage["completion_tokens"], usage["prompt_tokens"])


def _openai_error(error: Any) -> ResponseData:
    if isinstance(error, str):
        return ResponseData(error="in band error", detail=error)
    kind = error.get("code") or error.get("type") or "error"
    return ResponseData(error=f"in band {kind}", detail=error.get("message", ""))
