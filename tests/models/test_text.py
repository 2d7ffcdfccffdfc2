"""The embedded model's own tokenizer, seen from the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from serve_app.core.events import PromptDetails
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from serve_app.engines.native.loader import builtin_gguf, convert_gguf
from serve_app.engines.text.prompt_details import shown
from serve_app.engines.text.tokenizer import HFText, StreamDecoder
from serve_app.errors import InternalError, InvalidRequest
from tests.models import tiny

pytestmark = pytest.mark.model

VOCABULARY = 49152
WILD = "Grüße, 世界 🌍! 👩‍👩‍👧 \u200b naïve — “quotes”\n\ttabs  and   spaces 한국어 עברית 🇫🇷"


@pytest.fixture(scope="module")
def folder() -> Path:
    return convert_gguf(builtin_gguf(), lambda stage: None)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """A fresh one: some tests change its chat template."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text(tokenizer: Any) -> HFText:
    return HFText(tokenizer, frozenset({2}), VOCABULARY)


def chat(*contents: str) -> ChatPrompt:
    roles = ("user", "assistant")
    return ChatPrompt(tuple(ChatMessage(roles[i % 2], content) for i, content in enumerate(contents)))


def test_together_is_one_by_one(text: HFText) -> None:
    prompts: list[Prompt] = [
        TextPrompt(WILD),
        chat("Hello", "Hi", "What?"),
        TokenPrompt((5, 6)),
        TextPrompt("a" * 5000),
    ]
    assert text.encode(prompts) == [text.encode([prompt])[0] for prompt in prompts]


def test_text_is_what_the_tokenizer_makes_of_it(text: HFText, tokenizer: Any) -> None:
    assert text.encode([TextPrompt(WILD)]) == [tokenizer(WILD)["input_ids"]]


def test_pieces_cover_the_text_and_know_their_ids(text: HFText, tokenizer: Any) -> None:
    pieces = text.tokenize(TextPrompt("Hello big world"), special_tokens=True)
    assert isinstance(pieces, tuple)
    assert [piece.token_id for piece in pieces] == tokenizer("Hello big world")["input_ids"]
    assert [piece.text for piece in pieces] == ["Hello", " big", " world"]
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 5), (5, 9), (9, 15)]


def test_a_chats_pieces_are_those_of_its_prompt(text: HFText) -> None:
    pieces = text.tokenize(chat("Hello"), special_tokens=True)
    assert isinstance(pieces, tuple)
    assert [[piece.token_id for piece in pieces]] == text.encode([chat("Hello")])
    assert pieces[0].text == "<|im_start|>"
    assert pieces[0].token_id in text.special_ids


def test_a_text_comes_back_from_its_tokens(text: HFText) -> None:
    (ids,) = text.encode([TextPrompt(WILD)])
    assert isinstance(ids, list)
    assert text.detokenize(ids, skip_special_tokens=False) == WILD
    assert text.detokenize([1, *ids, 2], skip_special_tokens=True) == WILD
    assert text.detokenize([1, *ids], skip_special_tokens=False) == "<|im_start|>" + WILD
    refusal = text.detokenize([VOCABULARY], skip_special_tokens=False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "prompt"


def test_messages_are_what_the_models_template_makes_of_them(text: HFText, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")
    assert text.encode([chat("Hello")]) == [tokenizer(rendered, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("piece", [WILD, "plain", " leading", "🌍", "a🌍b世c"])
def test_pieces_are_whole_characters_and_join_to_the_text(text: HFText, tokenizer: Any, piece: str) -> None:
    ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Some prompt.", add_special_tokens=False)["input_ids"]
    decoder = text.decoder(prompt)
    pieces = [decoder.step(token) for token in ids]
    assert not any("\ufffd" in one for one in pieces)
    assert "".join(pieces) == tokenizer.decode(prompt + ids).removeprefix("Some prompt.")


@pytest.mark.parametrize(
    ("whole", "without_last", "answer", "without_first", "told"),
    [
        ("hello é", 1, "é ok", 1, "é ok"),
        ("hello 😀", 2, "abc", 0, "abc"),
        ("hello \ufffd", 0, "abc", 0, "abc"),
        ("hello \ufffd", 0, "é€", 0, "é€"),
        ("\ufffd\ufffd", 0, "\ufffda", 0, "\ufffda"),
    ],
)
def test_a_prompt_that_ends_in_half_a_character_is_not_told_again(
    whole: str, without_last: int, answer: str, without_first: int, told: str
) -> None:
    """One token a byte. What the answer completes belongs to the answer."""
    bytewise = tiny.tokenizer().backend_tokenizer
    prompt = bytewise.encode(whole).ids
    decoder = StreamDecoder(bytewise, prompt[: len(prompt) - without_last])
    assert "".join(decoder.step(token) for token in bytewise.encode(answer).ids[without_first:]) == told


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: what has no token of its own is spelt in bytes. Token n is byte n."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁so": 256}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_a_byte_that_spoils_those_before_it_does_not_end_the_text() -> None:
    decoder = StreamDecoder(byte_fallback(), [256])
    pieces = [decoder.step(token) for token in (0x41, 0xE4, 256, *"é".encode(), 256)]
    assert "".join(pieces) == "A soé so"


@given(
    st.lists(st.sampled_from([0x41, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 256, 999]), min_size=1, max_size=8),
    st.lists(st.sampled_from([0x41, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 256, 999]), max_size=15),
)
def test_whatever_the_bytes_a_decoder_goes_on(prompt: list[int], answer: list[int]) -> None:
    decoder = StreamDecoder(byte_fallback(), prompt)
    for token in answer:
        decoder.step(token)
    assert decoder.step(256).endswith(" so")


def test_special_tokens_are_no_text(text: HFText) -> None:
    decoder = text.decoder([5])
    assert decoder.step(2) == ""
    assert text.token_text(2) == "<|im_end|>"


def test_special_tokens_are_text_when_asked_for(text: HFText, tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>Grüße<|im_end|>", add_special_tokens=False)["input_ids"]
    decoder = text.decoder([5, 2], skip_special_tokens=False)
    assert "".join(decoder.step(token) for token in ids) == "<|im_start|>Grüße<|im_end|>"


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt(())])
def test_an_empty_prompt_is_refused_among_good_ones(text: HFText, prompt: Prompt) -> None:
    bad, good = text.encode([prompt, TextPrompt("good")])
    assert isinstance(bad, InvalidRequest)
    assert (str(bad), bad.param) == ("the prompt is empty", "prompt")
    assert good == text.encode([TextPrompt("good")])[0]


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**31 - 1])
def test_an_unknown_token_is_refused_by_its_number(text: HFText, token: int) -> None:
    (bad,) = text.encode([TokenPrompt((1, token))])
    assert isinstance(bad, InvalidRequest)
    assert str(bad) == f"token id {token} is outside 0 to {VOCABULARY - 1}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no assistant first') }}", "no assistant first"),
        ("{{ messages[9].content.x }}", "refuses these messages"),
        ("{% if %}", "refuses these messages"),
        ("", "no chat template"),
    ],
)
def test_what_the_template_refuses_is_the_callers_to_mend(
    text: HFText, tokenizer: Any, template: str, said: str
) -> None:
    tokenizer.chat_template = template
    (bad,) = text.encode([chat("Hello")])
    assert isinstance(bad, InvalidRequest)
    assert said in str(bad)
    assert bad.param == "messages"


def test_a_template_that_breaks_harms_nobody_who_came_in_together(text: HFText, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    bad, good = text.encode([chat("Hello"), TextPrompt("good")])
    assert isinstance(bad, InternalError)
    assert str(bad) == "the model's chat template failed on these messages"
    assert good == text.encode([TextPrompt("good")])[0]


@pytest.mark.parametrize("kept", [None, 7])
def test_a_prompt_is_shown_as_it_was_sent(text: HFText, kept: int | None) -> None:
    """Given as text or as its tokens it is the same text, with its pieces in order."""
    (ids,) = text.encode([TextPrompt(WILD)])
    assert isinstance(ids, list)
    for prompt in (TextPrompt(WILD), TokenPrompt(tuple(ids))):
        asked = GenerationRequest("id", "m", prompt, SamplingParams(), arrived=0.0, deadline=1.0)
        found = shown(text, asked, ids if kept is None else ids[-kept:])
        assert isinstance(found, PromptDetails)
        assert WILD.endswith(found.text.removeprefix("\ufffd")), "but for half a character at the cut"
        assert kept is not None or found.text == WILD
        assert [piece.token_id for piece in found.tokens] == (ids if kept is None else ids[-kept:])
        assert [piece.text for piece in found.tokens] == [text.token_text(piece.token_id) for piece in found.tokens]
        starts = [piece.start for piece in found.tokens]
        assert starts == sorted(starts)
        assert found.tokens[-1].end == len(found.text)


def test_a_plain_prompt_has_each_piece_at_its_place(text: HFText) -> None:
    said = "It was the best of times; it was 1859."
    (ids,) = text.encode([TextPrompt(said)])
    assert isinstance(ids, list)
    for prompt in (TextPrompt(said), TokenPrompt(tuple(ids))):
        found = shown(text, GenerationRequest("id", "m", prompt, SamplingParams(), arrived=0.0, deadline=1.0), ids)
        assert isinstance(found, PromptDetails)
        assert [said[piece.start : piece.end] for piece in found.tokens] == [piece.text for piece in found.tokens]
