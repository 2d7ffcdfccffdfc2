"""Reads vLLM's metrics, which vLLM keeps in the registry of prometheus_client in this process."""

from __future__ import annotations

from prometheus_client import REGISTRY

from serve_app.engines.protocol import EngineStats

_PREFIX = "vllm:"
# A step that generates tokens changes the first; each part of a long prompt changes the second.
_PROGRESS = ("iteration_tokens_total_count", "kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")


def stats(slots: int, kv_tokens: int) -> EngineStats:
    """The state of vLLM, which runs at most `slots` sequences and holds `kv_tokens` tokens in its KV cache."""
    values = _values()

    def count(name: str) -> int:
        return int(values.get(_PREFIX + name, 0))

    return EngineStats(
        running=count("num_requests_running"),
        waiting=count("num_requests_waiting"),
        slots=slots,
        tokens_held=round(values.get("vllm:kv_cache_usage_perc", 0) * kv_tokens),
        kv_tokens=kv_tokens,
        preemptions=count("num_preemptions_total"),
        prompt_tokens=count("prefix_cache_queries_total"),
        cached_tokens=count("prefix_cache_hits_total"),
        drafted=count("spec_decode_num_draft_tokens_total"),
        accepted=count("spec_decode_num_accepted_tokens_total"),
        generated_tokens=count("generation_tokens_total"),
        steps=count("iteration_tokens_total_count"),
        rows=count("iteration_tokens_total_sum"),
    )


def progress() -> tuple[float, ...]:
    """Numbers of which one changes with every step of vLLM."""
    values = _values()
    return tuple(values.get(_PREFIX + name, 0.0) for name in _PROGRESS)


def _values() -> dict[str, float]:
    """The value of each metric, added over its labels."""
    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples if family.name.startswith(_PREFIX) else ():
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
