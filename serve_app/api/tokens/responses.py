"""The answers of /tokenize and /detokenize, as typed dictionaries."""

from __future__ import annotations

from typing_extensions import TypedDict

from serve_app.api.responses import exact


@exact
class Tokens(TypedDict):
    """vLLM's form. `token_strs` is null unless the request has `return_token_strs`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@exact
class DetokenizedText(TypedDict):
    prompt: str


@exact
class TgiTextToken(TypedDict):
    """TGI's form. The token covers the characters from `start` to `stop`."""

    id: int
    text: str
    start: int
    stop: int
