"""Published fields of OpenAI's, vLLM's and other services that chats and completions accept without using them."""

from __future__ import annotations

from typing import Annotated

from serve_app.api.schema import Body
from serve_app.api.unused import Hint, Only, Replayed


class UnusedFields(Body):
    """The fields that chats and completions share."""

    use_beam_search: Annotated[object, Only((False,), "the service samples each token")] = None
    """The service has no beam search."""
    length_penalty: Annotated[object, Only((1,), "the service has no beam search")] = None
    """A parameter of beam search."""
    early_stopping: Annotated[object, Only((False,), "the service has no beam search")] = None
    """A parameter of beam search."""
    typical_p: Annotated[object, Only((1,), "the service has no typical sampling; use 'top_p'")] = None
    """The service has no typical sampling."""
    spaces_between_special_tokens: Annotated[object, Hint()] = None
    """Accepted; it changes the text of a few tokenizers only."""
    request_id: Annotated[object, Hint()] = None
    """Accepted; the header `x-request-id` sets the id of a request."""


class UnusedByCompletions(Body):
    suffix: Annotated[object, Only(("",), "the model does not insert text before a suffix")] = None
    """The service does not insert text before a suffix."""


class UnusedByChats(Body):
    reasoning_effort: Annotated[object, Hint()] = None
    """Accepted; no model has a setting for its reasoning."""
    verbosity: Annotated[object, Only(("medium",), "ask for a short or a long answer in a message")] = None
    """No model has a setting for the length of its answers."""
    store: Annotated[object, Only((False,), "the service stores no answers")] = None
    """The service stores no answers."""
    metadata: Annotated[object, Hint()] = None
    """Accepted; it belongs to stored answers."""
    service_tier: Annotated[object, Only(("auto", "default"), "the service has one tier")] = None
    """The service has one tier."""
    prompt_cache_key: Annotated[object, Hint()] = None
    """Accepted; the prefix cache finds equal prompts without a key."""
    prompt_cache_retention: Annotated[object, Hint()] = None
    """Accepted; the prefix cache keeps a prompt as long as there is memory."""
    prompt_cache_options: Annotated[object, Hint()] = None
    """Accepted; the prefix cache has no options."""
    safety_identifier: Annotated[object, Hint()] = None
    """Accepted; the service does not check users."""
    modalities: Annotated[object, Only((["text"],), "the models write text")] = None
    """The models write text only."""
    audio: Annotated[object, Only((), "the models write text")] = None
    """The models write text only."""
    moderation: Annotated[object, Only((), "the service does not moderate")] = None
    """The service does not moderate."""
    prediction: Annotated[object, Only((), "the service predicts tokens from the prompt")] = None
    """The service takes no predicted output."""
    web_search_options: Annotated[object, Only((), "the service has no tools of its own")] = None
    """The service has no tools of its own."""
    functions: Annotated[object, Only((), "use 'tools'")] = None
    """The older name of `tools`."""
    function_call: Annotated[object, Only(("none",), "use 'tool_choice'")] = None
    """The older name of `tool_choice`."""
    best_of: Annotated[object, Only((1,), "only completions have it")] = None
    """Only completions have it."""
    echo: Annotated[object, Only((False,), "only completions have it")] = None
    """Only completions have it."""
    add_generation_prompt: Annotated[object, Only((True,), "the prompt ends where the answer begins")] = None
    """The prompt always ends where the answer begins."""
    continue_final_message: Annotated[object, Only((False,), "the answer is a new message")] = None
    """The answer is always a new message."""
    add_special_tokens: Annotated[object, Only((False,), "the chat template has the special tokens")] = None
    """The chat template has the special tokens."""
    chat_template_kwargs: Annotated[object, Only((), "the template has no variables")] = None
    """The template has no variables."""
    chat_template: Annotated[object, Only((), "set it in the configuration of the model")] = None
    """The configuration of the model has it."""
    documents: Annotated[object, Only((), "put documents into a message")] = None
    """The template takes no documents."""


class UnusedByMessages(Body):
    """The fields of a message, most of them fields of earlier answers."""

    type: Annotated[object, Only(("text", "message"), "a message needs no type")] = None
    """A message needs no type."""
    refusal: Annotated[object, Replayed()] = None
    """Accepted; a field of answers."""
    annotations: Annotated[object, Replayed()] = None
    """Accepted; a field of answers."""
    audio: Annotated[object, Only((), "the models read text")] = None
    """The models read text only."""
    function_call: Annotated[object, Only((), "use 'tool_calls'")] = None
    """The older form of `tool_calls`."""
    reasoning_content: Annotated[object, Replayed()] = None
    """Accepted; a field of answers."""
    reasoning: Annotated[object, Replayed()] = None
    """Accepted; a field of answers."""
    parsed: Annotated[object, Replayed()] = None
    """Accepted; OpenAI's client adds it to answers."""
    provider_specific_fields: Annotated[object, Replayed()] = None
    """Accepted; LiteLLM adds it to answers."""
    cache_control: Annotated[object, Hint()] = None
    """Accepted; the prefix cache finds equal prompts without it."""
