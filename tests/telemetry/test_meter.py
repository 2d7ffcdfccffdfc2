"""The metrics of a request depend on how the request ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from serve_app.core.cache_status import CacheStatus
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.http import HttpCall
from serve_app.core.requests import ChatMessage, ChatPrompt, GenerationRequest, Prompt, SamplingParams, TextPrompt
from serve_app.errors import InternalError, QueueFull, ServeAppError
from serve_app.telemetry.exposition import exposition
from serve_app.telemetry.meter import IngressMetrics


def request(prompt: Prompt | None = None, embed: bool = False) -> GenerationRequest:
    return GenerationRequest("1", "m", prompt or TextPrompt("hello"), SamplingParams(), 0.0, 10.0, embed=embed)


def chunk(*times: float, end: FinishReason | None = None, queue_s: float = 0.01) -> Chunk:
    last = len(times) - 1
    events = (TokenEvent(1, "x", at, end if number == last else None) for number, at in enumerate(times))
    return Chunk(tuple(events), 3, queue_s)


def changes(
    *chunks: Chunk,
    error: ServeAppError | None = None,
    measured: GenerationRequest | None = None,
    opentelemetry: bool = False,
) -> dict[str, float]:
    """The changes that one request makes, by series name and labels, without sums and buckets."""
    metrics = IngressMetrics("r", ["m"], opentelemetry)
    before = samples(metrics)
    meter = metrics.meter(measured or request())
    for one in chunks:
        meter.chunk(one)
    if error is not None:
        meter.failed(error)
    meter.ended()
    after = samples(metrics)
    return {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}


def samples(metrics: IngressMetrics) -> dict[str, float]:
    found = {}
    for family in metrics.families(0.0):
        for sample in family.samples:
            rest = [value for key, value in sample.labels.items() if key not in ("model", "replica", "le")]
            name = sample.name.removeprefix("serve_app_")
            if not name.endswith(("_sum", "_bucket")) and not name.startswith("process_"):
                found["/".join([name, *rest])] = sample.value
    return found


def test_a_complete_response_is_counted_and_measured() -> None:
    changed = changes(chunk(0.1), chunk(0.12, 0.14, end=FinishReason.LENGTH))
    assert changed == {
        "requests_total/length": 1,
        "goodput_requests_total": 1,
        "prompt_tokens_total": 3,
        "generated_tokens_total": 3,
        "time_to_first_token_seconds_count": 1,
        "time_per_output_token_seconds_count": 1,
        "inter_token_seconds_count": 1,
        "queue_seconds_count": 1,
        "prefill_seconds_count": 1,
        "decode_seconds_count": 1,
        "request_seconds_count": 1,
        "request_prompt_tokens_count": 1,
        "request_generated_tokens_count": 1,
    }


@pytest.mark.parametrize(
    ("times", "good"),
    [
        ((2.0, 2.05), True),
        ((2.1, 2.11), False),  # TTFT is over the objective
        ((0.1, 0.16), False),  # TPOT is over the objective
        ((0.1, 0.11, 0.19), True),  # one long gap, while the mean meets the objective
        ((2.0,), True),  # a single token has no TPOT
    ],
)
def test_a_response_is_goodput_if_it_meets_both_objectives(times: Sequence[float], good: bool) -> None:
    assert ("goodput_requests_total" in changes(chunk(*times, end=FinishReason.STOP))) == good


def test_a_request_with_an_error_after_the_first_token_is_truncated() -> None:
    changed = changes(chunk(0.1, 0.2), error=InternalError("x"))
    assert (changed["requests_total/internal_error"], changed["truncated_requests_total"]) == (1, 1)
    assert changed["generated_tokens_total"] == 2
    assert "request_seconds_count" not in changed
    assert "goodput_requests_total" not in changed


def test_a_request_with_an_error_before_the_first_token_is_not_truncated() -> None:
    assert changes(error=QueueFull("x")) == {"requests_total/queue_full": 1}


def test_a_cancelled_request_is_not_truncated() -> None:
    changed = changes(chunk(0.1))
    assert changed["requests_total/cancelled"] == 1
    assert "truncated_requests_total" not in changed


@pytest.mark.parametrize(("time_s", "good"), [(0.001, True), (2.1, False)])
def test_a_replayed_answer_counts_as_a_request_and_its_times_and_tokens_do_not(time_s: float, good: bool) -> None:
    chunks = [chunk(time_s), chunk(time_s, time_s, end=FinishReason.STOP)]
    changed = changes(*(replace(one, replayed=True) for one in chunks), opentelemetry=True)
    assert changed == {"requests_total/stop": 1, **({"goodput_requests_total": 1} if good else {})}


def test_a_replayed_answer_that_breaks_off_is_truncated() -> None:
    changed = changes(replace(chunk(0.1), replayed=True), error=InternalError("x"))
    assert changed == {"requests_total/internal_error": 1, "truncated_requests_total": 1}


def test_the_response_cache_is_measured() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    found = samples(metrics)
    statuses = [f"response_cache_requests_total/{status}" for status in ("hit", "miss", "bypass")]
    assert [found[name] for name in statuses] == [0, 0, 0], "the series exist before the first request"
    for status in (CacheStatus.HIT, CacheStatus.HIT, CacheStatus.BYPASS):
        metrics.cache.looked_up("m", status)
    metrics.cache.stored(7)
    metrics.cache.stored(5)
    metrics.cache.failed()
    found = samples(metrics)
    assert [found[name] for name in statuses] == [2, 0, 1]
    assert (found["response_cache_bytes"], found["response_cache_errors_total"]) == (5, 1)


def test_an_embedding_has_no_tokens() -> None:
    changed = changes(Chunk((), 3, 0.01, embedding=(1.0,)), measured=request(embed=True))
    assert changed == {
        "requests_total/embedded": 1,
        "prompt_tokens_total": 3,
        "queue_seconds_count": 1,
        "request_seconds_count": 1,
        "request_prompt_tokens_count": 1,
    }


CHAT = ChatPrompt((ChatMessage("user", "hello"),))


@pytest.mark.parametrize(
    ("measured", "operation"),
    [(request(), "text_completion"), (request(CHAT), "chat"), (request(embed=True), "embeddings")],
)
def test_opentelemetry_metrics_exist_only_if_they_are_enabled(measured: GenerationRequest, operation: str) -> None:
    last = Chunk((), 3, 0.01, embedding=(1.0,)) if measured.embed else chunk(0.1, 0.2, end=FinishReason.STOP)
    assert not any(name.startswith("gen_ai") for name in changes(last, measured=measured))
    found = {name for name in changes(last, measured=measured, opentelemetry=True) if name.startswith("gen_ai")}
    labels = f"{operation}/serve_app/m"
    times = {f"gen_ai_server_time_{name}_seconds_count/{labels}" for name in ("to_first_token", "per_output_token")}
    duration = f"gen_ai_server_request_duration_seconds_count/{labels}/"
    assert found == ({duration} if measured.embed else {duration, *times})


def test_opentelemetry_metrics_have_the_code_of_an_error() -> None:
    found = changes(error=QueueFull("x"), opentelemetry=True)
    assert "gen_ai_server_request_duration_seconds_count/text_completion/serve_app/m/queue_full" in found


def test_every_series_of_a_model_exists_before_its_first_request() -> None:
    metrics = IngressMetrics("r", ["m", "n"], opentelemetry=False)
    before = exposition([], metrics.families(0.0)).decode()
    for model in ("m", "n"):
        for error in (None, *(kind("x") for kind in ServeAppError.__subclasses__())):
            meter = metrics.meter(GenerationRequest("1", model, TextPrompt("hello"), SamplingParams(), 0.0, 10.0))
            meter.chunk(chunk(0.1))
            meter.chunk(chunk(0.2, end=FinishReason.STOP))
            if error is not None:
                meter.failed(error)
                metrics.http.refused(error.code, model)
            meter.ended()
    assert names(before) == names(exposition([], metrics.families(0.0)).decode())


def names(text: str) -> set[str]:
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}


def test_no_request_creates_a_series() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    metrics.http.refused("model_not_found", "made-up")
    metrics.http.ended(HttpCall("other", "BREW", 404, 0.1, 0, 0))
    first = names(exposition([], metrics.families(0.0)).decode())
    for number in range(100):
        metrics.http.refused("model_not_found", f"made-up-{number}")
        metrics.http.ended(HttpCall("other", f"BREW{number}", 404, 0.1, 0, 0))
    assert names(exposition([], metrics.families(0.0)).decode()) == first


@pytest.mark.parametrize(("status", "label"), [(200, "2xx"), (404, "4xx"), (503, "5xx"), (None, "left")])
def test_a_call_is_counted_by_its_status_class(status: int | None, label: str) -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    metrics.http.ended(HttpCall("/generate", "POST", status, 0.1, 10, 20))
    found = samples(metrics)
    assert found[f"http_requests_total//generate/POST/{label}"] == 1
    assert (found["http_received_bytes_total//generate"], found["http_sent_bytes_total//generate"]) == (10, 20)


def test_stored_responses_are_measured() -> None:
    metrics = IngressMetrics("r", ["m"], opentelemetry=False)
    metrics.http.responses_stored(3, 5000, 0)
    metrics.http.responses_stored(2, 4000, 2)
    found = samples(metrics)
    assert (found["stored_responses"], found["stored_responses_bytes"]) == (2, 4000)
    assert found["removed_responses_total"] == 2


@pytest.mark.parametrize("error", [None, QueueFull("full")])
def test_a_line_of_a_batch_counts_its_tokens_only(error: ServeAppError | None) -> None:
    line = replace(request(), background=True)
    chunks = () if error else (chunk(0.1), chunk(0.12, 0.14, end=FinishReason.LENGTH))
    assert changes(*chunks, error=error, measured=line) == (
        {} if error else {"prompt_tokens_total": 3, "generated_tokens_total": 3}
    )


def test_jobs_and_idempotency_keys_are_counted() -> None:
    metrics = IngressMetrics("r", ["m"], False)
    metrics.jobs.line("completed")
    metrics.jobs.line("expired", 5)
    metrics.jobs.unfinished(2, 7.5)
    metrics.jobs.failed()
    metrics.jobs.key_used("replayed")
    metrics.jobs.answers_kept(100)
    found = samples(metrics)
    assert (found["batch_lines_total/completed"], found["batch_lines_total/expired"]) == (1, 5)
    assert (found["open_batches"], found["batch_silent_seconds"], found["job_database_errors_total"]) == (2, 7.5, 1)
    assert (found["idempotent_requests_total/replayed"], found["idempotent_answers_bytes"]) == (1, 100)
