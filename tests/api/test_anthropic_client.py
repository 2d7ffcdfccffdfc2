"""Anthropic's Python library: every field that it publishes is declared, and it reads the answers strictly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import (
    AssistantMessageParam,
    JSONOutputFormatParam,
    MetadataParam,
    OutputConfigParam,
    RedactedThinkingBlockParam,
    SystemMessageParam,
    TextBlockParam,
    ThinkingBlockParam,
    ThinkingConfigAdaptiveParam,
    ThinkingConfigBetweenToolsParam,
    ThinkingConfigDisabledParam,
    ThinkingConfigEnabledParam,
    ToolChoiceAnyParam,
    ToolChoiceAutoParam,
    ToolChoiceNoneParam,
    ToolChoiceToolParam,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
    UserMessageParam,
    beta,
    message_count_tokens_params,
    message_create_params,
)
from anthropic.types.beta import (
    message_count_tokens_params as beta_count_tokens_params,
    message_create_params as beta_create_params,
)

from serve_app.api.anthropic.messages import (
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from serve_app.api.anthropic.schema import (
    CountTokensBody,
    MessagesBody,
    OutputConfig,
    OutputFormat,
    RequestMetadata,
    ThinkingConfig,
)
from serve_app.api.anthropic.tools import CustomTool, ToolSelection
from serve_app.api.app import create_app
from serve_app.api.schema import Body
from serve_app.core.events import FinishReason, ReasoningDelta
from serve_app.core.queries import Tokenize
from serve_app.core.requests import ChatMessage, ChatPrompt, ToolCall
from serve_app.errors import InvalidRequest, NotReady, PromptTooLong, QueueFull, ServeAppError

from .scripted import BEAT, ScriptedEngine, ScriptedTelemetry, Step, app_config, chunk
from .test_tools import Answer, calls, chunks

# The library sends these as headers.
HEADERS = {"betas", "user_profile_id", "workspace_id"}
HI: Any = {"role": "user", "content": "hi"}
CLOCK: Any = {"name": "clock", "input_schema": {"type": "object", "properties": {"zone": {"type": "string"}}}}
ANSWER: Answer = [[ReasoningDelta("Hm.")], *calls(("clock", '{"zone": "UTC"}'), text="Well.")]


@pytest.mark.parametrize(
    ("published", "body"),
    [
        (message_create_params.MessageCreateParamsBase, MessagesBody),
        (message_create_params.MessageCreateParamsStreaming, MessagesBody),
        (message_count_tokens_params.MessageCountTokensParams, CountTokensBody),
        (UserMessageParam, Turn),
        (AssistantMessageParam, Turn),
        (SystemMessageParam, Turn),
        (TextBlockParam, TextBlock),
        (ThinkingBlockParam, ThinkingBlock),
        (RedactedThinkingBlockParam, RedactedThinkingBlock),
        (ToolUseBlockParam, ToolUseBlock),
        (ToolResultBlockParam, ToolResultBlock),
        (ToolParam, CustomTool),
        (ToolChoiceAutoParam, ToolSelection),
        (ToolChoiceAnyParam, ToolSelection),
        (ToolChoiceToolParam, ToolSelection),
        (ToolChoiceNoneParam, ToolSelection),
        (ThinkingConfigEnabledParam, ThinkingConfig),
        (ThinkingConfigDisabledParam, ThinkingConfig),
        (ThinkingConfigAdaptiveParam, ThinkingConfig),
        (ThinkingConfigBetweenToolsParam, ThinkingConfig),
        (OutputConfigParam, OutputConfig),
        (JSONOutputFormatParam, OutputFormat),
        (MetadataParam, RequestMetadata),
        (beta_create_params.MessageCreateParamsBase, MessagesBody),
        (beta_count_tokens_params.MessageCountTokensParams, CountTokensBody),
        (beta.BetaTextBlockParam, TextBlock),
        (beta.BetaThinkingBlockParam, ThinkingBlock),
        (beta.BetaToolUseBlockParam, ToolUseBlock),
        (beta.BetaToolResultBlockParam, ToolResultBlock),
        (beta.BetaToolParam, CustomTool),
        (beta.BetaThinkingConfigEnabledParam, ThinkingConfig),
        (beta.BetaThinkingConfigAdaptiveParam, ThinkingConfig),
        (beta.BetaOutputConfigParam, OutputConfig),
    ],
)
def test_every_field_that_anthropic_publishes_is_declared(published: Any, body: type[Body]) -> None:
    """A new version of Anthropic's library fails here until the body declares its new fields."""
    assert published.__annotations__.keys() - HEADERS <= set(body.names())


@pytest.fixture
async def official(engine: ScriptedEngine, telemetry: ScriptedTelemetry) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The official client. It refuses an answer that is not as its types say. A silent stream has pings."""
    transport = httpx2.ASGITransport(create_app(engine, telemetry, app_config(heartbeat_s=0.02)))
    async with anthropic.AsyncAnthropic(
        base_url="http://test",
        api_key="any",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
        _strict_response_validation=True,
    ) as client:
        yield client


async def test_the_client_calls_a_tool_and_sends_the_result(
    official: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.plays(*chunks(ANSWER))
    message = await official.messages.create(model="small", max_tokens=100, messages=[HI], tools=[CLOCK])
    assert message.stop_reason == "tool_use"
    thinking, text, use = message.content
    assert isinstance(thinking, anthropic.types.ThinkingBlock)
    assert isinstance(text, anthropic.types.TextBlock)
    assert isinstance(use, anthropic.types.ToolUseBlock)
    assert (thinking.thinking, text.text, use.name, use.input) == ("Hm.", "Well.", "clock", {"zone": "UTC"})
    assert message._request_id
    results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "noon"}]
    await official.messages.create(
        model="small",
        max_tokens=100,
        messages=[HI, message.to_param(), {"role": "user", "content": results}],
        tools=[CLOCK],
    )
    prompt = engine.requests[1].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[1:] == (
        ChatMessage("assistant", "Well.", (ToolCall(use.id, "clock", '{"zone": "UTC"}'),), reasoning="Hm."),
        ChatMessage("tool", "noon", tool_call_id=use.id, name="clock"),
    )


async def test_the_client_joins_a_stream(official: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    first, *others = chunks(ANSWER)
    engine.plays(BEAT, first, BEAT, *others)
    async with official.messages.stream(model="small", max_tokens=100, messages=[HI], tools=[CLOCK]) as stream:
        kinds = [event.type async for event in stream]
        joined = await stream.get_final_message()
    engine.plays(first, *others)
    whole = await official.messages.create(model="small", max_tokens=100, messages=[HI], tools=[CLOCK])
    differing: Any = {"id": True, "content": {"__all__": {"id"}}}
    assert joined.model_dump(exclude=differing) == whole.model_dump(exclude=differing)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)


async def test_the_client_counts_tokens(official: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    counts = await official.messages.count_tokens(model="small", messages=[HI], system="Be brief.", tools=[CLOCK])
    assert counts.input_tokens == 2
    (model, query) = engine.queries[0]
    assert (model, type(query)) == ("small", Tokenize)


async def test_the_beta_client(official: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.plays(chunk(["a"], FinishReason.LENGTH))
    message = await official.beta.messages.create(model="small", max_tokens=1, messages=[HI], betas=["any"])
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("Wrong."), anthropic.BadRequestError),
        (PromptTooLong("Shorten it.", None, None, 70, 63), anthropic.BadRequestError),
        (QueueFull("8 requests wait.", retry_after_s=1), anthropic.RateLimitError),
        (NotReady("The model is being loaded.", retry_after_s=1), anthropic.OverloadedError),
    ],
)
async def test_the_client_knows_the_errors(
    official: anthropic.AsyncAnthropic, engine: ScriptedEngine, error: ServeAppError, kind: type[Exception]
) -> None:
    engine.plays(error)
    with pytest.raises(kind) as raised:
        await official.messages.create(model="small", max_tokens=1, messages=[HI])
    assert isinstance(raised.value, anthropic.APIStatusError)
    assert error.message in str(raised.value)
    assert raised.value.request_id


async def test_the_client_raises_an_error_of_a_stream(
    official: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    engine.plays(chunk(["a"], None), NotReady("The replica was lost."))
    with pytest.raises(anthropic.APIStatusError, match=r"The replica was lost\."):
        async with official.messages.stream(model="small", max_tokens=9, messages=[HI]) as stream:
            await stream.get_final_message()


async def test_the_client_retries_an_overloaded_service(
    official: anthropic.AsyncAnthropic, engine: ScriptedEngine
) -> None:
    answers: Iterator[list[Step]] = iter([[NotReady("Not yet.", retry_after_s=0.001)], [chunk(["a"])]])
    engine.script = lambda request: next(answers)
    message = await official.with_options(max_retries=1).messages.create(model="small", max_tokens=9, messages=[HI])
    assert message.stop_reason == "end_turn"
    assert len(engine.requests) == 2
