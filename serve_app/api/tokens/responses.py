"""The answers of /tokenize, /detokenize and /tokenizer_info, as typed dictionaries."""

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
class AddedTokenFacts(TypedDict):
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


@exact
class TokenizerFacts(TypedDict):
    """As in vLLM, with the names of transformers' tokenizer_config.json. `added_tokens_decoder` is by token id."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    model_max_length: int
    chat_template: str | None
    added_tokens_decoder: dict[str, AddedTokenFacts]


@exact
class TgiTextToken(TypedDict):
    """TGI's form. The token covers the characters from `start` to `stop`."""

    id: int
    text: str
    start: int
    stop: int
