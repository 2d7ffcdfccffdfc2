"""The fields of a conversation that are for the model's chat template, as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from serve_app.api.openai.messages import Message, to_prompt
from serve_app.api.schema import Body
from serve_app.core.requests import ChatPrompt
from serve_app.errors import InvalidRequest

# Names that the service sets itself when it renders a template.
_RESERVED = sorted(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"}
    | {"continue_final_message", "sanitize_control_tokens", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "conversations", "self", "raise_exception", "strftime_now"}
)


def _check_names(variables: dict[str, object]) -> dict[str, object]:
    reserved = next((name for name in variables if name in _RESERVED), None)
    if reserved is not None:
        raise PydanticCustomError("reserved", "Input cannot set the variable '{name}'", {"name": reserved})
    return variables


Variables = Annotated[
    dict[str, object],
    Field(json_schema_extra={"propertyNames": {"not": {"enum": _RESERVED}}}),
    AfterValidator(_check_names),
]


def effort_variables(effort: str | None) -> dict[str, object]:
    """The variables of a chat template that set how much the model reasons."""
    return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}


class TemplateFields(Body):
    """How the chat template renders the messages."""

    chat_template_kwargs: Variables | None = None
    """Further variables for the chat template, for example `{"enable_thinking": false}`."""
    documents: Annotated[list[dict[str, object]], Field(max_length=1024)] | None = None
    """Documents, for a chat template that shows them."""
    add_generation_prompt: bool | None = None
    """Whether the chat template begins a new answer; the default is true, unless `continue_final_message` is true."""
    continue_final_message: bool = False
    """Whether the answer continues the last message."""

    def rendered_with(
        self, messages: Sequence[Message], tools: tuple[str, ...], variables: Mapping[str, object]
    ) -> ChatPrompt:
        """The conversation. `variables` are for the chat template; those of the caller override them.

        Raises InvalidRequest if fields contradict each other.
        """
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "Field 'continue_final_message' continues the last message, and 'add_generation_prompt' begins a new "
                "one. Set one of them.",
                param="continue_final_message",
            )
        given = {} if self.documents is None else {"documents": self.documents}
        return replace(
            to_prompt(messages, tools),
            variables=json.dumps({**variables, **given, **(self.chat_template_kwargs or {})}),
            continues=self.continue_final_message,
            begins_answer=self.add_generation_prompt is not False,
        )
