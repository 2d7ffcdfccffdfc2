"""How some families of models write calls of tools, as the engine learns it from their templates."""

from __future__ import annotations

from serve_app.engines.text.tool_format import ToolCallFormat

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
    signs=(("[TOOL_CALLS]", 7),),
    hidden=("[TOOL_CALLS]",),
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
MARKS = ToolCallFormat(
    before="<|calls|><|call|>function<|sep|>",
    middle="\n```json\n",
    between="\n```<|end_call|>\n<|call|>function<|sep|>",
    after="\n```<|end_call|><|end_calls|>",
    name_first=True,
    trigger="<|calls|>",
    anywhere=True,
    signs=(("<|calls|>", 7), ("<|call|>", 8), ("<|sep|>", 9), ("<|end_call|>", 10), ("<|end_calls|>", 11)),
    hidden=("<|calls|>", "<|call|>", "<|sep|>", "<|end_call|>", "<|end_calls|>"),
)
ALL = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "name last": NAME_LAST, "marks": MARKS}


def written(syntax: ToolCallFormat, *calls: tuple[str, str]) -> str:
    """Calls as a model of this family writes them, each a name and its arguments."""
    parts = [call if syntax.name_first else call[::-1] for call in calls]
    return syntax.before + (syntax.between or "").join(syntax.middle.join(part) for part in parts) + syntax.after
