"""Fields of OpenAI's Responses API that requests, items and tools accept without using them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serve_app.api.schema import Body
from serve_app.api.unused import Hint, Only, Replayed

_NO_PROGRAMS = "the service runs no programs of the model"
_NO_ASYNC = "the model waits for the outputs of its calls"
_NO_NAMESPACES = "tools have no namespaces"


class UnusedByResponses(Body):
    """The unused fields of a request."""

    background: Annotated[object, Only(False, reason="a response is computed while its request is open")] = None
    """A response is computed while its request is open."""
    background_options: Annotated[object, Only(reason="a response is computed while its request is open")] = None
    """A response is computed while its request is open."""
    conversation: Annotated[object, Only(reason="use 'previous_response_id', or send all items")] = None
    """The service stores responses, not conversations."""
    prompt: Annotated[object, Only(reason="the service stores no prompts; use 'instructions' and 'input'")] = None
    """The service stores no prompts."""
    context_management: Annotated[object, Only(reason="the service compacts no conversations; use 'truncation'")] = None
    """The service compacts no conversations."""
    image: Annotated[object, Only(reason="the models read text")] = None
    """The models read text only."""
    moderation: Annotated[object, Only(reason="the service does not moderate")] = None
    """The service does not moderate."""
    access_programs: Annotated[object, Only(reason="the service has no access programs")] = None
    """The service has no access programs."""
    service_tier: Annotated[object, Only("auto", "default", reason="the service has one tier")] = None
    """The service has one tier."""
    prompt_cache_retention: Annotated[object, Hint()] = None
    """The prefix cache keeps a prompt as long as there is memory."""
    prompt_cache_options: Annotated[object, Hint()] = None
    """The prefix cache has no options."""


class UnusedByReasoning(Body):
    """The unused fields of the settings of the reasoning."""

    generate_summary: Annotated[object, Hint()] = None
    """It is the older name of `summary`."""
    context: Annotated[object, Hint()] = None
    """The chat template decides which reasoning of earlier answers the model reads."""
    mode: Annotated[object, Only("standard", reason="the service has one mode")] = None
    """The service has one mode."""


class UnusedByItems(Body):
    """The unused fields that all items share."""

    status: Annotated[object, Replayed()] = None
    """The items of responses have it."""
    created_by: Annotated[object, Replayed()] = None
    """The items of OpenAI's lists have it."""


class UnusedByMessageItems(UnusedByItems):
    """The unused fields of a message."""

    phase: Annotated[object, Replayed()] = None
    """OpenAI's answers have it."""


class UnusedByParts(Body):
    """The unused fields of a part of a message."""

    annotations: Annotated[object, Replayed()] = None
    """The answers of services have it."""
    logprobs: Annotated[object, Replayed()] = None
    """The answers of services have it."""
    parsed: Annotated[object, Replayed()] = None
    """OpenAI's client adds it to answers."""
    prompt_cache_breakpoint: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""


class UnusedByCallItems(UnusedByItems):
    """The unused fields of a function call and of its output."""

    caller: Annotated[object, Only({"type": "direct"}, reason=_NO_PROGRAMS)] = None
    """The service runs no programs of the model."""
    namespace: Annotated[object, Only(reason=_NO_NAMESPACES)] = None
    """Tools have no namespaces."""


class UnusedByTools(Body):
    """The unused fields of a tool."""

    asynchronous: Annotated[object, Only(False, reason=_NO_ASYNC)] = Field(None, alias="async")
    """The model waits for the outputs of its calls."""
    allowed_callers: Annotated[object, Only(["direct"], reason=_NO_PROGRAMS)] = None
    """The service runs no programs of the model."""
    output_schema: Annotated[object, Hint()] = None
    """The chat template shows no schemas of outputs."""
    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
