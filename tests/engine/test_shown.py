from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from serve_app.core.events import PromptDetails, TextToken
from serve_app.core.requests import ChatMessage, ChatPrompt, Prompt, SamplingParams, TextPrompt, TokenPrompt
from serve_app.engines.native.engine import MOST_TOLD
from serve_app.engines.text.prompt_details import shown
from serve_app.engines.toy import END, ToyRunner, ToyText
from serve_app.errors import InvalidRequest
from tests.engines.native.helpers import admitted, ask, read, request, running, streams

TEXT = ToyText()


def told(prompt: Prompt, kept: int | None = None, skip_special_tokens: bool = True) -> PromptDetails:
    (ids,) = TEXT.encode([prompt])
    assert isinstance(ids, list)
    asked = replace(request(params=SamplingParams(skip_special_tokens=skip_special_tokens)), prompt=prompt)
    found = shown(TEXT, asked, ids if kept is None else ids[-kept:])
    assert isinstance(found, PromptDetails)
    return found


@given(st.text(st.characters(max_codepoint=127), min_size=1, max_size=20), st.data())
def test_each_piece_is_where_it_says_in_what_is_left(text: str, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, len(text)))
    for prompt in (TextPrompt(text), TokenPrompt(tuple(text.encode()))):
        found = told(prompt, kept)
        assert found.text == text[-kept:]
        assert "".join(found.text[piece.start : piece.end] for piece in found.tokens) == found.text
        assert [piece.token_id for piece in found.tokens] == list(text[-kept:].encode())


def test_tokens_are_shown_as_their_decoder_has_them() -> None:
    """A character is there with its last token, and a special token if it is to be seen."""
    ids = TokenPrompt((*"é".encode(), END, ord("x")))
    assert told(ids).text == "éx"
    assert [(piece.start, piece.end) for piece in told(ids).tokens] == [(0, 0), (0, 1), (1, 1), (1, 2)]
    assert told(ids, skip_special_tokens=False).text == "é<end>x"


def test_a_chat_is_shown_as_its_template_has_it() -> None:
    assert told(ChatPrompt((ChatMessage("user", "hi"),))).text == "user: hi"


class Marked(ToyText):
    """Puts a sign before and after every text."""

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...]:
        pieces = super().tokenize(prompt, special_tokens)
        assert isinstance(pieces, tuple)
        sign = TextToken(END, "<end>", 0, 0)
        return (sign, *pieces, sign) if special_tokens else pieces


def test_signs_around_a_text_are_no_part_of_it() -> None:
    found = shown(Marked(), request("ab"), [END, *b"ab", END])
    assert isinstance(found, PromptDetails)
    assert found.text == "ab"
    assert [(piece.text, piece.start, piece.end) for piece in found.tokens] == [
        ("<end>", 0, 0),
        ("a", 0, 1),
        ("b", 1, 2),
        ("<end>", 1, 1),
    ]


# Through the engine


async def test_a_prompt_is_told_once_and_first() -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=0)
    with running(max_step_tokens=4, max_running=3) as engine:
        answer = await ask(engine, replace(request("hello you", params=params), prompt_details=True))
        other = await ask(engine, request("hello you", params=SamplingParams(max_tokens=3)))
    first, *others = answer.chunks
    assert first.prompt is not None
    assert first.prompt.text == "hello you"
    assert bytes(piece.token_id for piece in first.prompt.tokens) == b"hello you"
    assert bytes(one.chosen.token_id for one in first.prompt.logprobs) == b"ello you"
    assert all(chunk.prompt is None for chunk in (*others, *other.chunks))
    assert answer.text == "hel"


async def test_an_embedding_is_one_chunk_and_counts_as_no_token() -> None:
    with running(max_step_tokens=4, max_running=3) as engine:
        asked = [replace(request("ab" * n), embed=True) for n in range(1, 9)]
        answers = [await read(stream) for stream in admitted(engine, *asked)]
        stats = engine.stats()
    for n, answer in enumerate(answers, start=1):
        (chunk,) = answer.chunks
        assert (answer.error, chunk.events, chunk.finished, chunk.prompt_tokens) == (None, (), True, 2 * n)
        assert chunk.embedding == pytest.approx((0, 0.5**0.5, 0.5**0.5, 0))
    assert stats.generated_tokens == 0
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "alternatives", "says"),
    [
        (9, -1, "at least 0"),
        (9, MOST_TOLD // 9, f"ask for at most {MOST_TOLD // 9 - 1}"),
        (MOST_TOLD // 2, 2, "ask for at most 1"),
        (MOST_TOLD + 1, 0, f"the prompt to at most {MOST_TOLD} tokens"),
    ],
)
def test_more_than_one_answer_tells_is_refused(tokens: int, alternatives: int, says: str) -> None:
    params = SamplingParams(prompt_logprobs=alternatives)
    with running(ToyRunner, max_context=2 * MOST_TOLD) as engine:
        (refusal,) = engine.admit(streams([request("a" * tokens, params=params)]))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "prompt_logprobs"
    assert says in refusal.message
