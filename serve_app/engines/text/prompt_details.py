"""A prompt as it is told to whoever asked for it: its text, and where in it each of its tokens is."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate

from serve_app.core.events import PromptDetails, TextToken
from serve_app.core.requests import GenerationRequest, TextPrompt, TokenPrompt
from serve_app.engines.text.protocol import Text
from serve_app.errors import ServeAppError


def shown(text: Text, request: GenerationRequest, ids: Seq[int]) -> PromptDetails | ServeAppError:
    """Of the prompt's tokens `ids`, which are all of them or the last."""
    if isinstance(request.prompt, TextPrompt):
        pieces = text.tokenize(request.prompt, special_tokens=True)
        return pieces if isinstance(pieces, ServeAppError) else _as_sent(request.prompt.text, pieces, len(ids))
    pieces = text.tokenize(TokenPrompt(tuple(ids)), special_tokens=False)
    if isinstance(pieces, ServeAppError):
        return pieces
    decoder = text.decoder((), request.params.skip_special_tokens)
    said = [decoder.step(token) for token in ids]
    ends = list(accumulate(map(len, said)))
    placed = [
        replace(piece, start=end - len(part), end=end) for piece, part, end in zip(pieces, said, ends, strict=True)
    ]
    return PromptDetails(tuple(placed), "".join(said))


def _as_sent(text: str, pieces: Seq[TextToken], kept: int) -> PromptDetails:
    """What covers no character of the text is where those before it end."""
    starts = list(accumulate((piece.start for piece in pieces), max))[-kept:]
    first = starts[0] if kept < len(pieces) else 0
    placed = [
        replace(piece, start=start - first, end=max(start, piece.end) - first)
        for piece, start in zip(pieces[-kept:], starts, strict=True)
    ]
    return PromptDetails(tuple(placed), text[first:])
