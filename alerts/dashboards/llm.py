"""What callers get, and what the engines do for it."""

from __future__ import annotations

from alerts.dashboards.panels import Board, Panel, Variable
from alerts.dashboards.promql import (
    MODEL,
    bound,
    buckets,
    highest,
    objective,
    per_second,
    quantiles,
    share,
    total,
)

TTFT = "serve_app_time_to_first_token_seconds"
TPOT = "serve_app_time_per_output_token_seconds"
ENDED = "serve_app_requests_total"
ROUTE = ("route",)
TTFT_BOUNDS = (bound("TimeToFirstTokenHigh"), bound("TimeToFirstTokenVeryHigh"))
ERROR_BOUNDS = (bound("ErrorRateHigh"), bound("ErrorRateVeryHigh"))
ERRORS = ("ErrorRateHigh", "ErrorRateVeryHigh", "AvailabilityBudgetBurnsFast")
NOBODY = f'{MODEL}, outcome="queue_full"'


def _recorded(name: str) -> tuple[tuple[str, str], ...]:
    return ((f"{name}{{{MODEL}}}", "{{model}}"),)


GLANCE = (
    Panel(
        "Requests a second",
        "Requests that ended, whatever way, without those who left or asked for what cannot be done, over 5 minutes. "
        "None at all while callers are there: look at HTTP below, then at the resources dashboard.",
        "reqps",
        _recorded("serve_app:requests:rate5m"),
        "stat",
        width=4,
    ),
    Panel(
        "Failed",
        "Share of 5 minutes' requests that failed or were turned away. Above the bounds: Errors by code says which.",
        "percentunit",
        _recorded("serve_app:bad_requests:ratio_rate5m"),
        "stat",
        bounds=ERROR_BOUNDS,
        alerts=ERRORS,
        width=4,
    ),
    Panel(
        "First token, p95",
        "Arrival to first token over 5 minutes; nothing below 10 requests. High: compare queue and prefill below.",
        "s",
        _recorded("serve_app:time_to_first_token_seconds:p95_5m"),
        "stat",
        bounds=TTFT_BOUNDS,
        alerts=("TimeToFirstTokenHigh", "TimeToFirstTokenVeryHigh"),
        width=4,
    ),
    Panel(
        "Tokens a second",
        "Tokens sent to callers over 5 minutes, of all streams together. Few while sequences run: the engine is slow.",
        "short",
        _recorded("serve_app:generated_tokens:rate5m"),
        "stat",
        width=4,
    ),
    Panel(
        "Under way",
        "Requests that have arrived and not ended. Far above the slots: they wait; see the queue.",
        "short",
        ((total("serve_app_active_requests"), "{{model}}"),),
        "stat",
        width=4,
    ),
    Panel(
        "Goodput",
        "Share of whole answers whose first token came within 2 s and the others at 50 ms or less. "
        "It falls before errors rise: add replicas, or admit fewer at a time.",
        "percentunit",
        (
            (
                share(
                    per_second("serve_app_goodput_requests_total"),
                    per_second(ENDED, where=f'{MODEL}, outcome=~"stop|length|embedded"'),
                ),
                "{{model}}",
            ),
        ),
        "stat",
        width=4,
    ),
)

REQUESTS = (
    Panel(
        "Requests by outcome",
        "How requests ended: with their answer (stop, length, embedded), by their caller (cancelled), or with an "
        "error. A new colour that grows is what to look for.",
        "reqps",
        ((per_second(ENDED, ("outcome",)), "{{outcome}}"),),
        stacked=True,
    ),
    Panel(
        "Response time",
        "Arrival to last token, of whole answers. It grows with the length of answers: judge by TTFT and TPOT.",
        "s",
        quantiles("serve_app_request_seconds"),
    ),
    Panel(
        "Response time, distribution",
        "Whole answers by their time. Two bands are two kinds of callers, or of replicas.",
        "s",
        buckets("serve_app_request_seconds"),
        "heatmap",
    ),
    Panel(
        "Failed requests",
        "Share of 5 minutes' requests that failed or were turned away, as the alerts count it.",
        "percentunit",
        _recorded("serve_app:bad_requests:ratio_rate5m"),
        bounds=ERROR_BOUNDS,
        alerts=ERRORS,
    ),
    Panel(
        "Errors by code",
        "Refusals and failures by their code, as callers read it. Codes of 4xx are the callers' own; "
        "internal_error has its trace in the log, by the request's id.",
        "reqps",
        ((per_second("serve_app_errors_total", ("code",)), "{{code}}"),),
        alerts=ERRORS,
        stacked=True,
    ),
    Panel(
        "Turned away",
        "Share of requests that got 429 since the queue was full. Above the bound: more replicas, or a longer queue.",
        "percentunit",
        ((share(per_second(ENDED, where=NOBODY), per_second(ENDED)), "{{model}}"),),
        bounds=(bound("RequestsTurnedAway"),),
        alerts=("RequestsTurnedAway",),
    ),
    Panel(
        "Broken answers",
        "Answers that began and ended with an error. Each was half read by somebody: see which replica failed.",
        "reqps",
        ((per_second("serve_app_truncated_requests_total"), "{{model}}"),),
        alerts=("StreamCompletenessBudgetBurnsFast",),
    ),
    Panel(
        "Goodput over time",
        "Whole answers a second that kept both bounds of time, beside all that were whole.",
        "reqps",
        (
            (per_second("serve_app_goodput_requests_total"), "{{model}} within bounds"),
            (per_second(ENDED, where=f'{MODEL}, outcome=~"stop|length|embedded"'), "{{model}} whole"),
        ),
    ),
    Panel(
        "Requests under way",
        "Arrived and not ended, at every ingress. A line that only rises is a leak or a stalled engine.",
        "short",
        ((total("serve_app_active_requests"), "{{model}}"),),
        alerts=("EngineStalled",),
    ),
)

FIRST_TOKEN = (
    Panel(
        "TTFT",
        "Arrival to first token. If the queue's time is most of it, capacity is short; if prefill's, prompts are long.",
        "s",
        quantiles(TTFT),
        bounds=TTFT_BOUNDS,
        alerts=("TimeToFirstTokenHigh", "TimeToFirstTokenVeryHigh", "TTFTBudgetBurnsFast"),
    ),
    Panel(
        "TTFT, distribution",
        "First tokens by their time. A second band above is a queue, or prompts that the prefix cache does not know.",
        "s",
        buckets(TTFT),
        "heatmap",
    ),
    Panel(
        "Queue",
        "Arrival to the model's beginning. Above the bound, replicas or slots are too few for the load.",
        "s",
        quantiles("serve_app_queue_seconds"),
        bounds=(objective("queue-wait"),),
        alerts=("QueueWaitBudgetBurnsFast", "QueueLong"),
    ),
    Panel(
        "Queue, distribution",
        "Waits before the model's beginning. A healthy service has all of them in the lowest buckets.",
        "s",
        buckets("serve_app_queue_seconds"),
        "heatmap",
    ),
    Panel(
        "Prefill",
        "Beginning to first token: the prompt's computation. It grows with prompts and with neighbours.",
        "s",
        quantiles("serve_app_prefill_seconds"),
    ),
    Panel(
        "Decode",
        "First to last token of an answer. Divided by its length it is TPOT.",
        "s",
        quantiles("serve_app_decode_seconds"),
    ),
)

TOKENS = (
    Panel(
        "TPOT",
        "Mean time of an answer's tokens after the first. Above the bound text comes slower than it should: "
        "look at the batch's size and the step's time.",
        "s",
        quantiles(TPOT),
        bounds=(objective("tpot"),),
        alerts=("TPOTBudgetBurnsFast",),
    ),
    Panel(
        "TPOT, distribution",
        "Answers by their mean time a token. A second band is a replica on a slower machine, or larger batches.",
        "s",
        buckets(TPOT),
        "heatmap",
    ),
    Panel(
        "ITL",
        "Gaps between the flushes of one answer, as a reader sees them. High p99 beside a low p50: long prompts of "
        "others, or sequences that are put off.",
        "s",
        quantiles("serve_app_inter_token_seconds"),
    ),
    Panel(
        "ITL, distribution",
        "Gaps by their length. A band far above the rest is what readers call stuttering: see the steps by phase.",
        "s",
        buckets("serve_app_inter_token_seconds"),
        "heatmap",
    ),
    Panel(
        "Tokens out",
        "Tokens sent to callers a second. Below the bound while something runs, ThroughputLow fires.",
        "short",
        ((per_second("serve_app_generated_tokens_total"), "{{model}}"),),
        bounds=(bound("ThroughputLow"),),
        low=True,
        alerts=("ThroughputLow",),
    ),
    Panel(
        "Tokens in",
        "Tokens of admitted prompts a second: what prefill has to compute, but for what the prefix cache has.",
        "short",
        ((per_second("serve_app_prompt_tokens_total"), "{{model}}"),),
    ),
)

HTTP = (
    Panel(
        "HTTP by status",
        "Answers by their status line; `left` are callers who went before it. What breaks off later is still 2xx here.",
        "reqps",
        ((per_second("serve_app_http_requests_total", ("status",), ""), "{{status}}"),),
        alerts=("ServiceDown",),
        stacked=True,
    ),
    Panel(
        "HTTP by route",
        "Which of the APIs callers use. `other` are paths that do not exist: somebody's wrong address, or a scanner.",
        "reqps",
        ((per_second("serve_app_http_requests_total", ("route", "method"), ""), "{{method}} {{route}}"),),
        stacked=True,
    ),
    Panel(
        "HTTP time by route",
        "Request to the answer's last byte. Streams take as long as their text; health checks must not.",
        "s",
        quantiles("serve_app_http_request_seconds", ROUTE, "", ("0.5", "0.99")),
    ),
)

ENGINE = (
    Panel(
        "Sequences a step",
        "How many sequences a forward pass served. Near 1 under load: requests do not overlap, or slots are few.",
        "short",
        quantiles("serve_app_engine_batch_size", shares=("0.5", "0.99")),
    ),
    Panel(
        "Sequences a step, distribution",
        "Steps by the number of their sequences. All in the lowest bucket under load: see slots and queue.",
        "short",
        buckets("serve_app_engine_batch_size"),
        "heatmap",
    ),
    Panel(
        "Rows a step",
        "Tokens that a forward pass computed, prompts' chunks among them; p99 at max_step_tokens means long prompts.",
        "short",
        (
            *quantiles("serve_app_engine_batch_tokens", shares=("0.5", "0.99")),
            (
                share(per_second("serve_app_engine_rows_total"), per_second("serve_app_engine_steps_total")),
                "{{model}} mean",
            ),
        ),
    ),
    Panel(
        "Step time by phase",
        "Time of a forward pass: decode alone, prefill alone, or both. Mixed steps are what neighbours of a long "
        "prompt wait for.",
        "s",
        quantiles("serve_app_engine_step_seconds", ("phase",), shares=("0.5", "0.99")),
    ),
    Panel(
        "Steps and decoding rows",
        "Forward passes a second, rows of them that decode, and tokens sampled. Sampled but not sent: callers left.",
        "short",
        (
            (per_second("serve_app_engine_steps_total"), "{{model}} steps"),
            (per_second("serve_app_engine_decode_rows_total"), "{{model}} decoding rows"),
            (per_second("serve_app_engine_generated_tokens_total"), "{{model}} sampled"),
        ),
    ),
    Panel(
        "Busy",
        "Share of the time that an engine spends in steps. At 100 % its pace is the machine's; below it while "
        "requests wait, something else holds it up.",
        "percentunit",
        ((per_second("serve_app_engine_busy_seconds_total", ("model", "replica")), "{{model}} {{replica}}"),),
        full=1,
    ),
    Panel(
        "Failed steps",
        "Forward passes that raised, each with all the sequences that it held. Any at all is worth the log.",
        "ops",
        ((per_second("serve_app_engine_failed_steps_total", ("model", "replica")), "{{model}} {{replica}}"),),
        alerts=("EngineStepsFail",),
    ),
    Panel(
        "Time of the step under way",
        "How long the forward pass that runs now has taken so far. Seconds: it hangs, or a step is far too large.",
        "s",
        ((highest("serve_app_engine_step_age_seconds", ("model", "replica")), "{{model}} {{replica}}"),),
        alerts=("EngineStalled",),
    ),
    Panel(
        "Slots and queue",
        "Sequences that run, that wait for a slot, and the slots. Waiting as long as slots are free is a fault.",
        "short",
        (
            *((question, f"{legend} run") for question, legend in _recorded("serve_app:running_sequences:sum")),
            *((question, f"{legend} wait") for question, legend in _recorded("serve_app:queue_depth:sum")),
            *((question, f"{legend} slots") for question, legend in _recorded("serve_app:slots:sum")),
        ),
        alerts=("QueueLong",),
    ),
)

MEMORY = (
    Panel(
        "KV memory in use",
        "Share of the KV memory that running sequences' tokens take. Above the bound sequences will be put off.",
        "percentunit",
        ((highest("serve_app_kv_usage_ratio", ("model", "replica")), "{{model}} {{replica}}"),),
        bounds=(bound("KVCacheNearlyFull"),),
        alerts=("KVCacheNearlyFull",),
        full=1,
    ),
    Panel(
        "Put off",
        "Sequences that gave their memory back, to be computed again. Many: fewer slots, or more memory.",
        "ops",
        ((per_second("serve_app_engine_preemptions_total"), "{{model}}"),),
        alerts=("SequencesPreempted",),
    ),
    Panel(
        "Prefix cache",
        "Share of prompt tokens that were computed already. It falls when callers' prompts begin differently, "
        "for instance with a time.",
        "percentunit",
        (
            (
                share(
                    per_second("serve_app_prefix_cache_hit_tokens_total"),
                    per_second("serve_app_prefix_cache_queried_tokens_total"),
                ),
                "{{model}}",
            ),
        ),
        full=1,
    ),
    Panel(
        "Guesses that were right",
        "Share of the tokens guessed ahead that the model would have said. Low: guessing costs more than it gives.",
        "percentunit",
        (
            (
                share(per_second("serve_app_draft_accepted_tokens_total"), per_second("serve_app_draft_tokens_total")),
                "{{model}}",
            ),
        ),
        full=1,
    ),
    Panel(
        "Prompt lengths",
        "Tokens of prompts. Their growth explains a growing TTFT.",
        "short",
        quantiles("serve_app_request_prompt_tokens"),
    ),
    Panel(
        "Answer lengths",
        "Tokens of answers. Their growth explains a growing response time.",
        "short",
        quantiles("serve_app_request_generated_tokens"),
    ),
    Panel(
        "Prompt lengths, distribution",
        "Requests by the tokens of their prompts. A band that is new is a caller who is new, or who changed.",
        "short",
        buckets("serve_app_request_prompt_tokens"),
        "heatmap",
        width=12,
    ),
    Panel(
        "Answer lengths, distribution",
        "Requests by the tokens of their answers. A band at the top is max_tokens, not the model's end.",
        "short",
        buckets("serve_app_request_generated_tokens"),
        "heatmap",
        width=12,
    ),
)

BOARD = Board(
    uid="serve-app-llm",
    title="serve_app: LLM performance",
    description="Requests, first tokens, gaps, throughput, errors, and the engines behind them.",
    variables=(Variable("model", "Model", "label_values(serve_app_model_state, model)"),),
    rows={
        "At a glance": GLANCE,
        "Requests": REQUESTS,
        "First token": FIRST_TOKEN,
        "Tokens": TOKENS,
        "HTTP": HTTP,
        "Engine": ENGINE,
        "Memory, reuse and lengths": MEMORY,
    },
)
