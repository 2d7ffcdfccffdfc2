"""Fields of the APIs of OpenAI, vLLM and others that chats, completions and messages accept without using them."""

from __future__ import annotations

from typing import Annotated

from serve_app.api.schema import Body
from serve_app.api.unused import Hint, Only, Replayed

_NO_BEAMS = "the service has no beam search"


class UnusedFields(Body):
    """The unused fields that chats and completions share."""

    use_beam_search: Annotated[object, Only(False, reason=_NO_BEAMS)] = None
    """The service has no beam search."""
    length_penalty: Annotated[object, Only(1, reason=_NO_BEAMS)] = None
    """A parameter of beam search."""
    early_stopping: Annotated[object, Only(False, reason=_NO_BEAMS)] = None
    """A parameter of beam search."""
    typical_p: Annotated[object, Only(1, reason="the service has no typical sampling; use 'top_p'")] = None
    """The service has no typical sampling."""
    spaces_between_special_tokens: Annotated[object, Hint()] = None
    """It affects tokenizers only that the service does not use."""
    request_id: Annotated[object, Hint()] = None
    """The header `x-request-id` sets the id of a request."""


class UnusedByCompletions(Body):
    """The unused fields of completions."""

    suffix: Annotated[object, Only("", reason="the service does not insert text before a suffix")] = None
    """The service does not insert text before a suffix."""


class UnusedByChats(Body):
    """The unused fields of chats."""

    reasoning_effort: Annotated[object, Hint()] = None
    """No model has a setting for its reasoning."""
    verbosity: Annotated[object, Hint()] = None
    """No model has a setting for the length of its answers."""
    store: Annotated[object, Only(False, reason="the service stores no answers")] = None
    """The service stores no answers."""
    metadata: Annotated[object, Hint()] = None
    """It belongs to stored answers."""
    service_tier: Annotated[object, Only("auto", "default", reason="the service has one tier")] = None
    """The service has one tier."""
    prompt_cache_key: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without a key."""
    prompt_cache_retention: Annotated[object, Hint()] = None
    """The prefix cache keeps a prompt as long as there is memory."""
    prompt_cache_options: Annotated[object, Hint()] = None
    """The prefix cache has no options."""
    safety_identifier: Annotated[object, Hint()] = None
    """The service does not check users."""
    modalities: Annotated[object, Only(["text"], reason="the models write text")] = None
    """The models write text only."""
    audio: Annotated[object, Only(reason="the models write text")] = None
    """The models write text only."""
    moderation: Annotated[object, Only(reason="the service does not moderate")] = None
    """The service does not moderate."""
    prediction: Annotated[object, Only(reason="the service takes no predicted output")] = None
    """The service takes no predicted output."""
    web_search_options: Annotated[object, Only(reason="the service has no tools of its own")] = None
    """The service has no tools of its own."""
    functions: Annotated[object, Only(reason="use 'tools'")] = None
    """The older name of `tools`."""
    function_call: Annotated[object, Only("none", reason="use 'tool_choice'")] = None
    """The older name of `tool_choice`."""
    best_of: Annotated[object, Only(1, reason="only completions have it")] = None
    """Only completions have it."""
    echo: Annotated[object, Only(False, reason="only completions have it")] = None
    """Only completions have it."""
    add_generation_prompt: Annotated[object, Only(True, reason="the answer is always a new message")] = None
    """The answer is always a new message."""
    continue_final_message: Annotated[object, Only(False, reason="the answer is always a new message")] = None
    """The answer is always a new message."""
    add_special_tokens: Annotated[object, Only(False, reason="the chat template has the special tokens")] = None
    """The chat template has the special tokens."""
    chat_template_kwargs: Annotated[object, Only(reason="the service passes no variables to the chat template")] = None
    """The service passes no variables to the chat template."""
    chat_template: Annotated[object, Only(reason="set it in the configuration of the model")] = None
    """The chat template is set in the configuration of the model."""
    documents: Annotated[object, Only(reason="put documents into a message")] = None
    """The service passes no documents to the chat template."""


class UnusedByMessages(Body):
    """The unused fields of a message, most of them fields of earlier answers."""

    type: Annotated[object, Only("text", "message", reason="a message needs no type")] = None
    """A message needs no type."""
    refusal: Annotated[object, Replayed()] = None
    """OpenAI's answers have it."""
    annotations: Annotated[object, Replayed()] = None
    """OpenAI's answers have it."""
    audio: Annotated[object, Only(reason="the models read text")] = None
    """The models read text only."""
    function_call: Annotated[object, Only(reason="use 'tool_calls'")] = None
    """The older form of `tool_calls`."""
    reasoning_content: Annotated[object, Replayed()] = None
    """The answers of other services have it."""
    reasoning: Annotated[object, Replayed()] = None
    """The answers of other services have it."""
    parsed: Annotated[object, Replayed()] = None
    """OpenAI's client adds it to answers."""
    provider_specific_fields: Annotated[object, Replayed()] = None
    """LiteLLM adds it to answers."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
