"""Tool-call formats of several model families, as detected from their chat templates; writes and reads calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.core.events import Delta, ReasoningDelta, TextDelta, ToolCallDelta
from serve_app.engines.text.tool_format import ToolCallFormat
from serve_app.engines.text.tool_parser import ToolCallFormatParser

HERMES = ToolCallFormat(
    before='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    after="}\n</tool_call>",
    name_first=True,
    trigger="<tool_call>",
    anywhere=True,
)
MISTRAL = ToolCallFormat(
    before='[TOOL_CALLS] [{"name": "',
    middle='", "arguments": ',
    between='}, {"name": "',
    after="}]",
    name_first=True,
    trigger="[TOOL_CALLS]",
    anywhere=True,
    markers=(("[TOOL_CALLS]", 7),),
    special_markers=("[TOOL_CALLS]",),
)
LLAMA = ToolCallFormat(
    before='{"name": "',
    middle='", "parameters": ',
    between=None,
    after="}",
    name_first=True,
    trigger='{"name": "',
    anywhere=False,
)
NAME_LAST = ToolCallFormat(
    before='<call>{"arguments": ',
    middle=', "name": "',
    between='"}</call><call>{"arguments": ',
    after='"}</call>',
    name_first=False,
    trigger="<call>",
    anywhere=True,
)
DEEPSEEK = ToolCallFormat(
    before="<|calls|><|call|>function<|sep|>",
    middle="\n```json\n",
    between="\n```<|end_call|>\n<|call|>function<|sep|>",
    after="\n```<|end_call|><|end_calls|>",
    name_first=True,
    trigger="<|calls|>",
    anywhere=True,
    markers=(("<|calls|>", 7), ("<|call|>", 8), ("<|sep|>", 9), ("<|end_call|>", 10), ("<|end_calls|>", 11)),
    special_markers=("<|calls|>", "<|call|>", "<|sep|>", "<|end_call|>", "<|end_calls|>"),
)
FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "name last": NAME_LAST, "deepseek": DEEPSEEK}


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str


def write_calls(call_format: ToolCallFormat, *calls: tuple[str, str]) -> str:
    """The text of calls in a format; each call is a name and the text of its arguments."""
    parts = [call if call_format.name_first else call[::-1] for call in calls]
    between = call_format.between or ""
    return call_format.before + between.join(call_format.middle.join(part) for part in parts) + call_format.after


def join_deltas(deltas: Iterable[Delta]) -> tuple[str, list[Call]]:
    """The content and the calls that deltas add up to. Asserts that the deltas of each call are in order."""
    content, calls = "", list[Call]()
    for delta in deltas:
        match delta:
            case TextDelta(text):
                content += text
            case ToolCallDelta(index, name, arguments) if name:
                assert (index, arguments) == (len(calls), "")
                calls.append(Call(name, ""))
            case ToolCallDelta(index, _, arguments):
                assert index == len(calls) - 1
                calls[-1] = Call(calls[-1].name, calls[-1].arguments + arguments)
            case ReasoningDelta():
                raise AssertionError("the parser emits no reasoning")
    return content, calls


def parse(call_format: ToolCallFormat, *pieces: str) -> tuple[str, list[Call]]:
    """The content and the calls of an answer that arrives in these pieces."""
    parser = ToolCallFormatParser(call_format)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return join_deltas([*deltas, *parser.end()])
