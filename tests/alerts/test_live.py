"""Faults of a real service: which receivers are notified, when, and with which text.

Prometheus, Alertmanager, the rules and the routes are those of `make monitor`, with the shipped timing. live.py makes
the faults.
"""

from __future__ import annotations

import pytest

from alerts.settings import DEAD_MAN_SILENCE_S
from tests.alerts.live import HEALTHY, VICTIM, ModelOutage, ServiceOutage

pytestmark = [pytest.mark.system, pytest.mark.ci, pytest.mark.timeout(720)]

PROMISED_S = 150
DEAD_MAN_S = 180
REPAIRED_S = 360


def test_killed_replicas_page_within_150_s(model_outage: ModelOutage) -> None:
    fired = model_outage.fired
    print("after the kill:", {name: round(seconds, 1) for name, seconds in fired.after_s.items()})
    assert fired.last_s <= PROMISED_S
    payload = fired.page["payload"]
    summary = f"[FIRING:1] NoReadyReplicas ({VICTIM}): {VICTIM} has no ready replica"
    assert payload["summary"] == summary
    assert (payload["severity"], payload["source"], payload["component"]) == ("critical", VICTIM, VICTIM)
    description = "It has had 0 ready replicas for 1 minute. Its requests get status 503."
    assert payload["custom_details"]["description"] == description
    assert fired.page["routing_key"] == "0123456789abcdef0123456789abcdef"
    assert fired.page["links"] == [
        {"href": "https://llm.test/runbooks/NoReadyReplicas.md", "text": "Runbook"},
        {"href": f"https://llm.test/d/serve-app-llm?var-model={VICTIM}", "text": "Dashboard"},
    ]
    (attachment,) = fired.slack["attachments"]
    assert fired.slack["channel"] == "#pages"
    assert attachment["color"] == "danger"
    assert description in attachment["text"]
    assert "<https://llm.test/runbooks/NoReadyReplicas.md|Runbook>" in attachment["text"]
    assert fired.email.subject == summary
    assert fired.email.recipients == ["team@llm.test", "lead@llm.test"]
    assert description in fired.email.text
    assert "runbook: https://llm.test/runbooks/NoReadyReplicas.md" in fired.email.text


def test_nothing_else_pages(model_outage: ModelOutage) -> None:
    """Rejected requests of the victim may page, and those of the model whose queue the load of watched.py fills."""
    expected = {("NoReadyReplicas", VICTIM), ("ErrorRateVeryHigh", VICTIM), ("ErrorRateVeryHigh", "narrow")}
    assert model_outage.pages <= expected
    (healthy,) = (one for one in model_outage.ready["models"] if one["name"] == HEALTHY)
    assert healthy["state"] == "ready"
    # The rules expect status 6 for a healthy deployment and a lower number for a failing one.
    print("Ray's status of deployments:", model_outage.ray)
    assert model_outage.ray[f"model-{VICTIM}"] < 6
    assert model_outage.ray[f"model-{HEALTHY}"] == model_outage.ray["Ingress"] == 6


def test_all_receivers_are_notified_of_the_repair(model_outage: ModelOutage) -> None:
    resolved = model_outage.resolved
    print("after the repair:", {name: round(seconds, 1) for name, seconds in resolved.after_s.items()})
    assert resolved.last_s <= REPAIRED_S
    assert resolved.page["dedup_key"] == model_outage.fired.page["dedup_key"]
    assert resolved.slack["attachments"][0]["color"] == "good"
    assert f"[RESOLVED] NoReadyReplicas ({VICTIM})" in resolved.email.subject
    assert "NoReadyReplicas" not in model_outage.firing_at_the_end
    assert "Watchdog" in model_outage.firing_at_the_end


def test_the_dashboard_shows_mttd_and_mttr(model_outage: ModelOutage) -> None:
    """The times start when the rule fires, so they do not contain the scrape, the evaluation and the `for` of one
    minute."""
    print(f"on the dashboard: MTTD {model_outage.mttd_s}, MTTR {model_outage.mttr_s}")
    (incident,) = (one for one in model_outage.history if one["alertname"] == "NoReadyReplicas")
    assert incident["status"] == "resolved"
    assert 10 <= incident["detection_seconds"] <= model_outage.fired.last_s - 60
    pages = [one for one in model_outage.history if one["severity"] == "critical"]
    for panel, key in ((model_outage.mttd_s, "detection_seconds"), (model_outage.mttr_s, "resolution_seconds")):
        values = [one[key] for one in pages if one[key] is not None]
        assert min(values) - 0.01 <= panel["critical"] <= max(values) + 0.01


def test_a_service_that_does_not_answer_pages_within_150_s(service_outage: ServiceOutage) -> None:
    fired = service_outage.fired
    print("after the address closed:", {name: round(seconds, 1) for name, seconds in fired.after_s.items()})
    assert fired.last_s <= PROMISED_S
    assert fired.page["payload"]["summary"] == "[FIRING:1] ServiceDown: The service does not answer"
    description = fired.page["payload"]["custom_details"]["description"]
    assert description == "0 addresses of the service answer GET /metrics."
    assert "[FIRING:1] ServiceDown" in fired.slack["attachments"][0]["title"]
    assert service_outage.pages == {("ServiceDown", "")}


def test_the_dead_mans_switch_raises_an_alarm_when_prometheus_hangs(service_outage: ServiceOutage) -> None:
    alarm_s = service_outage.alarm_s
    print(f"after Prometheus stopped: alarm in {alarm_s:.1f} s")
    assert alarm_s + 30 > DEAD_MAN_SILENCE_S, "the last message arrived more than 30 s before Prometheus stopped"
    assert alarm_s <= DEAD_MAN_S
