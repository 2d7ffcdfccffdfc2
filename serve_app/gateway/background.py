"""The stage in front of the gateway for the lines of batch jobs, which give way to all other requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

from serve_app.core.events import Chunk
from serve_app.core.requests import GenerationRequest
from serve_app.gateway.stage import Stage

# The waiting request with the lowest priority is served first. No request of a client has a higher value.
BACKGROUND_PRIORITY = 2**31 - 1


class Background(Stage):
    """Gives every request the last priority, and the whole time until its deadline to wait for a model to load."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return self.inner.generate(replace(request, priority=BACKGROUND_PRIORITY, wake_wait_s=None, background=True))
