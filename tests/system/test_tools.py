"""Tool calls of the embedded model through the whole service, with OpenAI's client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.system.service import ShippedService, documented_examples

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "forecast", "description": "Weather to come.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "clock", "description": "What time it is."}},
]
USER: Any = {"role": "user", "content": "What will the weather be in Paris for three days?"}
FORECAST: Any = {"type": "function", "function": {"name": "forecast"}}


@pytest.fixture
async def client(tools_service: ShippedService) -> AsyncIterator[openai.AsyncOpenAI]:
    async with tools_service.openai_client() as client:
        yield client


async def test_a_tool_call_whole_and_streamed_and_the_answer_to_its_result(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0, "max_tokens": 100}
    whole: Any = await client.chat.completions.create(messages=[USER], tool_choice=FORECAST, **asked)
    said = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert said.content is None
    (call,) = said.tool_calls or []
    assert call.function.name == "forecast"
    jsonschema.validate(json.loads(call.function.arguments), PLACE)

    async with client.chat.completions.stream(messages=[USER], tool_choice=FORECAST, **asked) as stream:
        last: Any = (await stream.get_final_completion()).choices[0]
    (streamed,) = last.message.tool_calls or []
    assert last.finish_reason == "tool_calls"
    assert (streamed.function.name, streamed.function.arguments) == ("forecast", call.function.arguments)

    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 25 degrees."}
    after = await client.chat.completions.create(messages=[USER, said, result], **asked | {"tool_choice": "none"})
    assert after.choices[0].message.content
    assert after.choices[0].finish_reason in ("stop", "length")
    assert after.usage is not None
    assert whole.usage is not None
    assert after.usage.prompt_tokens > whole.usage.prompt_tokens


async def test_each_of_several_answers_calls_a_required_tool(client: openai.AsyncOpenAI) -> None:
    answer: Any = await client.chat.completions.create(
        model=MODEL, messages=[USER], tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        n=3, seed=1, temperature=1, max_tokens=100,
    )  # fmt: skip
    schemas = {"forecast": PLACE, "clock": {"type": "object", "maxProperties": 0}}
    for choice in answer.choices:
        (call,) = choice.message.tool_calls or []
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


async def test_an_unsupported_strict_schema_is_refused_with_the_path_of_its_tool(client: openai.AsyncOpenAI) -> None:
    parameters = {"properties": {"a": {"type": "odd"}}}
    strange: Any = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=MODEL, messages=[USER], tools=[*TOOLS, strange])
    assert refused.value.param == "tools[2].function.parameters"


async def test_the_shipped_configuration_refuses_tools_and_names_the_setting(service: ShippedService) -> None:
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="chat_template: builtin:chatml_tools") as refused:
            await client.chat.completions.create(model=MODEL, messages=[USER], tools=TOOLS)
    assert refused.value.param == "tools"


def test_the_documented_program_with_tools_works(tools_service: ShippedService) -> None:
    (program,) = [program for program in documented_examples("python") if "tools" in program]
    program = program.replace("localhost:8000", f"localhost:{tools_service.port}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weather {'city': ")
