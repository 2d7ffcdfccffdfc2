"""Answers the queries about a model's text, alike in every engine."""

from __future__ import annotations

from serve_app.core.queries import Detokenize, GetTokenizerInfo, Query, Tokenize
from serve_app.engines.text.protocol import Text


def answer(query: Query[object], text: Text) -> object:
    """The result of a query, or a ServeAppError. Raises TypeError for a query that is not about text."""
    match query:
        case Tokenize(prompt, special_tokens):
            return text.tokenize(prompt, special_tokens)
        case Detokenize(token_ids, skip_special_tokens):
            return text.detokenize(token_ids, skip_special_tokens)
        case GetTokenizerInfo():
            return text.info()
    raise TypeError(f"unknown query {query!r}")
