"""Decides which requests have one possible answer, and computes the key of a request in the response cache."""

from __future__ import annotations

from dataclasses import fields
from datetime import date
from hashlib import blake2b

from serve_app import __version__
from serve_app.config import Model
from serve_app.core.requests import ChatPrompt, GenerationRequest

# The fields of a request that do not change its answer. Every other field, also one that is added later, is a part of
# the key; so is the tenant, because tenants share no answers. `index` counts: the seed of answer i is seed + i.
NOT_IN_KEY = frozenset(
    {
        "id",
        "arrived",
        "deadline",
        "wake_wait_s",
        "group",
        "priority",
        "background",
        "traceparent",
        "session",
        "cache_control",
        "assignment",
        "key",
        "prompt_limit",
    }
)
# The options of a model that do not change its answers. The defaults for sampling are in the requests, and so is the
# adapter.
NOT_IN_IDENTITY = frozenset({"deployment", "batching", "sampling_defaults", "lora", "price"})


def is_deterministic(request: GenerationRequest) -> bool:
    """Whether the request has one answer: an embedding, a greedy answer, or a sampled answer with a seed.

    The rest of an answer that another replica began is not looked up.
    """
    params = request.params
    return (request.embed or params.temperature == 0 or params.seed is not None) and not request.resumed


class CacheKeys:
    """The keys of the requests for one model, as it is configured now."""

    def __init__(self, model: Model, namespace: str) -> None:
        identity = model.model_dump(mode="json", exclude=set(NOT_IN_IDENTITY))
        self._prefix = repr((namespace, __version__, identity))

    def key(self, request: GenerationRequest) -> bytes:
        """32 bytes that differ for requests whose answers can differ.

        The key is a digest of the representation of all fields, nested ones included, in which Python's `repr` escapes
        texts and names each field. Chat templates can write the date into a prompt.
        """
        parts = [
            (field.name, getattr(request, field.name)) for field in fields(request) if field.name not in NOT_IN_KEY
        ]
        day = date.today().isoformat() if isinstance(request.prompt, ChatPrompt) else ""
        return blake2b(f"{self._prefix}{day}{parts!r}".encode(), digest_size=32).digest()
