"""The five objectives in one table, and the rules that follow from it: `python -m alerts rules` writes rules/slo.yml.

Windows and factors are those of the Google SRE workbook for a budget of 30 days: "fast" has used 2 % of it within an
hour or 5 % within six, "slow" 10 % within a day or three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "rules/slo.yml"
# Where links lead in the repository's rules; `python -m alerts render` puts the settings' addresses there.
RUNBOOKS = "https://example.com/serve_app/alerts/runbooks"
DASHBOARDS = "http://localhost:3000/d"

# Ended by us: errors with a status of 500 and more, and callers that were turned away for want of room.
BAD = "deadline_exceeded|internal_error|not_ready|queue_full"
# Says nothing about the service: the caller left, or asked for what cannot be done.
NOT_COUNTED = "cancelled|invalid_request|prompt_too_long"

SECONDS = {"1h": 3600, "6h": 21600, "1d": 86400, "3d": 259200}
WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")
# (long window, short window, burn rate): the short one ends the alert soon after the fault has ended.
FAST = (("1h", "5m", "14.4"), ("6h", "30m", "6"))
SLOW = (("1d", "2h", "3"), ("3d", "6h", "1"))


def linked(text: str, runbooks: str, dashboards: str) -> str:
    """A text of the repository with these two addresses in place of the ones that its links have."""
    for ours, theirs in ((RUNBOOKS, runbooks), (DASHBOARDS, dashboards)):
        text = text.replace(f"{ours}/", f"{theirs.rstrip('/')}/")
    return text


@dataclass(frozen=True, slots=True)
class Slo:
    """`bad` and `all` are rates of requests by model, with `WINDOW` for the window; `budget` is the share that may be
    bad; below `minimum` requests in the long window nothing is said, because one bad request would decide it."""

    name: str  # of the alerts, in CamelCase
    slug: str
    target: str
    budget: str
    bad_share: str
    minimum: int
    fast: str  # severity
    metric: str  # whose absence makes the objective blind
    bad: str
    all: str


def _late(histogram: str, bound: str) -> tuple[str, str]:
    """Rates of observations over a bucket's bound, and of all."""
    count = f"sum by (model) (rate({histogram}_count[WINDOW]))"
    return f'{count}\n            - sum by (model) (rate({histogram}_bucket{{le="{bound}"}}[WINDOW]))', count


SLOS = (
    Slo(
        name="Availability",
        slug="availability",
        target="99.9 % of requests are answered",
        budget="0.001",
        bad_share="of the requests failed or were turned away",
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
        target="99.95 % of answers that began are completed",
        budget="0.0005",
        bad_share="of the answers that began broke off with an error",
        minimum=2000,
        fast="critical",
        metric="serve_app_truncated_requests_total",
        bad="sum by (model) (rate(serve_app_truncated_requests_total[WINDOW]))",
        all="sum by (model) (rate(serve_app_time_to_first_token_seconds_count[WINDOW]))",
    ),
    Slo(
        "TTFT",
        "ttft",
        "99 % of first tokens come within 2 s",
        "0.01",
        "of the requests waited more than 2 s for their first token",
        100,
        "critical",
        "serve_app_time_to_first_token_seconds_count",
        *_late("serve_app_time_to_first_token_seconds", "2.0"),
    ),
    # The next two are parts of the first token's delay or show beside it: they never wake anybody on their own.
    Slo(
        "TPOT",
        "tpot",
        "99 % of answers take at most 50 ms a token",
        "0.01",
        "of the answers took more than 50 ms a token",
        100,
        "warning",
        "serve_app_time_per_output_token_seconds_count",
        *_late("serve_app_time_per_output_token_seconds", "0.05"),
    ),
    Slo(
        "QueueWait",
        "queue-wait",
        "99 % of requests begin within 1 s",
        "0.01",
        "of the requests waited more than 1 s for the model to begin",
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
          runbook_url: {RUNBOOKS}/{slo.name}Slo.md
          dashboard_url: {DASHBOARDS}/serve-app-slo?var-model={{{{ $labels.model }}}}
"""


def _alerts(slo: Slo) -> Iterator[str]:
    speeds = (
        ("Fast", FAST, slo.fast, "At this rate the 30 days' budget is gone within days"),
        ("Slow", SLOW, "warning", "At this rate the budget does not last for its 30 days"),
    )
    for speed, pairs, severity, outlook in speeds:
        yield f"""\
      - alert: {slo.name}BudgetBurns{speed}
        labels: {{severity: {severity}, symptom: {slo.slug}}}
        expr: |-
          {_burning(slo, pairs)}
        annotations:
          summary: "{{{{ $labels.model }}}} is missing its objective: {slo.target}"
          description: >-
            {{{{ $value | humanizePercentage }}}} {slo.bad_share}.
            {outlook}.
{_links(slo)}"""
    yield f"""\
      - alert: {slo.name}DataMissing
        # The engine makes tokens, and what this objective is measured by does not come.
        labels: {{severity: warning, symptom: monitoring}}
        expr: |-
          sum by (model) (increase(serve_app_engine_generated_tokens_total[15m])) > 100
          unless on (model) count by (model) (last_over_time({slo.metric}[15m]))
        for: 15m
        annotations:
          summary: "{{{{ $labels.model }}}}: nobody can tell whether {slo.target}"
          description: >-
            The engine made {{{{ $value | humanize }}}} tokens in 15 minutes without a sample of
            {slo.metric}. The alerts of this objective cannot fire.
{_links(slo)}"""


def text() -> str:
    """rules/slo.yml."""
    parts = ["# Generated by `python -m alerts rules` from the table in alerts/slo.py.\n\ngroups:\n"]
    for slo in SLOS:
        parts += [f"  - name: slo-{slo.slug}\n    rules:\n", *_recorded(slo), *_alerts(slo)]
    return "".join(parts)
