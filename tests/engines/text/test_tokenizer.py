"""Tests of prompts to token ids and of token ids to text, with the embedded model's tokenizer and with small ones."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve_app.core.events import PromptDetails
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolCall,
)
from serve_app.engines.text.prompt_details import prompt_details
from serve_app.engines.text.time_limit import TimeLimit, TookTooLong
from serve_app.engines.text.tokenizer import HFText, StreamDecoder
from serve_app.errors import InternalError, InvalidRequest, ServeAppError

from .chat_templates import QWEN
from .sample_tokenizers import (
    BYTE_VOCABULARY,
    EMBEDDED_END,
    EMBEDDED_VOCABULARY,
    END,
    byte_tokenizer,
    embedded_tokenizer,
    fast_tokenizer,
)

pytestmark = pytest.mark.model

UNICODE = "Grüße, 世界 🌍! 👩‍👩‍👧 \u200b naïve — “quotes”\n\ttabs  and   spaces 한국어 עברית 🇫🇷"


def embedded_text() -> HFText:
    return HFText(embedded_tokenizer(), frozenset({EMBEDDED_END}), EMBEDDED_VOCABULARY)


def text_with_template(chat_template: str) -> HFText:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    return HFText(tokenizer, frozenset({END}), BYTE_VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embedded_tokenizer()


@pytest.fixture(scope="module")
def text() -> HFText:
    return embedded_text()


def chat(*contents: str) -> ChatPrompt:
    roles = ("user", "assistant")
    return ChatPrompt(tuple(ChatMessage(roles[i % 2], content) for i, content in enumerate(contents)))


def encoded(text: HFText, prompt: Prompt) -> list[int]:
    (ids,) = text.encode([prompt])
    assert isinstance(ids, list), ids
    return ids


# Prompts to token ids


def test_batch_is_encoded_as_its_prompts_alone(text: HFText) -> None:
    prompts: list[Prompt] = [
        TextPrompt(UNICODE),
        chat("Hello", "Hi", "What?"),
        TokenPrompt((5, 6)),
        TextPrompt("a" * 5000),
    ]
    assert text.encode(prompts) == [text.encode([prompt])[0] for prompt in prompts]


def test_text_has_the_ids_of_transformers(text: HFText, tokenizer: Any) -> None:
    assert text.encode([TextPrompt(UNICODE)]) == [tokenizer(UNICODE)["input_ids"]]


def test_chat_has_the_ids_of_the_models_template(text: HFText, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")
    assert text.encode([chat("Hello")]) == [tokenizer(rendered, add_special_tokens=False)["input_ids"]]


def test_tokenize_gives_the_text_and_the_place_of_each_token(text: HFText, tokenizer: Any) -> None:
    tokens = text.tokenize(TextPrompt("Hello big world"), special_tokens=True)
    assert isinstance(tokens, tuple)
    assert [token.token_id for token in tokens] == tokenizer("Hello big world")["input_ids"]
    assert [token.text for token in tokens] == ["Hello", " big", " world"]
    assert [(token.start, token.end) for token in tokens] == [(0, 5), (5, 9), (9, 15)]


def test_tokenize_gives_the_tokens_of_a_chat_prompt(text: HFText) -> None:
    tokens = text.tokenize(chat("Hello"), special_tokens=True)
    assert isinstance(tokens, tuple)
    assert [[token.token_id for token in tokens]] == text.encode([chat("Hello")])
    assert tokens[0].text == "<|im_start|>"
    assert tokens[0].token_id in text.special_ids


@pytest.mark.parametrize("prompt", [TextPrompt(""), TokenPrompt(())])
def test_empty_prompt_is_refused_alone(text: HFText, prompt: Prompt) -> None:
    bad, good = text.encode([prompt, TextPrompt("good")])
    assert isinstance(bad, InvalidRequest)
    assert (str(bad), bad.param) == ("the prompt is empty", "prompt")
    assert good == encoded(text, TextPrompt("good"))


@pytest.mark.parametrize("token", [-1, EMBEDDED_VOCABULARY, 2**31 - 1])
def test_unknown_token_id_is_refused(text: HFText, token: int) -> None:
    (bad,) = text.encode([TokenPrompt((1, token))])
    assert isinstance(bad, InvalidRequest)
    assert str(bad) == f"token id {token} is outside 0 to {EMBEDDED_VOCABULARY - 1}"
    assert isinstance(text.tokenize(TokenPrompt((1, token)), special_tokens=True), InvalidRequest)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no assistant first') }}", "no assistant first"),
        ("{{ messages[9].content.x }}", "refuses these messages"),
        ("{% if %}", "refuses these messages"),
        ("", "no chat template"),
    ],
)
def test_messages_that_the_template_refuses_are_an_invalid_request(template: str, message: str) -> None:
    (bad,) = text_with_template(template).encode([chat("Hello")])
    assert isinstance(bad, InvalidRequest)
    assert message in str(bad)
    assert bad.param == "messages"


# Failures of one prompt


def assert_fails_alone(
    text: HFText, bad: Prompt, good: Prompt, message: str, kind: type[ServeAppError] = InternalError
) -> None:
    """`bad` ends with an error, and the prompts around it are encoded."""
    before, failed, after = text.encode([good, bad, good])
    assert type(failed) is kind
    assert str(failed) == message
    assert before == after == encoded(text, good)


def tokenizer_without_unknown_token() -> HFText:
    """The Rust tokenizer returns an error for every word except `good`."""
    backend = Tokenizer(models.WordLevel(vocab={"good": 0}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return HFText(fast_tokenizer(backend), frozenset({1}), 2)


def tokenizer_that_panics() -> HFText:
    """The Rust tokenizer panics on every text except `<end>`, which is not pre-tokenized."""
    backend = Tokenizer(models.WordLevel(vocab={"good": 0}))
    backend.pre_tokenizer = pre_tokenizers.FixedLength(0)
    return HFText(fast_tokenizer(backend), frozenset({1}), 2)


@pytest.mark.parametrize(
    ("make_text", "bad", "good"),
    [
        (embedded_text, "\ud800", "good"),
        (tokenizer_without_unknown_token, "bad", "good"),
        (tokenizer_that_panics, "bad", "<end>"),
    ],
    ids=["lone surrogate", "Rust error", "Rust panic"],
)
def test_failure_of_the_tokenizer_fails_only_its_prompt(make_text: Any, bad: str, good: str) -> None:
    text, message = make_text(), "the model's tokenizer failed on this prompt"
    assert_fails_alone(text, TextPrompt(bad), TextPrompt(good), message)
    assert_fails_alone(text, TextPrompt(bad), TokenPrompt((1,)), message)
    failed = text.tokenize(TextPrompt(bad), special_tokens=True)
    assert isinstance(failed, InternalError)
    assert str(failed) == message


def test_failure_of_the_chat_template_fails_only_its_prompt() -> None:
    text = text_with_template("{{ messages[0].content + 1 }}")
    message = "the model's chat template failed on these messages: TypeError"
    assert_fails_alone(text, chat("Hello"), TextPrompt("good"), message, InvalidRequest)


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Each renders to nothing for the samples with which the forms of a template are detected.
HOSTILE_TEMPLATES = {
    "endless": (f"{{% if messages[0].content == 'Hello' %}}{NESTED}{{% endif %}}", "takes too long for these messages"),
    "long": (
        "{% if messages[0].content == 'Hello' %}{{ 'a' * 40000000 }}{% endif %}",
        "makes too long a text of these",
    ),
    "code": (
        "{% if messages[0].content == 'Hello' %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endif %}",
        "refuses these messages: access to attribute '__class__'",
    ),
    "change": ("{% if messages[0].content == 'Hello' %}{{ messages.append(1) }}{% endif %}", "refuses these messages"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
def test_a_hostile_template_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.setattr("serve_app.engines.text.chat_template._RENDER_S", 0.2)
    text = text_with_template(source)
    began = time.monotonic()
    (failed,) = text.encode([chat("Hello")])
    assert isinstance(failed, InvalidRequest)
    assert message in str(failed)
    assert time.monotonic() - began < 5
    assert not isinstance(text.encode([TextPrompt("good")])[0], ServeAppError)


def test_a_limit_interrupts_nothing_after_its_body() -> None:
    """The limit is so short that a busy machine reaches it now and then, within the body."""
    for _ in range(200):
        with suppress(TookTooLong), TimeLimit(0.0005):
            pass
    sum(range(100_000))  # an exception that came late would be raised here


def test_tool_call_without_json_arguments_fails_only_its_prompt() -> None:
    bad = ChatPrompt((ChatMessage("assistant", "", tool_calls=(ToolCall("id", "f", "{"),)),))
    message = "the model's chat template failed on these messages: JSONDecodeError"
    assert_fails_alone(text_with_template(QWEN), bad, TextPrompt("good"), message, InvalidRequest)


def test_panic_of_the_decoder_is_raised_as_an_exception() -> None:
    """Strip removes more characters than the text of the token has."""
    backend = byte_tokenizer().backend_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 0, 5)])
    (token,) = backend.encode("a").ids
    with pytest.raises(RuntimeError, match="the tokenizer panicked"):
        StreamDecoder(backend, []).step(token)
    with pytest.raises(RuntimeError, match="the tokenizer panicked"):
        StreamDecoder(backend, [token])


# Token ids to text


def test_detokenize_gives_the_text_of_the_tokens(text: HFText) -> None:
    ids = encoded(text, TextPrompt(UNICODE))
    assert text.detokenize(ids, skip_special_tokens=False) == UNICODE
    assert text.detokenize([1, *ids, 2], skip_special_tokens=True) == UNICODE
    assert text.detokenize([1, *ids], skip_special_tokens=False) == "<|im_start|>" + UNICODE
    refusal = text.detokenize([EMBEDDED_VOCABULARY], skip_special_tokens=False)
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "prompt"


def test_info_describes_the_tokenizer_as_transformers_does(text: HFText, tokenizer: Any) -> None:
    info = text.info()
    assert info.kind == type(tokenizer).__name__
    assert (info.bos_token, info.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert info.chat_template == tokenizer.chat_template
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    assert {number: token.content for number, token in info.added_tokens.items()} == added
    assert all(token.special for token in info.added_tokens.values())


def test_info_has_no_chat_template_for_a_model_without_one() -> None:
    assert text_with_template("").info().chat_template is None


@pytest.mark.parametrize("answer", [UNICODE, "plain", " leading", "🌍", "a🌍b世c"])
def test_decoder_emits_whole_characters_that_join_to_the_text(text: HFText, tokenizer: Any, answer: str) -> None:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("Some prompt.", add_special_tokens=False)["input_ids"]
    decoder = text.decoder(prompt)
    pieces = [decoder.step(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(prompt + ids).removeprefix("Some prompt.")


@pytest.mark.parametrize(
    ("prompt", "cut_at_end", "answer", "cut_at_start", "emitted"),
    [
        ("hello é", 1, "é ok", 1, "é ok"),
        ("hello 😀", 2, "abc", 0, "abc"),
        ("hello \ufffd", 0, "abc", 0, "abc"),
        ("hello \ufffd", 0, "é€", 0, "é€"),
        ("\ufffd\ufffd", 0, "\ufffda", 0, "\ufffda"),
    ],
)
def test_decoder_does_not_repeat_a_prompt_that_ends_within_a_character(
    prompt: str, cut_at_end: int, answer: str, cut_at_start: int, emitted: str
) -> None:
    """With one token for each byte. A character that the answer completes belongs to the answer."""
    backend = byte_tokenizer().backend_tokenizer
    ids = backend.encode(prompt).ids
    decoder = StreamDecoder(backend, ids[: len(ids) - cut_at_end])
    assert "".join(decoder.step(token) for token in backend.encode(answer).ids[cut_at_start:]) == emitted


def byte_fallback() -> Tokenizer:
    """As of Llama 2, Mistral and Gemma: bytes represent text that has no token. Token n is byte n."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁so": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_decoder_continues_after_an_invalid_byte() -> None:
    decoder = StreamDecoder(byte_fallback(), [256])
    pieces = [decoder.step(token) for token in (0x41, 0xE4, 256, *"é".encode(), 256)]
    assert "".join(pieces) == "A soé so"


@given(
    st.lists(st.sampled_from([0x41, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 256, 999]), min_size=1, max_size=8),
    st.lists(st.sampled_from([0x41, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 256, 999]), max_size=15),
)
def test_decoder_continues_after_any_bytes(prompt: list[int], answer: list[int]) -> None:
    decoder = StreamDecoder(byte_fallback(), prompt)
    for token in answer:
        decoder.step(token)
    assert decoder.step(256).endswith(" so")


def test_decoder_leaves_special_tokens_out(text: HFText) -> None:
    decoder = text.decoder([5])
    assert decoder.step(2) == ""
    assert text.token_text(2) == "<|im_end|>"


def test_decoder_writes_special_tokens_by_name_on_request(text: HFText, tokenizer: Any) -> None:
    ids = tokenizer("<|im_start|>Grüße<|im_end|>", add_special_tokens=False)["input_ids"]
    decoder = text.decoder([5, 2], skip_special_tokens=False)
    assert "".join(decoder.step(token) for token in ids) == "<|im_start|>Grüße<|im_end|>"


# Prompt details


def details(text: HFText, prompt: Prompt, ids: list[int]) -> PromptDetails:
    request = GenerationRequest("id", "m", prompt, SamplingParams(), arrived=0.0, deadline=1.0)
    found = prompt_details(text, request, ids)
    assert isinstance(found, PromptDetails)
    return found


@pytest.mark.parametrize("kept", [None, 7])
def test_details_of_a_text_prompt_and_of_its_tokens_agree(text: HFText, kept: int | None) -> None:
    ids = encoded(text, TextPrompt(UNICODE))
    kept_ids = ids if kept is None else ids[-kept:]
    for prompt in (TextPrompt(UNICODE), TokenPrompt(tuple(ids))):
        found = details(text, prompt, kept_ids)
        assert UNICODE.endswith(found.text.removeprefix("\ufffd")), "the first token may be a part of a character"
        assert kept is not None or found.text == UNICODE
        assert [token.token_id for token in found.tokens] == kept_ids
        assert [token.text for token in found.tokens] == [text.token_text(token) for token in kept_ids]
        starts = [token.start for token in found.tokens]
        assert starts == sorted(starts)
        assert found.tokens[-1].end == len(found.text)


def test_details_give_the_place_of_each_token(text: HFText) -> None:
    prompt = "It was the best of times; it was 1859."
    ids = encoded(text, TextPrompt(prompt))
    for variant in (TextPrompt(prompt), TokenPrompt(tuple(ids))):
        tokens = details(text, variant, ids).tokens
        assert [prompt[token.start : token.end] for token in tokens] == [token.text for token in tokens]


# Bytes of tokens


@pytest.mark.parametrize("words", ["Łódź 🙂 中文", "plain", " \n\t"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text: HFText, words: str) -> None:
    (ids,) = text.encode([TextPrompt(words)])
    assert isinstance(ids, list)
    tokens = [text.token_logprob(token, -1.0) for token in ids]
    assert b"".join(token.token.encode() if token.raw is None else token.raw for token in tokens) == words.encode()
    assert any(token.raw is not None for token in tokens) is not words.isascii()


def test_a_byte_of_a_tokenizer_with_byte_fallback_is_its_own() -> None:
    text = HFText(fast_tokenizer(byte_fallback()), frozenset({257}), 258)
    assert text.token_logprob(0xE4, 0.0).raw == b"\xe4"
    assert text.token_logprob(0x41, 0.0).raw is None
