from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

import pytest

from serve_app.config import NativeOptions
from serve_app.core.events import FinishReason, TextDelta, TextToken, ToolCallDelta
from serve_app.core.queries import Detokenize, Tokenize
from serve_app.core.requests import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    Tool,
    ToolChoice,
)
from serve_app.engines.admission import MAX_PROMPT_LOGPROBS
from serve_app.engines.text.protocol import AnswerPlan
from serve_app.engines.toy import END, ToyDecoder, ToyRunner, ToyText
from serve_app.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    ServeAppError,
)
from tests.engines.native.helpers import (
    ManualClock,
    Panic,
    RecordingStream,
    ScriptedParser,
    admit,
    generate,
    limited_request,
    open_streams,
    read,
    request,
    running,
    stepped,
    wait_until,
)

OOPS = RuntimeError("scripted")


async def test_admission_returns_one_outcome_for_each_request_in_order() -> None:
    requests = [request("abc"), request("x" * 16), request([999]), request(""), request("x" * 15)]
    with running(max_context=16) as engine:
        made = open_streams(*requests)
        outcomes = engine.admit(made)
        answers = [await read(stream) for stream, refusal in zip(made, outcomes, strict=True) if refusal is None]
    assert [type(outcome) for outcome in outcomes] == [
        type(None),
        PromptTooLong,
        InvalidRequest,
        InvalidRequest,
        type(None),
    ]
    assert "has 16 tokens" in str(outcomes[1])
    assert "at most 15 tokens" in str(outcomes[1])
    assert [answer.text for answer in answers] == ["abcab", "x"]


async def test_a_request_whose_deadline_has_passed_is_refused_at_once() -> None:
    clock = ManualClock()
    with stepped(clock) as (engine, runner):
        late, early = (RecordingStream(request(timeout_s=5.0), arrived) for arrived in (95.0, 95.1))
        outcomes = engine.admit([late, early])
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded, type(None)]
        assert "5 s" in str(outcomes[0])
        wait_until(lambda: bool(runner.begun))
    assert runner.begun[0][0].stream is early
    assert late.terminal_events == 0, "the error is returned and not sent on the stream"


async def test_the_longest_prompt_leaves_one_token_for_the_answer() -> None:
    with running(max_context=16) as engine:
        answer = await generate(engine, request("x" * 15, params=SamplingParams()))
    assert (answer.text, answer.reason) == ("x", FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("keep", "prompt"), [(None, "abcdefg"), (1, "g"), (3, "efg"), (7, "abcdefg"), (100, "abcdefg"), (-1, "abcdefg")]
)
async def test_a_prompt_is_truncated_to_its_last_tokens(keep: int | None, prompt: str) -> None:
    with running(max_context=16) as engine:
        answer = await generate(engine, replace(limited_request("abcdefg", len(prompt)), truncate_prompt_tokens=keep))
    assert (answer.text, answer.chunks[0].prompt_tokens) == (prompt, len(prompt))


async def test_a_chat_is_truncated_to_its_last_tokens() -> None:
    chat = ChatPrompt((ChatMessage("user", "a long story"),))
    with running() as engine:
        answer = await generate(engine, replace(limited_request("", 9), prompt=chat, truncate_prompt_tokens=5))
    assert answer.text == "storystor"


async def test_a_prompt_that_is_too_long_fits_when_truncated() -> None:
    long = request("x" * 15 + "y" * 15, params=SamplingParams())
    made = open_streams(*(replace(long, truncate_prompt_tokens=keep) for keep in (None, 16, 15, -1, 0, -2)))
    with running(max_context=16) as engine:
        outcomes = engine.admit(made)
        answers = [await read(stream) for stream, refusal in zip(made, outcomes, strict=True) if refusal is None]
    kinds = [PromptTooLong, PromptTooLong, type(None), type(None), InvalidRequest, InvalidRequest]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [(answer.text, answer.reason) for answer in answers] == [("y", FinishReason.LENGTH)] * 2
    assert isinstance(outcomes[4], InvalidRequest)
    assert outcomes[4].param == "truncate_prompt_tokens"


async def test_a_prompt_over_its_reservation_is_refused_with_its_length() -> None:
    made = open_streams(*(replace(request("abcde"), prompt_limit=limit) for limit in (4, 5, 6, None)))
    with running(max_context=16) as engine:
        over, *fitting = engine.admit(made)
    assert isinstance(over, PromptTooLong)
    assert (over.tokens, over.maximum, over.over_reservation) == (5, 4, True)
    assert fitting == [None] * 3
    with running(max_context=16) as engine:
        (too_long,) = engine.admit(open_streams(replace(request("a" * 20), prompt_limit=2)))
    assert isinstance(too_long, PromptTooLong)
    assert not too_long.over_reservation, "no reservation helps"


async def test_an_invalid_logit_bias_is_refused() -> None:
    biases = [((END, 1.0),), ((END + 1, 1.0),), ((3, 1.0), (-1, 1.0)), ((3, math.nan),), ()]
    made = open_streams(*(request(params=SamplingParams(max_tokens=1, logit_bias=bias)) for bias in biases))
    with running() as engine:
        outcomes = engine.admit(made)
    assert [None if o is None else (o.message, o.param) for o in outcomes] == [
        None,
        ("token id 257 is outside 0 to 256", "logit_bias"),
        ("token id -1 is outside 0 to 256", "logit_bias"),
        ("the bias of token 3 is not a finite number", "logit_bias"),
        None,
    ]


class FaultyText(ToyText):
    """Raises `fault` for prompts with "bad", in a batch for all of its prompts, and for queries and decoders of them.

    Prompts with "no decoder" are tokenized, but have no decoder.
    """

    def __init__(self, fault: BaseException) -> None:
        self._fault = fault

    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        if any("bad" in str(prompt) for prompt in prompts):
            raise self._fault
        return super().encode(prompts)

    def decoder(self, prompt: Seq[int], skip_special_tokens: bool = True) -> ToyDecoder:
        if bytes(prompt) == b"no decoder":
            raise self._fault
        return super().decoder(prompt, skip_special_tokens)

    def tokenize(self, prompt: Prompt, special_tokens: bool) -> tuple[TextToken, ...] | ServeAppError:
        raise self._fault


class FaultyTextRunner(ToyRunner):
    def __init__(self, config: NativeOptions, fault: BaseException) -> None:
        super().__init__(config)
        self.text = FaultyText(fault)


@pytest.mark.parametrize("fault", [OOPS, Panic("scripted")])
async def test_a_fault_in_one_prompt_fails_only_that_request(fault: BaseException) -> None:
    with running(partial(FaultyTextRunner, fault=fault)) as engine:
        made = open_streams(request("abc"), request("bad"), request(""), request("no decoder"), request("de"))
        outcomes = engine.admit(made)
        answers = [await read(made[0]), await read(made[4])]
        assert isinstance(engine.answer(Tokenize(TextPrompt("hi"))), InternalError)
        assert engine.answer(Detokenize((*b"hi",))) == "hi"
    kinds = [type(None), InternalError, InvalidRequest, InternalError, type(None)]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert "scripted" not in str(outcomes[1])
    assert [answer.text for answer in answers] == ["abcab", "deded"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_during_admission_or_a_query_is_raised(fault: type[BaseException]) -> None:
    with running(partial(FaultyTextRunner, fault=fault())) as engine:
        with pytest.raises(fault):
            engine.admit(open_streams(request("bad")))
        with pytest.raises(fault):
            engine.answer(Tokenize(TextPrompt("hi")))


class MiscountingText(ToyText):
    def encode(self, prompts: Seq[Prompt]) -> list[list[int] | ServeAppError]:
        return super().encode(prompts)[:1]


class MiscountingTextRunner(ToyRunner):
    def __init__(self, config: NativeOptions) -> None:
        super().__init__(config)
        self.text = MiscountingText()


async def test_a_tokenizer_that_returns_too_few_results_is_called_for_each_prompt() -> None:
    with running(MiscountingTextRunner) as engine:
        answers = [await read(stream) for stream in admit(engine, request("abc"), request("de"))]
    assert [answer.text for answer in answers] == ["abcab", "deded"]


class ThreeTokens:
    """A constraint that is complete after any three tokens."""

    def __init__(self) -> None:
        self._accepted = 0

    def allowed(self) -> bytes:
        return b""

    def accept(self, token_id: int) -> bool:
        self._accepted += 1
        return self._accepted == 3


class ToolText(ToyText):
    """Keeps special tokens in the text of answers with tools; its constraint is complete after three tokens."""

    def plan(self, request: GenerationRequest, prompt: Seq[int]) -> AnswerPlan | InvalidRequest:
        assert list(prompt) == [97, END, 98]
        if request.tool_choice is None or not request.tool_choice.tools:
            return InvalidRequest("no tools", param="tools")
        params = replace(request.params, skip_special_tokens=False)
        return AnswerPlan(params, ThreeTokens(), ScriptedParser(TextDelta("end")))


class ToolRunner(ToyRunner):
    def __init__(self, config: NativeOptions) -> None:
        super().__init__(config)
        self.text = ToolText()


async def test_a_request_with_tools_is_constrained_and_its_events_carry_deltas() -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    tools = ToolChoice((Tool("f", "{}", "tools.0"),))
    with running(ToolRunner) as engine:
        made = open_streams(
            *(replace(request([97, END, 98], params=params), tool_choice=choice) for choice in (tools, ToolChoice(())))
        )
        outcomes = engine.admit(made)
        answer = await read(made[0])
    assert outcomes[0] is None
    assert isinstance(outcomes[1], InvalidRequest)
    assert (answer.text, answer.reason) == ("a<end>b", FinishReason.STOP)
    assert [event.deltas for event in answer.events] == [
        (ToolCallDelta(0, arguments="a"),),
        (ToolCallDelta(0, arguments="<end>"),),
        (ToolCallDelta(0, arguments="b"), TextDelta("end")),
    ]


async def test_a_model_without_tools_refuses_a_tool_choice() -> None:
    with running() as engine:
        (refusal,) = engine.admit(open_streams(replace(request(), tool_choice=ToolChoice(()))))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "tools"


@pytest.mark.parametrize(
    ("tokens", "alternatives", "message"),
    [
        (9, -1, "at least 0"),
        (9, MAX_PROMPT_LOGPROBS // 9, f"ask for at most {MAX_PROMPT_LOGPROBS // 9 - 1}"),
        (MAX_PROMPT_LOGPROBS // 2, 2, "ask for at most 1"),
        (MAX_PROMPT_LOGPROBS + 1, 0, f"the prompt to at most {MAX_PROMPT_LOGPROBS} tokens"),
    ],
)
async def test_too_many_prompt_logprobs_are_refused(tokens: int, alternatives: int, message: str) -> None:
    params = SamplingParams(prompt_logprobs=alternatives)
    with running(ToyRunner, max_context=2 * MAX_PROMPT_LOGPROBS) as engine:
        (refusal,) = engine.admit(open_streams(request("a" * tokens, params=params)))
    assert isinstance(refusal, InvalidRequest)
    assert refusal.param == "prompt_logprobs"
    assert message in refusal.message
