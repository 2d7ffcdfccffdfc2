from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from serve_app.config import NativeOptions
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolChoice,
)
from serve_app.engines.native.sequence import Advance, Step
from serve_app.engines.toy import END, ToyDecoder, ToyRunner, ToyText
from serve_app.errors import InvalidRequest

from .native.helpers import request, sequence, tokens_of


@given(st.binary(max_size=12))
def test_decoding_byte_by_byte_equals_decoding_at_once(data: bytes) -> None:
    """A full stop at the end releases the bytes of an incomplete character."""
    decoder = ToyDecoder()
    assert "".join(decoder.step(token) for token in data + b".") == (data + b".").decode(errors="replace")


@given(st.text(max_size=6))
def test_every_character_comes_with_its_last_byte(text: str) -> None:
    decoder = ToyDecoder()
    for character in text:
        *first, last = (decoder.step(token) for token in character.encode())
        assert ("".join(first), last) == ("", character)


def test_the_end_token_has_no_text_unless_special_tokens_are_kept() -> None:
    assert ToyDecoder().step(END) == ""
    assert ToyDecoder(skip_special_tokens=False).step(END) == "<end>"


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        (TextPrompt("hé"), list("hé".encode())),
        (TokenPrompt((1, END)), [1, END]),
        (ChatPrompt((ChatMessage("user", "hi"), ChatMessage("bot", "ho"))), list(b"user: hi\nbot: ho")),
    ],
)
def test_the_tokens_of_a_prompt_are_its_bytes(prompt: Prompt, ids: list[int]) -> None:
    assert ToyText().encode([prompt]) == [ids]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [(TextPrompt(""), "is empty"), (TokenPrompt(()), "is empty"), (TokenPrompt((END + 1,)), "0 to 256")],
)
def test_an_invalid_prompt_is_refused_in_its_place(prompt: Prompt, message: str) -> None:
    good, bad = ToyText().encode([TextPrompt("x"), prompt])
    assert good == [ord("x")]
    assert isinstance(bad, InvalidRequest)
    assert message in bad.message
    assert bad.param == "prompt"


def test_tools_are_refused() -> None:
    asking = replace(request("abc"), tool_choice=ToolChoice((Tool("f", "{}", "tools.0"),)))
    refusal = ToyText().plan(asking, b"abc")
    assert isinstance(refusal, InvalidRequest)
    assert (refusal.message, refusal.param) == ("the toy model calls no tools", "tools")


def test_an_answer_repeats_its_prompt() -> None:
    runner, made = ToyRunner(NativeOptions()), sequence("abc")
    for _ in range(5):
        (sampled,) = tokens_of(runner.run(Step((Advance(made, made.pending),))))
        made.tokens.append(sampled.token_id)
    assert bytes(made.tokens) == b"abcabcab"


def test_an_incomplete_prompt_gives_no_token() -> None:
    assert ToyRunner(NativeOptions()).run(Step((Advance(sequence("abc"), 2),))) == []


def test_logprobs_are_reported_on_request() -> None:
    made = sequence("abc", SamplingParams(logprobs=0))
    (sampled,) = tokens_of(ToyRunner(NativeOptions()).run(Step((Advance(made, 3),))))
    assert sampled.logprobs is not None
    assert sampled.logprobs.chosen.token == "a"


def test_the_source_sets_times_and_the_config_sets_sizes() -> None:
    config = NativeOptions(max_running=3, max_context=40)
    began = time.monotonic()
    runner = ToyRunner.from_source("builtin:toy?step_ms=10&load_s=0.01", config)
    runner.run(Step(()))
    assert time.monotonic() - began >= 0.02
    assert (runner.slots, runner.context) == (3, 40)
    assert ToyRunner.from_source("builtin:toy", config).run(Step(())) == []


def test_tokens_are_logged_on_request(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    runner, made = ToyRunner.from_source(f"builtin:toy?log={path}", NativeOptions()), sequence("abc")
    before = time.monotonic()
    runner.run(Step((Advance(made, 2),)))
    runner.run(Step((Advance(made, 3),)))
    (line,) = path.read_text().splitlines()
    instant, request_id = line.split()
    assert before - 0.001 <= float(instant) <= time.monotonic()
    assert request_id == "id"
    assert runner._log is not None
    runner._log.close()


def test_a_step_fails_if_a_prompt_begins_with_the_configured_text() -> None:
    runner = ToyRunner.from_source("builtin:toy?fails_on=bad", NativeOptions())
    assert runner.run(Step((Advance(sequence("a bad one"), 9),))) != []
    with pytest.raises(RuntimeError):
        runner.run(Step((Advance(sequence("good"), 4), Advance(sequence("bad"), 3))))
