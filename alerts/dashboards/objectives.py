"""The dashboard of the objectives in slo.py: share of good requests, remaining error budget and burn rates."""

from __future__ import annotations

from alerts import slo
from alerts.dashboards.panels import Dashboard, Panel, Variable
from alerts.dashboards.promql import MODEL

FACTORS = tuple(sorted(float(factor) for _, _, factor in (*slo.FAST, *slo.SLOW)))
DAYS = 30


def _left(one: slo.Slo) -> str:
    """PromQL of the remaining share of the 30-day error budget. The rates are sampled every minute."""
    of = f'{{slo="{one.slug}", {MODEL}}}'
    bad = f"sum_over_time((slo:sli_error:ratio_rate5m{of} * slo:requests:rate5m{of})[{DAYS}d:1m])"
    counted = f"sum_over_time((slo:requests:rate5m{of} > 0)[{DAYS}d:1m])"
    return f"1 - {bad} / {counted} / {one.budget}"


def _row(one: slo.Slo) -> tuple[Panel, ...]:
    of = f'{{slo="{one.slug}", {MODEL}}}'
    burning = tuple(f"{one.name}BudgetBurns{speed}" for speed in ("Fast", "Slow"))
    budget = float(one.budget)
    return (
        Panel(
            f"{one.name}: good requests, 1 day",
            f"Share of the requests in the last day that met the objective: {one.target}. Below the threshold the "
            "day used more than its part of the error budget: see the runbook.",
            "percentunit",
            ((f"1 - slo:sli_error:ratio_rate1d{of}", "{{model}}"),),
            "stat",
            thresholds=(round(1 - budget, 6),),
            low_is_bad=True,
            alerts=burning,
            width=4,
        ),
        Panel(
            f"{one.name}: budget left",
            f"Remaining share of the error budget of 30 days, {budget:.2%} of the requests. Below 0 the objective is "
            "missed: deploy no changes until it recovers.",
            "percentunit",
            ((_left(one), "{{model}}"),),
            "stat",
            thresholds=(0, 0.25),
            low_is_bad=True,
            alerts=burning,
            width=4,
        ),
        Panel(
            f"{one.name}: burn rate",
            f"Error rate divided by the error budget, by window. At 1 the budget lasts exactly {DAYS} days. An alert "
            "fires if the long and the short window are above a threshold: 14.4 (1h, 5m) or 6 (6h, 30m) for a fast "
            "burn, 3 (1d, 2h) or 1 (3d, 6h) for a slow burn.",
            "short",
            tuple(
                (f"slo:sli_error:ratio_rate{window}{of} / {one.budget}", f"{{{{model}}}} {window}")
                for window in slo.WINDOWS
            ),
            thresholds=(FACTORS[0], FACTORS[-1]),
            alerts=burning,
            width=10,
        ),
        Panel(
            f"{one.name}: requests",
            f"Requests per second that count for the objective, over one hour. Below {one.minimum} requests in the "
            "long window no alert fires, because a single bad request would exceed the budget.",
            "reqps",
            ((f"slo:requests:rate1h{of}", "{{model}}"),),
            alerts=(f"{one.name}DataMissing",),
            width=6,
        ),
    )


OVERVIEW = (
    Panel(
        "Budget used in a day",
        f"Share of the error budget of {DAYS} days that the last 24 hours used. {1 / DAYS:.1%} per day is sustainable.",
        "percentunit",
        tuple(
            (
                f'slo:sli_error:ratio_rate1d{{slo="{one.slug}", {MODEL}}} / {one.budget} / {DAYS}',
                "{{model}} " + one.slug,
            )
            for one in slo.SLOS
        ),
        thresholds=(round(1 / DAYS, 4),),
        width=12,
    ),
    Panel(
        "Bad requests by objective, 5 minutes",
        "Share of the requests that missed each objective. The burn rates below follow with a delay.",
        "percentunit",
        ((f"slo:sli_error:ratio_rate5m{{{MODEL}}}", "{{model}} {{slo}}"),),
        width=12,
    ),
)

DASHBOARD = Dashboard(
    uid="serve-app-slo",
    title="serve_app: objectives and error budgets",
    description="; ".join(one.target for one in slo.SLOS) + ".",
    variables=(Variable("model", "Model", "label_values(slo:requests:rate5m, model)"),),
    rows={"All": OVERVIEW, **{f"{one.name}: {one.target}": _row(one) for one in slo.SLOS}},
    since="now-24h",
)
