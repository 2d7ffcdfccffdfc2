"""Parsing of the counters that servers expose."""

from __future__ import annotations

import pytest

from perf import server

OURS = """\
# HELP serve_app_generated_tokens_total Tokens sent to clients
# TYPE serve_app_generated_tokens_total counter
serve_app_generated_tokens_total{model="a",replica="x"} 100.0
serve_app_generated_tokens_total{model="b",replica="y"} 23.0
# TYPE serve_app_prompt_tokens_total counter
serve_app_prompt_tokens_total{model="a",replica="x"} 7.0
# TYPE serve_app_requests_total counter
serve_app_requests_total{model="a",outcome="stop"} 2.0
"""
VLLM = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 640.0
# TYPE vllm:request_success_total counter
vllm:request_success_total{finished_reason="stop"} 1.0
vllm:request_success_total{finished_reason="length"} 9.0
"""
TGI = """\
# TYPE tgi_request_success counter
tgi_request_success 7
# TYPE tgi_request_generated_tokens histogram
tgi_request_generated_tokens_bucket{le="+Inf"} 7
tgi_request_generated_tokens_sum 70
tgi_request_generated_tokens_count 7
"""
LLAMA = "# TYPE llamacpp:tokens_predicted_total counter\nllamacpp:tokens_predicted_total 12\n"


@pytest.mark.parametrize(
    ("text", "name", "tokens", "requests"),
    [(OURS, "serve_app", 123, 2), (VLLM, "vLLM", 640, 10), (LLAMA, "llama.cpp", 12, None), (TGI, "TGI", 70, 7)],
)
def test_counters_are_summed_over_their_labels(text: str, name: str, tokens: int, requests: int | None) -> None:
    counters = server.parse(text)
    assert counters is not None
    assert counters.names.server == name
    assert counters.values["tokens"] == tokens
    assert counters.values.get("requests") == requests


def test_server_is_identified_before_its_counters_exist() -> None:
    counters = server.parse("# TYPE serve_app_slots gauge\nserve_app_slots 32\n")
    assert counters is not None
    assert (counters.names.server, counters.values["tokens"]) == ("serve_app", 0)


@pytest.mark.parametrize("text", ["", "hello there", "# TYPE other counter\nother_total 3\n", "<html></html>"])
def test_unknown_metrics_are_none(text: str) -> None:
    assert server.parse(text) is None


def test_since_is_the_difference_of_two_readings() -> None:
    before, after = server.parse(OURS), server.parse(OURS.replace("100.0", "150.0"))
    assert before is not None
    assert after is not None
    assert after.since(before) | {} == {**dict.fromkeys(after.values, 0.0), "tokens": 50.0}


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8000", True),
        ("http://127.0.0.2:1", True),
        ("http://[::1]:80/", True),
        ("http://192.0.2.1:8000", False),
    ],
)
def test_local_addresses_are_recognised(url: str, local: bool) -> None:
    assert server.is_local(url) is local
