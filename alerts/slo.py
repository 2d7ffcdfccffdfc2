"""The five service level objectives as a table, and the Prometheus rules that `python -m alerts rules` makes of it.

The windows and burn rates are those of the Google SRE Workbook, chapter "Alerting on SLOs", for an error budget of 30
days. A fast burn uses 2 % of the budget in 1 hour or 5 % in 6 hours, a slow burn 10 % in 1 or 3 days.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "rules/slo.yml"
# The base addresses of links in the repository's rules. `python -m alerts render` replaces them by those of the
# settings.
RUNBOOKS_URL = "https://example.com/serve_app/alerts/runbooks"
DASHBOARDS_URL = "http://localhost:3000/d"

# Outcomes that count as bad: errors with a status of 500 or above, and requests rejected because of a full queue.
BAD = "deadline_exceeded|internal_error|not_ready|queue_full"
# Outcomes that do not count: the client disconnected, the request was invalid, or it was over the limits of its key.
NOT_COUNTED = "cancelled|insufficient_quota|invalid_request|prompt_too_long|rate_limit_exceeded"

SECONDS = {"1h": 3600, "6h": 21600, "1d": 86400, "3d": 259200}
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# (long window, short window, burn rate). The short window ends the alert soon after the fault has ended.
FAST = (("1h", "5m", "14.4"), ("6h", "30m", "6"))
SLOW = (("1d", "2h", "3"), ("3d", "6h", "1"))


def linked(text: str, runbooks: str, dashboards: str) -> str:
    """`text` with the base addresses of its links replaced by `runbooks` and `dashboards`."""
    for default, address in ((RUNBOOKS_URL, runbooks), (DASHBOARDS_URL, dashboards)):
        text = text.replace(f"{default}/", f"{address.rstrip('/')}/")
    return text


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective. `bad` and `all` are PromQL rates of requests by model, with `WINDOW` as the window.

    `budget` is the share of requests that may be bad. With fewer than `minimum` requests in the long window no alert
    fires, because a single bad request would exceed the budget.
    """

    name: str  # prefix of the alert names
    slug: str
    target: str
    budget: str
    bad_share: str
    minimum: int
    fast: str  # severity of the fast burn
    metric: str  # without it the alerts of the objective cannot fire
    bad: str
    all: str


def _late(histogram: str, bound: str) -> tuple[str, str]:
    """PromQL rates of the observations above the bound of a bucket, and of all observations."""
    count = f"sum by (model) (rate({histogram}_count[WINDOW]))"
    return f'{count}\n            - sum by (model) (rate({histogram}_bucket{{le="{bound}"}}[WINDOW]))', count


SLOS = (
    Slo(
        name="Availability",
        slug="availability",
        target="99.9 % of requests are answered",
        budget="0.001",
        bad_share="of the requests failed or were rejected",
        minimum=1000,
        fast="critical",
        metric="serve_app_requests_total",
        bad=f"""sum by (model) (
              rate(serve_app_requests_total{{outcome=~"{BAD}"}}[WINDOW])
            )""",
        all=f'sum by (model) (rate(serve_app_requests_total{{outcome!~"{NOT_COUNTED}"}}[WINDOW]))',
    ),
    Slo(
        name="StreamCompleteness",
        slug="stream-completeness",
        target="99.95 % of started responses complete",
        budget="0.0005",
        bad_share="of the started responses ended with an error",
        minimum=2000,
        fast="critical",
        metric="serve_app_truncated_requests_total",
        bad="sum by (model) (rate(serve_app_truncated_requests_total[WINDOW]))",
        all="sum by (model) (rate(serve_app_time_to_first_token_seconds_count[WINDOW]))",
    ),
    Slo(
        "TTFT",
        "ttft",
        "99 % of first tokens arrive within 2 s",
        "0.01",
        "of the requests waited more than 2 s for the first token",
        100,
        "critical",
        "serve_app_time_to_first_token_seconds_count",
        *_late("serve_app_time_to_first_token_seconds", "2.0"),
    ),
    # The next two objectives do not page: TTFT pages when clients notice a delay.
    Slo(
        "TPOT",
        "tpot",
        "99 % of responses take at most 50 ms per token",
        "0.01",
        "of the responses took more than 50 ms per token",
        100,
        "warning",
        "serve_app_time_per_output_token_seconds_count",
        *_late("serve_app_time_per_output_token_seconds", "0.05"),
    ),
    Slo(
        "QueueWait",
        "queue-wait",
        "99 % of requests start within 1 s",
        "0.01",
        "of the requests waited more than 1 s before the model started them",
        100,
        "warning",
        "serve_app_queue_seconds_count",
        *_late("serve_app_queue_seconds", "1.0"),
    ),
)


def _recorded(slo: Slo) -> Iterator[str]:
    for window in WINDOWS:
        rate = f'slo:requests:rate{window}{{slo="{slo.slug}"}}'
        yield f"""\
      - record: slo:requests:rate{window}
        labels: {{slo: {slo.slug}}}
        expr: {slo.all.replace("WINDOW", window)}
      - record: slo:sli_error:ratio_rate{window}
        labels: {{slo: {slo.slug}}}
        expr: |-
          (
            {slo.bad.replace("WINDOW", window)}
            or on (model) 0 * {rate}
          ) / on (model) ({rate} > 0)
"""


def _burning(slo: Slo, pairs: tuple[tuple[str, str, str], ...]) -> str:
    of = f'{{slo="{slo.slug}"}}'
    return "\n          or\n          ".join(
        f"""\
(
            slo:sli_error:ratio_rate{long}{of} > {factor} * {slo.budget}
            and slo:sli_error:ratio_rate{short}{of} > {factor} * {slo.budget}
            and slo:requests:rate{long}{of} * {SECONDS[long]} >= {slo.minimum}
          )"""
        for long, short, factor in pairs
    )


def _links(slo: Slo) -> str:
    return f"""\
          runbook_url: {RUNBOOKS_URL}/{slo.name}Slo.md
          dashboard_url: {DASHBOARDS_URL}/serve-app-slo?var-model={{{{ $labels.model }}}}
"""


def _alerts(slo: Slo) -> Iterator[str]:
    speeds = (
        ("Fast", FAST, slo.fast, "At this rate the error budget of 30 days is used up within days"),
        ("Slow", SLOW, "warning", "At this rate the error budget is used up before its 30 days are over"),
    )
    for speed, pairs, severity, outlook in speeds:
        yield f"""\
      - alert: {slo.name}BudgetBurns{speed}
        labels: {{severity: {severity}, symptom: {slo.slug}}}
        expr: |-
          {_burning(slo, pairs)}
        annotations:
          summary: "{{{{ $labels.model }}}} misses its objective: {slo.target}"
          description: >-
            {{{{ $value | humanizePercentage }}}} {slo.bad_share}.
            {outlook}.
{_links(slo)}"""
    yield f"""\
      - alert: {slo.name}DataMissing
        # The engine generates tokens, but the metric of this objective has no samples.
        labels: {{severity: warning, symptom: monitoring}}
        expr: |-
          sum by (model) (increase(serve_app_engine_generated_tokens_total[15m])) > 100
          unless on (model) count by (model) (last_over_time({slo.metric}[15m]))
        for: 15m
        annotations:
          summary: "{{{{ $labels.model }}}} has no data for its objective: {slo.target}"
          description: >-
            The engine generated {{{{ $value | humanize }}}} tokens in 15 minutes, but {slo.metric}
            has no samples. The alerts of this objective cannot fire.
{_links(slo)}"""


def text() -> str:
    """The text of rules/slo.yml."""
    parts = ["# Generated by `python -m alerts rules` from the table in alerts/slo.py.\n\ngroups:\n"]
    for slo in SLOS:
        parts += [f"  - name: slo-{slo.slug}\n    rules:\n", *_recorded(slo), *_alerts(slo)]
    return "".join(parts)
