"""The alerting dashboard: active and past alerts, times to detect and resolve, and the health of the alert delivery."""

from __future__ import annotations

from alerts.dashboards.panels import Dashboard, Panel
from alerts.dashboards.promql import threshold

WITHOUT_WATCHDOG = 'severity!="none"'
RECEIVED = 'alerts_received_total{status="firing"}'
SEVERITIES = ("critical", "warning", "info")
YES_NO = {0: ("no", "red"), 1: ("yes", "green")}
MONITORING = ("ScrapeTargetDown", "ScrapeJobMissing")


def _since(counter: str, by: str, offset: str = "$__range") -> str:
    """PromQL of the increase of a counter of the alert history. The counters start with the stored alerts, so a
    difference is exact, while `increase` would miss the first alert of each name."""
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
                "critical": "Alerts that page. Start with the runbook of the alert that started first.",
                "warning": "Alerts that are sent in business hours. The oldest one is often the cause of a page.",
                "info": "Alerts in the daily digest. If one of them fires often, change its threshold.",
            }[severity],
            "short",
            ((f'count(ALERTS{{alertstate="firing", severity="{severity}"}}) or vector(0)', severity),),
            "stat",
            thresholds=(1,),
            width=4,
        )
        for severity in SEVERITIES
    ),
    Panel(
        "Pending",
        "Alerts whose condition holds but whose `for` time has not passed yet. They may fire next.",
        "short",
        ((f'count(ALERTS{{alertstate="pending", {WITHOUT_WATCHDOG}}}) or vector(0)', "pending"),),
        "stat",
        width=4,
    ),
    Panel(
        "MTTD",
        "Mean time from the firing of an alert to its first notification, in the selected time range. If it takes "
        "minutes, check group_wait and the queue of Alertmanager.",
        "s",
        ((_mean("alert_detection_seconds"), "{{severity}}"),),
        "stat",
        thresholds=(150,),
        alerts=("NotificationsFail",),
        width=4,
    ),
    Panel(
        "MTTR",
        "Mean time from the firing of an alert to its end, for alerts that ended in the selected time range. If it "
        "grows, the runbooks are not followed or do not help.",
        "s",
        ((_mean("alert_resolution_seconds"), "{{severity}}"),),
        "stat",
        width=4,
    ),
    Panel(
        "Active alerts",
        "All firing alerts with their labels. The runbook of an alert has its name or subject; silences are created "
        "in Alertmanager.",
        "short",
        ((f'ALERTS{{alertstate="firing", {WITHOUT_WATCHDOG}}}', ""),),
        "table",
        width=24,
    ),
)

HISTORY = (
    Panel(
        "Alerts over time",
        "Number of firing alerts by name. If an alert starts and ends repeatedly, its threshold or its cause needs "
        "work.",
        "short",
        (
            (
                f'count by (alertname, severity) (ALERTS{{alertstate="firing", {WITHOUT_WATCHDOG}}})',
                "{{severity}} {{alertname}}",
            ),
        ),
        width=12,
        stacked=True,
    ),
    Panel(
        "Alerts per day, by severity",
        "Alerts that started in the 24 hours before each point. A growing line means that the service degrades or "
        "that thresholds are too strict.",
        "short",
        ((_since(RECEIVED, "severity", "1d"), "{{severity}}"),),
        width=12,
    ),
    Panel(
        "Most frequent alerts",
        "Alerts that started in the selected time range, by name. Investigate the first one in the list.",
        "short",
        ((f"topk(10, {_since(RECEIVED, 'alertname')})", "{{alertname}}"),),
        "table",
    ),
    Panel(
        "MTTD over time",
        "Mean time to the first notification, over the 24 hours before each point. The design target is 150 s from "
        "the fault, including the `for` of the rule.",
        "s",
        ((_mean("alert_detection_seconds", "1d"), "{{severity}}"),),
        thresholds=(150,),
    ),
    Panel(
        "MTTR over time",
        "Mean time from firing to the end of an alert, over the 24 hours before each point.",
        "s",
        ((_mean("alert_resolution_seconds", "1d"), "{{severity}}"),),
    ),
    Panel(
        "Share detected within 60 s",
        "Share of all recorded alerts that were notified within 60 s of firing.",
        "percentunit",
        (
            (
                'sum(alert_detection_seconds_bucket{le="60.0"}) / (sum(alert_detection_seconds_count) > 0)',
                "within 60 s",
            ),
        ),
        maximum=1,
        width=12,
    ),
    Panel(
        "Share resolved within 1 hour",
        "Share of all recorded alerts that ended within one hour of firing.",
        "percentunit",
        (
            (
                'sum(alert_resolution_seconds_bucket{le="3600.0"}) / (sum(alert_resolution_seconds_count) > 0)',
                "within 1 hour",
            ),
        ),
        maximum=1,
        width=12,
    ),
)

DELIVERY = (
    Panel(
        "Watchdog",
        "The alert that always fires. A gap means that the rules were not evaluated. The dead man's switch should "
        "have raised an alarm.",
        "short",
        (('max(ALERTS{alertname="Watchdog", alertstate="firing"})', "Watchdog"),),
        "states",
        alerts=("Watchdog",),
        value_names=YES_NO,
    ),
    Panel(
        "Alertmanagers in use",
        "Number of Alertmanagers that Prometheus sends alerts to. Below 1 no alert is delivered.",
        "short",
        (("max by (instance) (prometheus_notifications_alertmanagers_discovered)", "{{instance}}"),),
        thresholds=(1,),
        low_is_bad=True,
        alerts=("AlertmanagerUnreachable",),
    ),
    Panel(
        "Alerts sent by Prometheus",
        "Alerts per second that Prometheus sent to Alertmanager, dropped, or failed to send. Dropped and failed "
        "alerts are lost.",
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
        "Notifications per second that Alertmanager sent, by integration.",
        "ops",
        (("sum by (integration) (rate(alertmanager_notifications_total[$__rate_interval]))", "{{integration}}"),),
        stacked=True,
    ),
    Panel(
        "Failed notifications",
        "Share of the notifications that could not be sent, by integration. Use another integration until it is "
        "repaired.",
        "percentunit",
        (
            (
                "sum by (integration) (rate(alertmanager_notifications_failed_total[$__rate_interval]))"
                " / (sum by (integration) (rate(alertmanager_notifications_total[$__rate_interval])) > 0)",
                "{{integration}}",
            ),
        ),
        thresholds=(threshold("NotificationsFail"),),
        alerts=("NotificationsFail",),
        maximum=1,
    ),
    Panel(
        "Notification latency",
        "90th percentile of the time that a receiver takes to accept a notification. Seconds mean that the receiver "
        "is slow and delays its group.",
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
        "Scrape state",
        "Whether each target answers. Alerts that use the metrics of a red target cannot fire, and panels have a gap.",
        "short",
        (("up", "{{job}} {{instance}}"),),
        "states",
        alerts=(*MONITORING, "ServiceDown"),
        value_names=YES_NO,
    ),
    Panel(
        "Scrape duration",
        "Duration of the scrape of each target. Close to the scrape interval samples are lost: the target has too "
        "many series, or the machine is overloaded.",
        "s",
        (("max by (job, instance) (scrape_duration_seconds)", "{{job}} {{instance}}"),),
        alerts=("ScrapeTargetDown",),
    ),
    Panel(
        "Samples per scrape",
        "Number of samples of each target. A jump means that a label has too many values.",
        "short",
        (("max by (job, instance) (scrape_samples_scraped)", "{{job}} {{instance}}"),),
    ),
    Panel(
        "Rule evaluation time",
        "Duration of the last evaluation of each rule group, and the evaluation interval. If the duration exceeds "
        "the interval, alerts are late.",
        "s",
        (
            ("max by (rule_group) (prometheus_rule_group_last_duration_seconds)", "{{rule_group}}"),
            ("min(prometheus_rule_group_interval_seconds)", "interval"),
        ),
        alerts=("RulesFail",),
    ),
    Panel(
        "Failed and missed rule evaluations",
        "Failed evaluations and skipped rounds in 10 minutes. Both can prevent alerts from firing.",
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
        "Configuration reload successful",
        "Whether the last reload of the configuration succeeded. After a failed reload the old configuration remains"
        " active and new alerts are missing.",
        "short",
        (
            ("max by (instance) (prometheus_config_last_reload_successful)", "Prometheus {{instance}}"),
            ("max by (instance) (alertmanager_config_last_reload_successful)", "Alertmanager {{instance}}"),
        ),
        "states",
        alerts=("ConfigNotReloaded",),
        value_names=YES_NO,
    ),
)

DASHBOARD = Dashboard(
    uid="serve-app-alerting",
    title="serve_app: alerting",
    description="Active alerts, past alerts, times to detect and resolve, and the health of the alert delivery.",
    rows={"Now": NOW, "History": HISTORY, "Delivery": DELIVERY},
    since="now-24h",
)
