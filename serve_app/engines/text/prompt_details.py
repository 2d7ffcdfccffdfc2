"""A prompt's text and the place of each of its tokens in that text, for requests with `prompt_details`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate

from serve_app.core.events import PromptDetails, TextToken
from serve_app.core.requests import GenerationRequest, TextPrompt, TokenPrompt
from serve_app.engines.text.protocol import Text
from serve_app.errors import ServeAppError


def prompt_details(tokenizer: Text, request: GenerationRequest, ids: Seq[int]) -> PromptDetails | ServeAppError:
    """The details of a request's prompt whose tokens `ids` were kept: all of them or the last ones."""
    if isinstance(request.prompt, TextPrompt):
        tokens = tokenizer.tokenize(request.prompt, special_tokens=True)
        return tokens if isinstance(tokens, ServeAppError) else _as_sent(request.prompt.text, tokens, len(ids))
    tokens = tokenizer.tokenize(TokenPrompt(tuple(ids)), special_tokens=False)
    if isinstance(tokens, ServeAppError):
        return tokens
    decoder = tokenizer.decoder((), request.params.skip_special_tokens)
    texts = [decoder.step(token) for token in ids]
    ends = accumulate(map(len, texts))
    placed = [
        replace(token, start=end - len(text), end=end) for token, text, end in zip(tokens, texts, ends, strict=True)
    ]
    return PromptDetails(tuple(placed), "".join(texts))


def _as_sent(text: str, tokens: Seq[TextToken], kept: int) -> PromptDetails:
    """The last `kept` tokens of a text; a token without characters is placed at the end of the tokens before it."""
    starts = list(accumulate((token.start for token in tokens), max))[-kept:]
    first = starts[0] if kept < len(tokens) else 0
    placed = [
        replace(token, start=start - first, end=max(start, token.end) - first)
        for token, start in zip(tokens[-kept:], starts, strict=True)
    ]
    return PromptDetails(tuple(placed), text[first:])


shown = prompt_details  # until engines/native imports the new name
