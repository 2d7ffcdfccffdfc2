"""Alerts: which there are, which there were, how soon they were told and over, and whether all of it works."""

from __future__ import annotations

from alerts.dashboards.panels import Board, Panel
from alerts.dashboards.promql import bound

PEOPLE = 'severity!="none"'  # and not the Watchdog, which is for Alertmanager
TOLD = 'alerts_received_total{status="firing"}'
SEVERITIES = ("critical", "warning", "info")
YES_NO = {0: ("no", "red"), 1: ("yes", "green")}
MONITORING = ("ScrapeTargetDown", "ScrapeJobMissing")


def _since(counter: str, by: str, offset: str = "$__range") -> str:
    """What came to the history's counters. They begin at what its database holds, so a difference misses none, where
    `increase` would miss the first of each name."""
    now = f"sum by ({by}) ({counter})"
    return f"({now} - (sum by ({by}) ({counter} offset {offset}) or 0 * {now}))"


def _mean(histogram: str, offset: str = "$__range") -> str:
    parts = (_since(f"{histogram}_{part}", "severity", offset) for part in ("sum", "count"))
    return "{} / ({} > 0)".format(*parts)


NOW = (
    *(
        Panel(
            f"Firing: {severity}",
            {
                "critical": "Somebody is paged for each of these. Take the runbook of the one that began first.",
                "warning": "Told in business hours. Read the oldest first; a page often has its cause among them.",
                "info": "Told once a day. Many of one name ask for another threshold.",
            }[severity],
            "short",
            ((f'count(ALERTS{{alertstate="firing", severity="{severity}"}}) or vector(0)', severity),),
            "stat",
            bounds=(1,),
            width=4,
        )
        for severity in SEVERITIES
    ),
    Panel(
        "Pending",
        "Alerts whose condition holds and whose waiting time does not yet: what may fire next.",
        "short",
        ((f'count(ALERTS{{alertstate="pending", {PEOPLE}}}) or vector(0)', "pending"),),
        "stat",
        width=4,
    ),
    Panel(
        "MTTD",
        "Mean time from an alert's firing to its first notification, in the range above. Minutes: look at group_wait "
        "and at Alertmanager's queue.",
        "s",
        ((_mean("alert_detection_seconds"), "{{severity}}"),),
        "stat",
        bounds=(150,),
        alerts=("NotificationsFail",),
        width=4,
    ),
    Panel(
        "MTTR",
        "Mean time from an alert's firing to its end, of those that ended in the range above. Growing: runbooks are "
        "not followed, or do not help.",
        "s",
        ((_mean("alert_resolution_seconds"), "{{severity}}"),),
        "stat",
        width=4,
    ),
    Panel(
        "Active alerts",
        "All that fire, with their labels. The name leads to alerts/runbooks; silences are made in Alertmanager.",
        "short",
        ((f'ALERTS{{alertstate="firing", {PEOPLE}}}', ""),),
        "table",
        width=24,
    ),
)

HISTORY = (
    Panel(
        "Alerts over time",
        "How many fired, by name. A name that comes and goes flaps: its threshold or its cause needs work.",
        "short",
        ((f'count by (alertname, severity) (ALERTS{{alertstate="firing", {PEOPLE}}})', "{{severity}} {{alertname}}"),),
        width=12,
        stacked=True,
    ),
    Panel(
        "Told in a day, by severity",
        "Alerts that began, in the 24 hours before each instant. A growing line is a service that degrades, or noise.",
        "short",
        ((_since(TOLD, "severity", "1d"), "{{severity}}"),),
        width=12,
    ),
    Panel(
        "Told most",
        "Alerts that began in the range above, by name. The first in the list deserves an hour of work.",
        "short",
        ((f"topk(10, {_since(TOLD, 'alertname')})", "{{alertname}}"),),
        "table",
    ),
    Panel(
        "MTTD over time",
        "Mean time to the first notification, of the 24 hours before each instant. The whole chain promises 150 s, "
        "from the fault itself.",
        "s",
        ((_mean("alert_detection_seconds", "1d"), "{{severity}}"),),
        bounds=(150,),
    ),
    Panel(
        "MTTR over time",
        "Mean time from firing to the end, of the 24 hours before each instant.",
        "s",
        ((_mean("alert_resolution_seconds", "1d"), "{{severity}}"),),
    ),
    Panel(
        "Detection, share within a minute",
        "Share of the alerts told within 60 s of their firing, of all that the history holds.",
        "percentunit",
        (
            (
                'sum(alert_detection_seconds_bucket{le="60.0"}) / (sum(alert_detection_seconds_count) > 0)',
                "within a minute",
            ),
        ),
        full=1,
        width=12,
    ),
    Panel(
        "Resolution, share within an hour",
        "Share of the alerts that were over within an hour, of all that the history holds.",
        "percentunit",
        (
            (
                'sum(alert_resolution_seconds_bucket{le="3600.0"}) / (sum(alert_resolution_seconds_count) > 0)',
                "within an hour",
            ),
        ),
        full=1,
        width=12,
    ),
)

CHAIN = (
    Panel(
        "Watchdog",
        "The alert that always fires. A gap: rules were not evaluated, and the dead-man's switch should have rung.",
        "short",
        (('max(ALERTS{alertname="Watchdog", alertstate="firing"})', "Watchdog"),),
        "states",
        alerts=("Watchdog",),
        words=YES_NO,
    ),
    Panel(
        "Alertmanagers known",
        "How many Prometheus sends to. Below 1 no alert reaches anybody.",
        "short",
        (("max by (instance) (prometheus_notifications_alertmanagers_discovered)", "{{instance}}"),),
        bounds=(1,),
        low=True,
        alerts=("AlertmanagerUnreachable",),
    ),
    Panel(
        "Sent by Prometheus",
        "Alerts sent to Alertmanager a second, those dropped and those that failed. Dropped and failed ones are lost.",
        "ops",
        (
            ("sum by (instance) (rate(prometheus_notifications_sent_total[$__rate_interval]))", "{{instance}} sent"),
            (
                "sum by (instance) (rate(prometheus_notifications_dropped_total[$__rate_interval]))",
                "{{instance}} dropped",
            ),
            (
                "sum by (instance) (rate(prometheus_notifications_errors_total[$__rate_interval]))",
                "{{instance}} failed",
            ),
        ),
        alerts=("AlertmanagerUnreachable",),
    ),
    Panel(
        "Notifications",
        "What Alertmanager told, by the way it went.",
        "ops",
        (("sum by (integration) (rate(alertmanager_notifications_total[$__rate_interval]))", "{{integration}}"),),
        stacked=True,
    ),
    Panel(
        "Notifications that failed",
        "Share of the notifications that did not get out. Another way still works: use that meanwhile.",
        "percentunit",
        (
            (
                "sum by (integration) (rate(alertmanager_notifications_failed_total[$__rate_interval]))"
                " / (sum by (integration) (rate(alertmanager_notifications_total[$__rate_interval])) > 0)",
                "{{integration}}",
            ),
        ),
        bounds=(bound("NotificationsFail"),),
        alerts=("NotificationsFail",),
        full=1,
    ),
    Panel(
        "Time of a notification",
        "How long a receiver takes to take one. Seconds: it is slow, and others in its group wait.",
        "s",
        (
            (
                "histogram_quantile(0.9, sum by (le, integration) "
                "(rate(alertmanager_notification_latency_seconds_bucket[$__rate_interval])))",
                "{{integration}} p90",
            ),
        ),
        alerts=("NotificationsFail",),
    ),
    Panel(
        "Scraped",
        "Whether each target answered. What is red is blind: its alerts cannot fire, and panels end there.",
        "short",
        (("up", "{{job}} {{instance}}"),),
        "states",
        alerts=(*MONITORING, "ServiceDown"),
        words=YES_NO,
    ),
    Panel(
        "Time of a scrape",
        "How long targets take. Near the interval, samples are lost: too many series, or a machine without reserve.",
        "s",
        (("max by (job, instance) (scrape_duration_seconds)", "{{job}} {{instance}}"),),
        alerts=("ScrapeTargetDown",),
    ),
    Panel(
        "Samples a scrape",
        "How many series each target has. A jump is a label whose values nobody bounds.",
        "short",
        (("max by (job, instance) (scrape_samples_scraped)", "{{job}} {{instance}}"),),
    ),
    Panel(
        "Rules: time of an evaluation",
        "Time that each group took last, beside how often it is to run. Longer than that, alerts come late.",
        "s",
        (
            ("max by (rule_group) (prometheus_rule_group_last_duration_seconds)", "{{rule_group}}"),
            ("min(prometheus_rule_group_interval_seconds)", "interval"),
        ),
        alerts=("RulesFail",),
    ),
    Panel(
        "Rules that failed or were late",
        "Evaluations that failed, and rounds that were left out, in 10 minutes. Either makes alerts silent.",
        "short",
        (
            ("sum by (rule_group) (increase(prometheus_rule_evaluation_failures_total[10m]))", "{{rule_group}} failed"),
            (
                "sum by (rule_group) (increase(prometheus_rule_group_iterations_missed_total[10m]))",
                "{{rule_group}} missed",
            ),
        ),
        alerts=("RulesFail",),
    ),
    Panel(
        "Configuration taken",
        "Whether the last reload was accepted. No: it still runs with the old one, and new alerts are not there.",
        "short",
        (
            ("max by (instance) (prometheus_config_last_reload_successful)", "Prometheus {{instance}}"),
            ("max by (instance) (alertmanager_config_last_reload_successful)", "Alertmanager {{instance}}"),
        ),
        "states",
        alerts=("ConfigNotReloaded",),
        words=YES_NO,
    ),
)

BOARD = Board(
    uid="serve-app-alerting",
    title="serve_app: alerting",
    description="Active alerts, their history, how soon they are told and over, and whether the chain itself works.",
    rows={"Now": NOW, "History": HISTORY, "The chain": CHAIN},
    since="now-24h",
)
