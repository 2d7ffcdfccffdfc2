"""The objectives of slo.py: where they stand, what is left of their budgets, how fast it goes."""

from __future__ import annotations

from alerts import slo
from alerts.dashboards.panels import Board, Panel, Variable
from alerts.dashboards.promql import MODEL

FACTORS = tuple(sorted(float(factor) for _, _, factor in (*slo.FAST, *slo.SLOW)))
DAYS = 30


def _left(one: slo.Slo) -> str:
    """Of the budget of 30 days, by the requests that there were. The rates are sampled each minute."""
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
            f"{one.name}: kept, 1 day",
            f"Share of the last day's requests that kept it: {one.target}. Below the bound the day cost more than its "
            "part of the budget; the runbook says where to look.",
            "percentunit",
            ((f"1 - slo:sli_error:ratio_rate1d{of}", "{{model}}"),),
            "stat",
            bounds=(round(1 - budget, 6),),
            low=True,
            alerts=burning,
            width=4,
        ),
        Panel(
            f"{one.name}: budget left",
            f"What is left of 30 days' budget, {budget:.2%} of the requests. Below 0 the objective is missed: "
            "put nothing new out until it recovers.",
            "percentunit",
            ((_left(one), "{{model}}"),),
            "stat",
            bounds=(0, 0.25),
            low=True,
            alerts=burning,
            width=4,
        ),
        Panel(
            f"{one.name}: burn rate",
            f"How many times too fast the budget goes, by window. At 1 it lasts for just its {DAYS} days. "
            "Long and short window both above their bound: 14.4 (1h, 5m) or 6 (6h, 30m) is fast, "
            "3 (1d, 2h) or 1 (3d, 6h) slow.",
            "short",
            tuple(
                (f"slo:sli_error:ratio_rate{window}{of} / {one.budget}", f"{{{{model}}}} {window}")
                for window in slo.WINDOWS
            ),
            bounds=(FACTORS[0], FACTORS[-1]),
            alerts=burning,
            width=10,
        ),
        Panel(
            f"{one.name}: requests",
            f"Requests a second that count for it, over an hour. Below {one.minimum} in a long window no alert "
            "judges it, because one bad request would decide.",
            "reqps",
            ((f"slo:requests:rate1h{of}", "{{model}}"),),
            alerts=(f"{one.name}DataMissing",),
            width=6,
        ),
    )


OVERVIEW = (
    Panel(
        "Budget used in a day",
        f"Part of {DAYS} days' budget that the last 24 hours took. {1 / DAYS:.1%} a day is what may be used.",
        "percentunit",
        tuple(
            (
                f'slo:sli_error:ratio_rate1d{{slo="{one.slug}", {MODEL}}} / {one.budget} / {DAYS}',
                "{{model}} " + one.slug,
            )
            for one in slo.SLOS
        ),
        bounds=(round(1 / DAYS, 4),),
        width=12,
    ),
    Panel(
        "Bad requests by objective, 5 minutes",
        "Share of the requests that missed each objective. It moves first: the burn rates below follow.",
        "percentunit",
        ((f"slo:sli_error:ratio_rate5m{{{MODEL}}}", "{{model}} {{slo}}"),),
        width=12,
    ),
)

BOARD = Board(
    uid="serve-app-slo",
    title="serve_app: objectives and error budgets",
    description="; ".join(one.target for one in slo.SLOS) + ".",
    variables=(Variable("model", "Model", "label_values(slo:requests:rate5m, model)"),),
    rows={"All": OVERVIEW, **{f"{one.name}: {one.target}": _row(one) for one in slo.SLOS}},
    since="now-24h",
)
