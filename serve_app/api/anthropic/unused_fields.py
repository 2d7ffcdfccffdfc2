"""Fields of Anthropic's API that messages and token counts accept without using them."""

from __future__ import annotations

from typing import Annotated

from serve_app.api.schema import Body
from serve_app.api.unused import Hint, Only


class UnusedByConversations(Body):
    """The unused fields that messages and token counts share."""

    cache_control: Annotated[object, Hint()] = None
    """The prefix cache finds equal prompts without it."""
    context_management: Annotated[object, Hint()] = None
    """The service does not shorten conversations."""
    speed: Annotated[object, Only("standard", reason="the service has one speed")] = None
    """The service has one speed."""
    mcp_servers: Annotated[object, Only(reason="the service calls no tools itself")] = None
    """The service calls no tools itself."""
    compaction: Annotated[object, Only(reason="the service does not summarize conversations")] = None
    """The service does not summarize conversations."""
    billing_policy: Annotated[object, Hint()] = None
    """The service has no billing."""


class UnusedByAnswers(Body):
    """The unused fields of messages alone."""

    service_tier: Annotated[object, Only("auto", "standard_only", reason="the service has one tier")] = None
    """The service has one tier."""
    inference_geo: Annotated[object, Only(reason="the service does not choose a region")] = None
    """The service does not choose a region."""
    container: Annotated[object, Only(reason="the service has no containers")] = None
    """The service has no containers."""
    thread: Annotated[object, Only(reason="the service stores no conversations; send all messages")] = None
    """The service stores no conversations."""
    diagnostics: Annotated[object, Hint()] = None
    """The usage has the number of cached tokens."""
    fallbacks: Annotated[object, Hint()] = None
    """It names models that answer after a refusal. The service does not detect refusals."""
    fallback_credit_token: Annotated[object, Hint()] = None
    """The service has no billing."""
