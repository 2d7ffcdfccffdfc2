"""Chat templates that write tool calls, each in the format of one model family."""

from __future__ import annotations

# Every turn stands between two markers. The second one ends an answer.
_TURNS = """
{%- if tools -%}
{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' -}}
%s
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def turns(calls: str) -> str:
    """A template with this text for the calls of an assistant message."""
    content = "{%- if m.tool_calls -%}" + calls + "{%- else %}{{ m.content }}{% endif -%}"
    return _TURNS.replace("%s", content)


# Qwen 2.5: each call on lines of its own, after the content.
QWEN = _TURNS.replace(
    "%s",
    """{%- if m.content %}{{ m.content + ('\n' if m.tool_calls else '') }}{% endif -%}
{%- for c in m.tool_calls or [] -%}
{{- '\n' if not loop.first -}}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments | tojson + '}\n</tool_call>' -}}
{%- endfor -%}""",
)

# Qwen 3: the last turn begins with empty reasoning.
QWEN_3 = turns(
    """{%- if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- for c in m.tool_calls -%}
{{- '\n' if not loop.first -}}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments | tojson + '}\n</tool_call>' -}}
{%- endfor -%}"""
).replace("{%- else %}", "{%- else %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}")

# SmolLM2-1.7B: one list between two tags.
SMOLLM = turns(
    """{{- '<tool_call>[' -}}
{%- for c in m.tool_calls -%}
{{- c.function | tojson + (', ' if not loop.last else '') -}}
{%- endfor -%}
{{- ']</tool_call>' -}}"""
)

# Mistral 7B v0.3: a marker, then one list. Call ids must have nine characters.
MISTRAL = """
{{- '<s>' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
  {%- if loop.last and tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif -%}
  {{- '[INST] ' + m.content + '[/INST]' -}}
{%- elif m.role == 'tool' -%}
  {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- elif m.tool_calls -%}
  {{- '[TOOL_CALLS] [' -}}
  {%- for c in m.tool_calls -%}
    {%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
    {{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (', ' if not loop.last else ']</s>') -}}
  {%- endfor -%}
{%- else -%}
  {{- ' ' + m.content + '</s>' -}}
{%- endif -%}
{%- endfor -%}
"""

# Llama 3.1: a JSON object without tags, one per message, with "parameters" in place of "arguments".
LLAMA = turns(
    """{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call a message') }}{% endif -%}
{%- set c = m.tool_calls[0].function -%}
{{- '{"name": "' + c.name + '", ' + '"parameters": ' + c.arguments | tojson + '}' -}}"""
)

# DeepSeek R1: markers around all calls and around each call, arguments as text in a code block, no content.
DEEPSEEK = """
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.content is not defined -%}
  {{- '<|assistant|><|calls|>' -}}
  {%- for c in m.tool_calls -%}
    {{- '\n' if not loop.first -}}
    {{- '<|call|>function<|sep|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```<|end_call|>' -}}
  {%- endfor -%}
  {{- '<|end_calls|><|im_end|>' -}}
{%- elif m.role == 'assistant' -%}
  {{- '<|assistant|>' + m.content + '<|im_end|>' -}}
{%- else -%}
  {{- '<|' + m.role + '|>' + m.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""

# The name is the last member of the object.
NAME_LAST = turns(
    """{%- for c in m.tool_calls -%}
{{- '<call>{"arguments": ' + c.function.arguments | tojson + ', "name": "' + c.function.name + '"}</call>' -}}
{%- endfor -%}"""
)

# The name is part of the tag. Only the arguments are JSON.
FUNCTION_TAG = turns(
    """{%- for c in m.tool_calls -%}
{{- '<function=' + c.function.name + '>' + c.function.arguments | tojson + '</function>' -}}
{%- endfor -%}"""
)

# Qwen3-Coder: each parameter in a tag, strings as they are.
QWEN_CODER = turns(
    """{%- for c in m.tool_calls -%}
{{- '\n' if not loop.first -}}
{{- '<tool_call>\n<function=' + c.function.name + '>\n' -}}
{%- for key, value in c.function.arguments.items() -%}
{{- '<parameter=' + key + '>\n' -}}
{{- (value if value is string else value | tojson) + '\n</parameter>\n' -}}
{%- endfor -%}
{{- '</function>\n</tool_call>' -}}
{%- endfor -%}"""
)

# GLM 4.5: names and values of parameters between tokens.
GLM = turns(
    """{%- for c in m.tool_calls -%}
{{- '\n<tool_call>' + c.function.name + '\n' -}}
{%- for key, value in c.function.arguments.items() -%}
{{- '<arg_key>' + key + '</arg_key>\n' -}}
{{- '<arg_value>' + (value if value is string else value | tojson) + '</arg_value>\n' -}}
{%- endfor -%}
{{- '</tool_call>' -}}
{%- endfor -%}"""
)
GLM_TOKENS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

# Not supported: parameters that are counted.
PARAMETERS = turns(
    """{%- for c in m.tool_calls -%}
{{- '<function=' + c.function.name + '>' -}}
{%- for key, value in c.function.arguments.items() -%}
{{- '<parameter' ~ loop.index ~ '=' + key + '>' + value + '</parameter>' -}}
{%- endfor -%}
{{- '</function>' -}}
{%- endfor -%}"""
)
# Ignores tools.
NO_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
)

# Qwen 3 with the reasoning of the last answer.
THINKING = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and (loop.last or m.reasoning_content) -%}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""

# DeepSeek R1: the prompt ends with the start mark, and the reasoning of earlier answers is left out.
OPENED = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif -%}
"""

# gpt-oss: channels between special tokens.
CHANNELS = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}
{%- else -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif -%}
"""
CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")

# Llama Guard 3 1B: the content is a list of parts.
PARTS = """
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for c in m.content %}{% if c.type == 'text' %}{{ c.text | trim }}{% endif %}{% endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""
