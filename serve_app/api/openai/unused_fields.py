"""Fields of the APIs of OpenAI, vLLM and others that chats, completions and messages accept without using them."""

from __future__ import annotations

from typing import Annotated

from serve_app.api.schema import Body
from serve_app.api.unused import Hint, Only, Replayed, UserName

_NO_BEAMS = "the service has no beam search"


class UnusedFields(Body):
    """The unused fields that chats and completions share."""

    use_beam_search: Annotated[object, Only(False, reason=_NO_BEAMS)] = None
    """The service has no beam search."""
    length_penalty: Annotated[object, Only(1, reason=_NO_BEAMS)] = None
    """It is a parameter of beam search."""
    early_stopping: Annotated[object, Only(False, reason=_NO_BEAMS)] = None
    """It is a parameter of beam search."""
    typical_p: Annotated[object, Only(1, reason="the service has no typical sampling; use 'top_p'")] = None
    """The service has no typical sampling."""
    spaces_between_special_tokens: Annotated[object, Hint()] = None
    """It only affects kinds of tokenizers that the service does not use."""
    request_id: Annotated[object, Hint()] = None
    """The header `x-request-id` sets the id of a request."""
    session_id: Annotated[object, Hint()] = None
    """The prefix cache finds the requests of a session by their prompts."""
    stream_interval: Annotated[object, Hint()] = None
    """The configuration sets how often tokens are sent: `engine.flush_interval_s`."""
    guided_decoding_backend: Annotated[object, Hint()] = None
    """The service has one implementation of grammars."""
    guided_whitespace_pattern: Annotated[object, Only(reason="the service bounds whitespace itself")] = None
    """The service bounds the whitespace of JSON itself."""
    watermarking: Annotated[object, Only(False, reason="the service adds no watermarks")] = None
    """The service adds no watermarks."""
    truncation_side: Annotated[object, Only("left", reason="the end of a prompt is kept")] = None
    """`truncate_prompt_tokens` keeps the end of a prompt."""
    logprob_token_ids: Annotated[object, Only(reason="use 'logprobs'")] = None
    """The service reports the most likely tokens only."""
    allowed_token_ids: Annotated[object, Only(reason="use a grammar or 'logit_bias'")] = None
    """A grammar, or `logit_bias`, restricts the tokens of an answer."""
    bad_words: Annotated[object, Only(reason="use 'logit_bias'")] = None
    """`logit_bias` excludes tokens."""
    thinking_token_budget: Annotated[object, Only(-1, reason="the service does not bound reasoning")] = None
    """The service does not bound the reasoning of an answer."""
    repetition_detection: Annotated[object, Only(reason="use 'frequency_penalty'")] = None
    """The service does not end an answer that repeats itself."""
    return_tokens_as_token_ids: Annotated[object, Only(False, reason="use 'return_token_ids'")] = None
    """`return_token_ids` reports the ids of tokens."""
    return_token_offsets: Annotated[object, Hint()] = None
    """Only vLLM's endpoints for rendering have it."""
    return_mm_kwargs: Annotated[object, Hint()] = None
    """Only vLLM's endpoints for rendering have it."""
    routed_experts_prompt_start: Annotated[object, Hint()] = None
    """The service does not report the experts of a token."""
    kv_transfer_params: Annotated[object, Only(reason="the service does not transfer caches")] = None
    """The service does not transfer caches between replicas."""
    ec_transfer_params: Annotated[object, Only(reason="the service does not transfer caches")] = None
    """The service does not transfer caches between replicas."""
    vllm_xargs: Annotated[object, Only(reason="the service has no plug-ins")] = None
    """Plug-ins of vLLM read these arguments. The service has no plug-ins."""


class UnusedByCompletions(Body):
    """The unused fields of completions."""

    suffix: Annotated[object, Only("", reason="the service does not insert text before a suffix")] = None
    """The service does not insert text before a suffix."""
    prompt_embeds: Annotated[object, Only(reason="send 'prompt'")] = None
    """A prompt is a text or token ids."""


class UnusedByChats(Body):
    """The unused fields of chats."""

    verbosity: Annotated[object, Hint()] = None
    """No model has a setting for the length of its answers."""
    store: Annotated[object, Only(False, reason="chats are not stored; use /v1/responses")] = None
    """The service stores responses, but no chats."""
    metadata: Annotated[object, UserName()] = None
    """Experiments use its `user_id` as the user. Otherwise it belongs to a stored chat, and none is stored."""
    service_tier: Annotated[object, Only("auto", "default", reason="the service has one tier")] = None
    """The service has one tier."""
    prompt_cache_key: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without a key."""
    prompt_cache_retention: Annotated[object, Hint()] = None
    """The prefix cache keeps a prompt as long as there is memory."""
    prompt_cache_options: Annotated[object, Hint()] = None
    """The prefix cache has no options."""
    safety_identifier: Annotated[object, UserName()] = None
    """Experiments use it as the user if `user` is not sent. The service does not check users."""
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
    best_of: Annotated[object, Only(1, reason="only completions have it")] = None
    """Only completions have it."""
    echo: Annotated[object, Only(False, reason="only completions have it")] = None
    """Only completions have it."""
    add_special_tokens: Annotated[object, Only(False, reason="the chat template has the special tokens")] = None
    """The chat template has the special tokens."""
    media_io_kwargs: Annotated[object, Only(reason="the models read text")] = None
    """The models read text only."""
    mm_processor_kwargs: Annotated[object, Only(reason="the models read text")] = None
    """The models read text only."""
    return_prompt_text: Annotated[object, Only(False, reason="use 'return_token_ids'")] = None
    """`return_token_ids` reports the tokens of the prompt."""
    tool_prompt: Annotated[object, Only(reason="put it into a message")] = None
    """It is TGI's text before the tools. The chat template writes such a text."""
    chat_template: Annotated[object, Only(reason="set it in the configuration of the model")] = None
    """The chat template is set in the configuration of the model."""


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
    reasoning_details: Annotated[object, Replayed()] = None
    """The answers of other services have it."""
    thinking_blocks: Annotated[object, Replayed()] = None
    """LiteLLM adds it to answers."""
    parsed: Annotated[object, Replayed()] = None
    """OpenAI's client adds it to answers."""
    provider_specific_fields: Annotated[object, Replayed()] = None
    """LiteLLM adds it to answers."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
