"""Tests of the text and the token places of a prompt, with the toy model's tokenizer of one token for each byte."""

from __future__ import annotations

from hypothesis import given, strategies as st

from serve_app.core.events import PromptDetails, TextToken
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from serve_app.engines.text.prompt_details import prompt_details
from serve_app.engines.toy import END, ToyText
from serve_app.errors import InternalError, ServeAppError


def details(
    prompt: Prompt, ids: list[int], skip_special_tokens: bool = True, text: ToyText | None = None
) -> PromptDetails:
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    request = GenerationRequest("id", "toy", prompt, params, arrived=0.0, deadline=1.0)
    found = prompt_details(text or ToyText(), request, ids)
    assert isinstance(found, PromptDetails)
    return found


def places(found: PromptDetails) -> list[tuple[int, int]]:
    return [(token.start, token.end) for token in found.tokens]


@given(st.text(st.characters(max_codepoint=127), min_size=1, max_size=20), st.data())
def test_tokens_have_their_places_in_the_kept_text(text: str, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(text)))
    for prompt in (TextPrompt(text), TokenPrompt(tuple(text.encode()))):
        found = details(prompt, list(text.encode())[-kept:])
        assert found.text == text[-kept:]
        assert "".join(found.text[start:end] for start, end in places(found)) == found.text
        assert [token.token_id for token in found.tokens] == list(text[-kept:].encode())


def test_character_belongs_to_the_last_of_its_tokens() -> None:
    ids = [*"é".encode(), END, ord("x")]
    found = details(TokenPrompt(tuple(ids)), ids)
    assert found.text == "éx"
    assert places(found) == [(0, 0), (0, 1), (1, 1), (1, 2)]


def test_special_tokens_are_in_the_text_on_request() -> None:
    ids = [*"é".encode(), END, ord("x")]
    assert details(TokenPrompt(tuple(ids)), ids, skip_special_tokens=False).text == "é<end>x"


def test_text_of_a_chat_prompt_is_the_rendered_chat() -> None:
    assert details(ChatPrompt((ChatMessage("user", "hi"),)), list(b"user: hi")).text == "user: hi"


class EnclosingText(ToyText):
    """Adds an end token before and after every text."""

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...]:
        tokens = super().tokenize(prompt, special_tokens)
        assert isinstance(tokens, tuple)
        added = TextToken(END, "<end>", 0, 0)
        return (added, *tokens, added) if special_tokens else tokens


def test_added_special_tokens_cover_no_characters() -> None:
    found = details(TextPrompt("ab"), [END, *b"ab", END], text=EnclosingText())
    assert found.text == "ab"
    assert [(token.text, token.start, token.end) for token in found.tokens] == [
        ("<end>", 0, 0),
        ("a", 0, 1),
        ("b", 1, 2),
        ("<end>", 1, 1),
    ]


class FailingText(ToyText):
    def tokenize(self, prompt: Prompt, special_tokens: bool) -> ServeAppError:
        return InternalError("failed")


def test_failure_of_the_tokenizer_is_returned() -> None:
    for prompt in (TextPrompt("ab"), TokenPrompt((97, 98))):
        request = GenerationRequest("id", "toy", prompt, SamplingParams(), arrived=0.0, deadline=1.0)
        assert isinstance(prompt_details(FailingText(), request, [97, 98]), InternalError)
