"""The LLM performance dashboard: requests, latencies, tokens, HTTP calls, the response cache and engines."""

from __future__ import annotations

from alerts.dashboards.panels import Dashboard, Panel, Variable
from alerts.dashboards.promql import (
    MODEL,
    buckets,
    maximum,
    objective,
    per_second,
    quantiles,
    ratio,
    threshold,
    total,
)

TTFT = "serve_app_time_to_first_token_seconds"
TPOT = "serve_app_time_per_output_token_seconds"
REQUESTS_TOTAL = "serve_app_requests_total"
ROUTE = ("route",)
TTFT_THRESHOLDS = (threshold("TimeToFirstTokenHigh"), threshold("TimeToFirstTokenVeryHigh"))
ERROR_THRESHOLDS = (threshold("ErrorRateHigh"), threshold("ErrorRateVeryHigh"))
ERRORS = ("ErrorRateHigh", "ErrorRateVeryHigh", "AvailabilityBudgetBurnsFast")
REJECTED = f'{MODEL}, outcome="queue_full"'


def _recorded(name: str) -> tuple[tuple[str, str], ...]:
    return ((f"{name}{{{MODEL}}}", "{{model}}"),)


OVERVIEW = (
    Panel(
        "Requests per second",
        "Requests that ended in the last 5 minutes, without cancelled and invalid requests. If it is 0 although "
        "clients send requests, check the HTTP row, then the resources dashboard.",
        "reqps",
        _recorded("serve_app:requests:rate5m"),
        "stat",
        width=4,
    ),
    Panel(
        "Failed",
        "Share of the requests in the last 5 minutes that failed or were rejected. Above the threshold, check the "
        "panel Errors by code.",
        "percentunit",
        _recorded("serve_app:bad_requests:ratio_rate5m"),
        "stat",
        thresholds=ERROR_THRESHOLDS,
        alerts=ERRORS,
        width=4,
    ),
    Panel(
        "TTFT, p95",
        "Time from arrival to the first token over the last 5 minutes. Empty below 10 requests. If it is high, "
        "compare the panels Queue time and Prefill time.",
        "s",
        _recorded("serve_app:time_to_first_token_seconds:p95_5m"),
        "stat",
        thresholds=TTFT_THRESHOLDS,
        alerts=("TimeToFirstTokenHigh", "TimeToFirstTokenVeryHigh"),
        width=4,
    ),
    Panel(
        "Tokens per second",
        "Tokens sent to all clients together, over the last 5 minutes. If it is low while sequences run, the engine "
        "is slow.",
        "short",
        _recorded("serve_app:generated_tokens:rate5m"),
        "stat",
        width=4,
    ),
    Panel(
        "Active requests",
        "Requests that have arrived and have not ended. If there are many more than slots, the others wait: see "
        "Slots and queue.",
        "short",
        ((total("serve_app_active_requests"), "{{model}}"),),
        "stat",
        width=4,
    ),
    Panel(
        "Goodput",
        "Share of the complete responses with a TTFT of at most 2 s and a TPOT of at most 50 ms. It falls before "
        "errors rise: add replicas or admit fewer requests at a time.",
        "percentunit",
        (
            (
                ratio(
                    per_second("serve_app_goodput_requests_total"),
                    per_second(REQUESTS_TOTAL, where=f'{MODEL}, outcome=~"stop|length|embedded"'),
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
        "How requests ended: complete (stop, length, embedded), cancelled by the client, or with an error. Look for "
        "a new outcome that grows.",
        "reqps",
        ((per_second(REQUESTS_TOTAL, ("outcome",)), "{{outcome}}"),),
        stacked=True,
    ),
    Panel(
        "Response time",
        "Time from arrival to the last token of complete responses. It grows with the length of responses, so use "
        "TTFT and TPOT to assess the service.",
        "s",
        quantiles("serve_app_request_seconds"),
    ),
    Panel(
        "Response time, distribution",
        "Complete responses by response time. Two bands mean two kinds of clients or replicas.",
        "s",
        buckets("serve_app_request_seconds"),
        "heatmap",
    ),
    Panel(
        "Failed requests",
        "Share of the requests in 5 minutes that failed or were rejected, as in the alerts.",
        "percentunit",
        _recorded("serve_app:bad_requests:ratio_rate5m"),
        thresholds=ERROR_THRESHOLDS,
        alerts=ERRORS,
    ),
    Panel(
        "Errors by code",
        "Error responses by error code. Codes with status 4xx are errors of the client. For internal_error the log "
        "contains the traceback with the request id.",
        "reqps",
        ((per_second("serve_app_errors_total", ("code",)), "{{code}}"),),
        alerts=ERRORS,
        stacked=True,
    ),
    Panel(
        "Rejected requests",
        "Share of the requests that got status 429 because the queue was full. Above the threshold, add replicas or "
        "allow a longer queue.",
        "percentunit",
        ((ratio(per_second(REQUESTS_TOTAL, where=REJECTED), per_second(REQUESTS_TOTAL)), "{{model}}"),),
        thresholds=(threshold("RequestsTurnedAway"),),
        alerts=("RequestsTurnedAway",),
    ),
    Panel(
        "Interrupted responses",
        "Responses per second that ended with an error after the first token, and requests per second that went on at "
        "another replica because theirs was lost. Check which replica failed.",
        "reqps",
        (
            (per_second("serve_app_truncated_requests_total"), "{{model}} truncated"),
            (per_second("serve_app_resumed_requests_total"), "{{model}} resumed"),
        ),
        alerts=("StreamCompletenessBudgetBurnsFast", "RequestsResumed"),
    ),
    Panel(
        "Goodput over time",
        "Complete responses per second that met both time objectives, and all complete responses.",
        "reqps",
        (
            (per_second("serve_app_goodput_requests_total"), "{{model}} within objectives"),
            (per_second(REQUESTS_TOTAL, where=f'{MODEL}, outcome=~"stop|length|embedded"'), "{{model}} complete"),
        ),
    ),
    Panel(
        "Active requests over time",
        "Requests that have arrived and have not ended, at all ingress replicas. If the number only rises, requests "
        "leak or an engine is stalled.",
        "short",
        ((total("serve_app_active_requests"), "{{model}}"),),
        alerts=("EngineStalled",),
    ),
)

FIRST_TOKEN = (
    Panel(
        "TTFT",
        "Time from arrival to the first token. If most of it is queue time, capacity is too low. If most of it is "
        "prefill time, prompts are long.",
        "s",
        quantiles(TTFT),
        thresholds=TTFT_THRESHOLDS,
        alerts=("TimeToFirstTokenHigh", "TimeToFirstTokenVeryHigh", "TTFTBudgetBurnsFast"),
    ),
    Panel(
        "TTFT, distribution",
        "Requests by TTFT. A second, higher band means queueing, or prompts that are not in the prefix cache.",
        "s",
        buckets(TTFT),
        "heatmap",
    ),
    Panel(
        "Queue time",
        "Time from arrival until the model starts the request. Above the threshold there are too few replicas or "
        "slots for the load.",
        "s",
        quantiles("serve_app_queue_seconds"),
        thresholds=(objective("queue-wait"),),
        alerts=("QueueWaitBudgetBurnsFast", "QueueLong"),
    ),
    Panel(
        "Queue time, distribution",
        "Requests by queue time. In a healthy service all of them are in the lowest buckets.",
        "s",
        buckets("serve_app_queue_seconds"),
        "heatmap",
    ),
    Panel(
        "Prefill time",
        "Time to compute the prompt, until the first token. It grows with the length of prompts and with the number "
        "of other sequences.",
        "s",
        quantiles("serve_app_prefill_seconds"),
    ),
    Panel(
        "Decode time",
        "Time from the first to the last token of a response. Divided by the number of tokens it is the TPOT.",
        "s",
        quantiles("serve_app_decode_seconds"),
    ),
    Panel(
        "Wait for a place by tenant",
        "Mean time that requests waited at the ingress. Tenants that send more than their share wait, the others do "
        "not.",
        "s",
        (
            (
                ratio(
                    per_second("serve_app_tenant_queue_seconds_sum", ("tenant",)),
                    per_second("serve_app_tenant_queue_seconds_count", ("tenant",)),
                ),
                "{{tenant}}",
            ),
        ),
    ),
    Panel(
        "Started requests by tenant",
        "Requests that got a place at a replica. While requests wait, the tokens of tenants are in the proportion of "
        "their weights.",
        "reqps",
        ((per_second("serve_app_tenant_queue_seconds_count", ("tenant",)), "{{tenant}}"),),
        stacked=True,
    ),
    Panel(
        "Requests refused by the queue",
        "'full' and 'dropped': more requests than the queue takes. 'late': the deadlines of clients are shorter than "
        "the wait.",
        "reqps",
        ((per_second("serve_app_queue_refusals_total", ("reason",)), "{{reason}}"),),
        stacked=True,
    ),
)

TOKENS = (
    Panel(
        "TPOT",
        "Mean time per token after the first token of a response. Above the threshold, check the batch size and the "
        "step time.",
        "s",
        quantiles(TPOT),
        thresholds=(objective("tpot"),),
        alerts=("TPOTBudgetBurnsFast",),
    ),
    Panel(
        "TPOT, distribution",
        "Responses by TPOT. A second band means a replica on a slower machine, or larger batches.",
        "s",
        buckets(TPOT),
        "heatmap",
    ),
    Panel(
        "ITL",
        "Time between two flushes of tokens of one response. A high p99 with a low p50 means long prompts of other "
        "requests, or preempted sequences.",
        "s",
        quantiles("serve_app_inter_token_seconds"),
    ),
    Panel(
        "ITL, distribution",
        "Gaps between flushes by length. A band far above the others means that streams stutter: see Step time by "
        "phase.",
        "s",
        buckets("serve_app_inter_token_seconds"),
        "heatmap",
    ),
    Panel(
        "Tokens sent",
        "Tokens sent to clients per second. If it is below the threshold while sequences run, ThroughputLow fires.",
        "short",
        ((per_second("serve_app_generated_tokens_total"), "{{model}}"),),
        thresholds=(threshold("ThroughputLow"),),
        low_is_bad=True,
        alerts=("ThroughputLow",),
    ),
    Panel(
        "Prompt tokens",
        "Tokens of admitted prompts per second. Prefill computes those that are not in the prefix cache.",
        "short",
        ((per_second("serve_app_prompt_tokens_total"), "{{model}}"),),
    ),
)

HTTP = (
    Panel(
        "HTTP by status",
        "HTTP calls by status. `left` means that the client disconnected before the status was sent. A response that"
        " fails after its first token is counted as 2xx here.",
        "reqps",
        ((per_second("serve_app_http_requests_total", ("status",), ""), "{{status}}"),),
        alerts=("ServiceDown",),
        stacked=True,
    ),
    Panel(
        "HTTP by route",
        "HTTP calls by route and method. `other` means unknown paths, for example from a wrong client address or a "
        "scanner.",
        "reqps",
        ((per_second("serve_app_http_requests_total", ("route", "method"), ""), "{{method}} {{route}}"),),
        stacked=True,
    ),
    Panel(
        "HTTP time by route",
        "Time from the call to the last byte of the response. Streams take as long as their text. Health checks must"
        " be short.",
        "s",
        quantiles("serve_app_http_request_seconds", ROUTE, "", ("0.5", "0.99")),
    ),
    Panel(
        "Calls refused because of their key",
        "HTTP calls that got status 401 or 403, or 503 because the keys cannot be read, by reason. Many `invalid` "
        "calls mean a client with a wrong key, or an attacker who guesses keys.",
        "reqps",
        ((per_second("serve_app_auth_refusals_total", ("reason",), ""), "{{reason}}"),),
        alerts=("KeysCannotBeRead",),
        stacked=True,
    ),
    Panel(
        "Age of the API keys",
        "Time since each replica of the ingress last read the keys from the database. A revoked key is refused only "
        "after the next time.",
        "s",
        (("max by (replica) (serve_app_keys_age_seconds)", "{{replica}}"),),
        thresholds=(threshold("KeysCannotBeRead"),),
        alerts=("KeysCannotBeRead",),
    ),
    Panel(
        "HTTP calls in progress",
        "HTTP calls that have arrived and have not ended, in each replica of the ingress.",
        "short",
        ((total("serve_app_http_open_requests", ("replica",), ""), "{{replica}}"),),
    ),
    Panel(
        "Stored responses",
        "Responses of OpenAI's Responses API that each replica of the ingress keeps. The limit is "
        "`responses.max_stored`.",
        "short",
        ((total("serve_app_stored_responses", ("replica",), ""), "{{replica}}"),),
    ),
    Panel(
        "Memory of stored responses",
        "Approximate memory of the stored responses of each replica of the ingress. The limit is "
        "`responses.max_stored_bytes`.",
        "bytes",
        ((total("serve_app_stored_responses_bytes", ("replica",), ""), "{{replica}}"),),
    ),
    Panel(
        "Responses removed from the store",
        "Stored responses that were removed because of their age or a limit. Clients that continue such a response get"
        " an error.",
        "ops",
        ((per_second("serve_app_removed_responses_total", ("replica",), ""), "{{replica}}"),),
    ),
)

RESPONSE_CACHE = (
    Panel(
        "Response cache: requests",
        "Requests by what the response cache did. The times and tokens of hits are in no other panel. Requests that "
        "are sampled without a seed are bypasses.",
        "reqps",
        ((per_second("serve_app_response_cache_requests_total", ("status",)), "{{status}}"),),
        stacked=True,
    ),
    Panel(
        "Response cache: memory",
        "Memory of the answers in each replica of the ingress. The limit is `response_cache.max_bytes`; 0 if a Redis "
        "server keeps the answers.",
        "bytes",
        ((total("serve_app_response_cache_bytes", ("replica",), ""), "{{replica}}"),),
    ),
    Panel(
        "Response cache: errors of the server",
        "Failed calls to the Redis server of the response cache. Above the threshold the server is down or too slow, "
        "and requests are computed as without a cache.",
        "ops",
        ((per_second("serve_app_response_cache_errors_total", ("replica",), ""), "{{replica}}"),),
        thresholds=(threshold("ResponseCacheFails"),),
        alerts=("ResponseCacheFails",),
    ),
)

LIMITS = (
    Panel(
        "Limits: refused requests by limit",
        "Requests that were refused because of a limit of their key or tenant. 'unavailable': the server that counts "
        "the limits did not answer.",
        "reqps",
        ((per_second("serve_app_quota_refusals_total", ("limit",), ""), "{{limit}}"),),
        stacked=True,
    ),
    Panel(
        "Limits: refused requests by owner",
        "The same requests by whose limit it was. Many refusals by the limits of tenants: raise them, or ask the "
        "tenant to spread its load.",
        "reqps",
        ((per_second("serve_app_quota_refusals_total", ("subject",), ""), "{{subject}}"),),
        stacked=True,
    ),
    Panel(
        "Limits: budgets nearly used",
        "Budgets of keys and tenants of which at least 90 % are used. `GET /v1/usage` shows whose they are.",
        "short",
        ((maximum("serve_app_budgets_nearly_used", ("period",), ""), "{{period}}"),),
        alerts=("BudgetNearlyUsed",),
    ),
    Panel(
        "Limits: errors of the server",
        "Failed calls to the server that counts for all ingresses. Above the threshold it is down or too slow, and "
        "requests of keys with limits are refused, or each ingress counts for itself (`quotas.when_unavailable`).",
        "ops",
        ((per_second("serve_app_quota_store_errors_total", ("replica",), ""), "{{replica}}"),),
        thresholds=(threshold("QuotaStoreFails"),),
        alerts=("QuotaStoreFails",),
    ),
    Panel(
        "Usage that waits for the database",
        "Finished requests whose usage could not be written yet. It is lost if the ingress ends before the database "
        "is back.",
        "short",
        ((total("serve_app_usage_unwritten_requests", ("replica",), ""), "{{replica}}"),),
        alerts=("UsageNotWritten",),
    ),
    Panel(
        "Usage that was lost",
        "Finished requests whose usage is not kept, because too many rows waited for the database.",
        "ops",
        ((per_second("serve_app_usage_lost_requests_total", ("replica",), ""), "{{replica}}"),),
    ),
)

ENGINE = (
    Panel(
        "Batch size",
        "Sequences in one forward pass. If it is close to 1 under load, requests do not overlap or there are few "
        "slots.",
        "short",
        quantiles("serve_app_engine_batch_size", levels=("0.5", "0.99")),
    ),
    Panel(
        "Batch size, distribution",
        "Forward passes by number of sequences. If all are in the lowest bucket under load, check Slots and queue.",
        "short",
        buckets("serve_app_engine_batch_size"),
        "heatmap",
    ),
    Panel(
        "Tokens per step",
        "Tokens that one forward pass computes, including prompt chunks. A p99 at max_step_tokens means long prompts.",
        "short",
        (
            *quantiles("serve_app_engine_batch_tokens", levels=("0.5", "0.99")),
            (
                ratio(per_second("serve_app_engine_rows_total"), per_second("serve_app_engine_steps_total")),
                "{{model}} mean",
            ),
        ),
    ),
    Panel(
        "Step time by phase",
        "Time of a forward pass with only decoding, only prefill, or both. Other streams wait for the mixed steps of"
        " a long prompt.",
        "s",
        quantiles("serve_app_engine_step_seconds", ("phase",), levels=("0.5", "0.99")),
    ),
    Panel(
        "Steps and decode rows",
        "Per second: forward passes, their decode rows, and sampled tokens. Sampled tokens that were not sent belong"
        " to clients that disconnected.",
        "short",
        (
            (per_second("serve_app_engine_steps_total"), "{{model}} steps"),
            (per_second("serve_app_engine_decode_rows_total"), "{{model}} decode rows"),
            (per_second("serve_app_engine_generated_tokens_total"), "{{model}} sampled"),
        ),
    ),
    Panel(
        "Engine busy",
        "Share of the time that an engine spends in steps. At 100 % the machine is the limit. If it is lower while "
        "requests wait, something else delays the engine.",
        "percentunit",
        ((per_second("serve_app_engine_busy_seconds_total", ("model", "replica")), "{{model}} {{replica}}"),),
        maximum=1,
    ),
    Panel(
        "Failures of the model",
        "Per second: forward passes that failed and were repeated with fewer sequences, sequences that the model could "
        "not compute, and engines that hung. Check the log of the replica.",
        "ops",
        (
            (per_second("serve_app_engine_failed_steps_total", ("model", "cause")), "{{model}} passes: {{cause}}"),
            (
                per_second("serve_app_engine_failed_sequences_total", ("model", "cause")),
                "{{model}} sequences: {{cause}}",
            ),
            (per_second("serve_app_engine_hangs_total"), "{{model}} hangs"),
        ),
        alerts=("EngineStepsFail", "EngineSequencesFail", "EngineHung"),
    ),
    Panel(
        "Age of the current step",
        "Time that the current forward pass has taken so far. Seconds mean that it hangs or that the step is too "
        "large.",
        "s",
        ((maximum("serve_app_engine_step_age_seconds", ("model", "replica")), "{{model}} {{replica}}"),),
        alerts=("EngineStalled",),
    ),
    Panel(
        "Slots and queue",
        "Running sequences, sequences that wait for a slot, and slots. Waiting sequences while slots are free mean "
        "that memory is the limit, or a fault.",
        "short",
        (
            *((query, f"{legend} running") for query, legend in _recorded("serve_app:running_sequences:sum")),
            *((query, f"{legend} waiting") for query, legend in _recorded("serve_app:queue_depth:sum")),
            *((query, f"{legend} slots") for query, legend in _recorded("serve_app:slots:sum")),
        ),
        alerts=("QueueLong",),
    ),
)

MEMORY = (
    Panel(
        "KV cache usage",
        "Share of the KV cache that running sequences use. Above the threshold sequences will be preempted.",
        "percentunit",
        ((maximum("serve_app_kv_usage_ratio", ("model", "replica")), "{{model}} {{replica}}"),),
        thresholds=(threshold("KVCacheNearlyFull"),),
        alerts=("KVCacheNearlyFull",),
        maximum=1,
    ),
    Panel(
        "Preemptions",
        "Sequences per second that gave their memory back and are computed again. If there are many, use fewer slots"
        " or more memory.",
        "ops",
        ((per_second("serve_app_engine_preemptions_total"), "{{model}}"),),
        alerts=("SequencesPreempted",),
    ),
    Panel(
        "Prefix cache hit rate",
        "Share of the prompt tokens that were in the prefix cache. It falls when prompts begin differently, for "
        "example with the time of day.",
        "percentunit",
        (
            (
                ratio(
                    per_second("serve_app_prefix_cache_hit_tokens_total"),
                    per_second("serve_app_prefix_cache_queried_tokens_total"),
                ),
                "{{model}}",
            ),
        ),
        maximum=1,
    ),
    Panel(
        "Draft acceptance rate",
        "Share of the draft tokens that the model accepted. If it is low, drafting costs more time than it saves.",
        "percentunit",
        (
            (
                ratio(per_second("serve_app_draft_accepted_tokens_total"), per_second("serve_app_draft_tokens_total")),
                "{{model}}",
            ),
        ),
        maximum=1,
    ),
    Panel(
        "Prompt lengths",
        "Tokens per prompt. Longer prompts cause a longer TTFT.",
        "short",
        quantiles("serve_app_request_prompt_tokens"),
    ),
    Panel(
        "Response lengths",
        "Tokens per response. Longer responses cause a longer response time.",
        "short",
        quantiles("serve_app_request_generated_tokens"),
    ),
    Panel(
        "Prompt lengths, distribution",
        "Requests by prompt length. A new band means a new client or a changed client.",
        "short",
        buckets("serve_app_request_prompt_tokens"),
        "heatmap",
        width=12,
    ),
    Panel(
        "Response lengths, distribution",
        "Requests by response length. A band at the top is the limit max_tokens, not the end of the text.",
        "short",
        buckets("serve_app_request_generated_tokens"),
        "heatmap",
        width=12,
    ),
)

VLLM = (
    Panel(
        "vLLM: time in the queue",
        "Time from the arrival of a request in vLLM until vLLM begins with its prompt.",
        "s",
        quantiles("vllm:request_queue_time_seconds", levels=("0.5", "0.95")),
    ),
    Panel(
        "vLLM: prefill time",
        "Time that vLLM computes a prompt, up to the first token.",
        "s",
        quantiles("vllm:request_prefill_time_seconds", levels=("0.5", "0.95")),
    ),
    Panel(
        "vLLM: time between tokens",
        "Time between two tokens of an answer in vLLM. Streams to clients are slower only if the network or the "
        "ingress is.",
        "s",
        quantiles("vllm:inter_token_latency_seconds", levels=("0.5", "0.99")),
    ),
)

IN_EXPERIMENT = 'experiment=~".+"'
BY_VARIANT = ("experiment", "variant")
NAMED = "{{experiment}} {{variant}}"
EXPERIMENT_REQUESTS = "serve_app_experiment_requests_total"
EXPERIMENTS = (
    Panel(
        "Shares of variants",
        "Share of the units that each variant gets now, by its split and ramp. After a stop by a guard the control "
        "has 100 %.",
        "percentunit",
        ((maximum("serve_app_experiment_variant_share_ratio", BY_VARIANT, IN_EXPERIMENT), NAMED),),
        maximum=1,
    ),
    Panel(
        "Requests by variant",
        "Requests of experiments per second. If a variant has none although it has a share, check its model.",
        "reqps",
        ((per_second(EXPERIMENT_REQUESTS, BY_VARIANT, IN_EXPERIMENT), NAMED),),
    ),
    Panel(
        "Failed by variant",
        "Share of the requests of each variant that ended with an error. The guard error_rate compares it with the "
        "control.",
        "percentunit",
        (
            (
                ratio(
                    per_second(
                        EXPERIMENT_REQUESTS, BY_VARIANT, f'{IN_EXPERIMENT}, outcome!~"stop|length|embedded|cancelled"'
                    ),
                    per_second(EXPERIMENT_REQUESTS, BY_VARIANT, IN_EXPERIMENT),
                ),
                NAMED,
            ),
        ),
        alerts=("ExperimentStopped",),
    ),
    Panel(
        "TTFT by variant",
        "95th percentile of the time to the first token. To decide, read the report of the experiment: it has "
        "intervals, and this panel has none.",
        "s",
        quantiles("serve_app_experiment_time_to_first_token_seconds", BY_VARIANT, IN_EXPERIMENT, ("0.95",)),
        alerts=("ExperimentStopped",),
    ),
    Panel(
        "TPOT by variant",
        "Median of the mean time per output token. Compare it with that of the control.",
        "s",
        quantiles("serve_app_experiment_time_per_output_token_seconds", BY_VARIANT, IN_EXPERIMENT, ("0.5",)),
        alerts=("ExperimentStopped",),
    ),
    Panel(
        "Tokens by variant",
        "Generated tokens per second. A variant whose answers are longer needs more replicas for the same share.",
        "short",
        ((per_second("serve_app_experiment_generated_tokens_total", BY_VARIANT, IN_EXPERIMENT), NAMED),),
    ),
    Panel(
        "Feedback",
        "Ratings of answers per second, by model or by experiment and variant. good is a score of 0.5 or more.",
        "reqps",
        (
            (
                per_second("serve_app_feedback_total", ("model", *BY_VARIANT, "score"), 'score=~".+"'),
                "{{model}}{{experiment}} {{variant}} {{score}}",
            ),
        ),
    ),
    Panel(
        "Shadow requests",
        "Requests mirrored to a shadow variant per second, by outcome. If most are skipped or yielded, the model of "
        "the shadow variant is busy.",
        "reqps",
        (
            (
                per_second("serve_app_experiment_shadow_requests_total", (*BY_VARIANT, "outcome"), IN_EXPERIMENT),
                f"{NAMED} {{{{outcome}}}}",
            ),
        ),
    ),
    Panel(
        "Stopped experiments and refused configurations",
        "1 for an experiment that a guard has stopped, and for an ingress that refused the latest configuration of "
        "experiments. The log of the ingress has the reason.",
        "short",
        (
            (maximum("serve_app_experiment_stopped", ("experiment",), IN_EXPERIMENT), "{{experiment}} stopped"),
            (maximum("serve_app_experiments_config_refused", ("replica",), 'replica=~".+"'), "{{replica}} refused"),
        ),
        alerts=("ExperimentStopped",),
        maximum=1,
    ),
)

EVERY_REPLICA = 'replica=~".+"'
JOBS = (
    Panel(
        "Batch lines",
        "Lines of batches per second, by outcome. If most are retried, the service is busy with other requests or a "
        "model is down.",
        "ops",
        ((per_second("serve_app_batch_lines_total", ("outcome",), ""), "{{outcome}}"),),
        stacked=True,
    ),
    Panel(
        "Open batches",
        "Batches that have not ended. Every ingress reports the same number.",
        "short",
        ((maximum("serve_app_open_batches", ("replica",), EVERY_REPLICA), "{{replica}}"),),
    ),
    Panel(
        "Batches: time without progress",
        "Longest time since a batch that has not ended made progress. Above the threshold a batch is stuck.",
        "s",
        ((maximum("serve_app_batch_silent_seconds", ("replica",), EVERY_REPLICA), "{{replica}}"),),
        thresholds=(threshold("BatchStuck"),),
        alerts=("BatchStuck",),
    ),
    Panel(
        "Jobs: errors of the database",
        "Failed calls to the database of batches and of shared idempotency keys. Above the threshold the database is "
        "down: batches stand still, other requests do not need it.",
        "ops",
        ((per_second("serve_app_job_database_errors_total", ("replica",), ""), "{{replica}}"),),
        thresholds=(threshold("JobDatabaseFails"),),
        alerts=("JobDatabaseFails",),
    ),
    Panel(
        "Requests with an idempotency key",
        "Requests with the header Idempotency-Key per second. If many are replayed, clients retry after time-outs; "
        "refused ones used a key for two requests.",
        "reqps",
        ((per_second("serve_app_idempotent_requests_total", ("outcome",), ""), "{{outcome}}"),),
        stacked=True,
    ),
    Panel(
        "Idempotency: memory",
        "Memory of the answers that each replica of the ingress keeps by idempotency keys. The limit is "
        "`idempotency.max_kept_bytes`; 0 if the database keeps them.",
        "bytes",
        ((total("serve_app_idempotent_answers_bytes", ("replica",), ""), "{{replica}}"),),
    ),
)

DASHBOARD = Dashboard(
    uid="serve-app-llm",
    title="serve_app: LLM performance",
    description="Requests, errors, latencies, tokens, HTTP calls, the response cache and engines.",
    variables=(Variable("model", "Model", "label_values(serve_app_model_state, model)"),),
    rows={
        "Overview": OVERVIEW,
        "Requests": REQUESTS,
        "First token": FIRST_TOKEN,
        "Tokens": TOKENS,
        "Experiments": EXPERIMENTS,
        "HTTP": HTTP,
        "Response cache": RESPONSE_CACHE,
        "Limits and usage": LIMITS,
        "Batches and idempotency keys": JOBS,
        "Engine": ENGINE,
        "Engine: vLLM": VLLM,
        "KV cache and lengths": MEMORY,
    },
)
