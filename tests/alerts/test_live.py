"""A real outage, of a real service, by real signals: who is told, when, and of what.

Prometheus, Alertmanager, the rules and the routes are what `make monitor` starts, windows and waits included. It takes
some five minutes, nearly all of it waiting; both stories run at the same time, once, and the tests look at them.
"""

from __future__ import annotations

import pytest

from alerts.settings import DEAD_MAN_SILENCE_S
from tests.alerts.live import VICTIM, Story, both

pytestmark = [pytest.mark.system, pytest.mark.timeout(720)]

PROMISED_S = 150
DEAD_MAN_S = 180
REPAIRED_S = 360


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Story, Story]:
    return both(tmp_path_factory.mktemp("live"))


@pytest.fixture
def model(stories: tuple[Story, Story]) -> Story:
    return stories[0]


@pytest.fixture
def service(stories: tuple[Story, Story]) -> Story:
    return stories[1]


def test_killed_replicas_page_within_150_s(model: Story) -> None:
    fired = model.fired
    print("after the kill:", {name: round(seconds, 1) for name, seconds in fired.after_s.items()})
    assert fired.last_s <= PROMISED_S
    payload = fired.page["payload"]
    summary = f"[FIRING:1] NoReadyReplicas ({VICTIM}): {VICTIM} has no replica that can answer"
    assert payload["summary"] == summary
    assert (payload["severity"], payload["source"], payload["component"]) == ("critical", VICTIM, VICTIM)
    said = "0 of its replicas have been ready for a minute. Its callers get 503."
    assert payload["custom_details"]["description"] == said
    assert fired.page["routing_key"] == "0123456789abcdef0123456789abcdef"
    assert fired.page["links"] == [
        {"href": "https://llm.test/runbooks/NoReadyReplicas.md", "text": "Runbook"},
        {"href": f"https://llm.test/d/serve-app-llm?var-model={VICTIM}", "text": "Dashboard"},
    ]
    (attachment,) = fired.slack["attachments"]
    assert fired.slack["channel"] == "#pages"
    assert attachment["color"] == "danger"
    assert said in attachment["text"]
    assert "<https://llm.test/runbooks/NoReadyReplicas.md|Runbook>" in attachment["text"]
    assert fired.letter is not None
    assert fired.letter.subject == summary
    assert fired.letter.recipients == ["team@llm.test", "lead@llm.test"]
    assert said in fired.letter.text
    assert "runbook: https://llm.test/runbooks/NoReadyReplicas.md" in fired.letter.text


def test_nobody_is_paged_for_what_is_well(model: Story) -> None:
    """The errors of those who were turned away may page as well, but nothing else may, and no other model."""
    assert set(model.others) <= {"ErrorRateVeryHigh"}
    (other,) = (one for one in model.ready["models"] if one["name"] == "other")
    assert other["state"] == "ready"
    # As the rules have it: 6 is healthy, and below it is what they look for.
    print("Ray's status of deployments:", model.ray)
    assert model.ray[f"model-{VICTIM}"] < 6
    assert model.ray["model-other"] == model.ray["Ingress"] == model.ray["Hub"] == 6


def test_all_three_are_told_of_the_repair(model: Story) -> None:
    resolved = model.resolved
    assert resolved is not None
    print("after the repair:", {name: round(seconds, 1) for name, seconds in resolved.after_s.items()})
    assert resolved.last_s <= REPAIRED_S
    assert resolved.page["dedup_key"] == model.fired.page["dedup_key"]
    assert resolved.slack["attachments"][0]["color"] == "good"
    assert resolved.letter is not None
    assert f"[RESOLVED] NoReadyReplicas ({VICTIM})" in resolved.letter.subject
    assert "NoReadyReplicas" not in model.firing_at_the_end
    assert "Watchdog" in model.firing_at_the_end


def test_the_dashboards_panels_know_mttd_and_mttr(model: Story) -> None:
    """From the instant at which the rule fired, so that scrape, evaluation and the rule's minute are not in it."""
    print(f"on the dashboard: MTTD {model.mttd_s}, MTTR {model.mttr_s}")
    (incident,) = (one for one in model.history if one["alertname"] == "NoReadyReplicas")
    assert incident["status"] == "resolved"
    assert 10 <= incident["detection_seconds"] <= model.fired.last_s - 60
    pages = [one for one in model.history if one["severity"] == "critical"]
    for panel, key in ((model.mttd_s, "detection_seconds"), (model.mttr_s, "resolution_seconds")):
        values = [one[key] for one in pages if one[key] is not None]
        assert min(values) - 0.01 <= panel["critical"] <= max(values) + 0.01


def test_a_service_whose_only_replicas_are_killed_pages_within_150_s(service: Story) -> None:
    fired = service.fired
    print("after the kill:", {name: round(seconds, 1) for name, seconds in fired.after_s.items()})
    assert fired.last_s <= PROMISED_S
    assert fired.page["payload"]["summary"] == "[FIRING:1] ServiceDown: The service does not answer"
    description = fired.page["payload"]["custom_details"]["description"]
    assert description == "0 of the service's addresses answer GET /metrics."
    assert "[FIRING:1] ServiceDown" in fired.slack["attachments"][0]["title"]
    assert service.others == []


def test_a_prometheus_that_hangs_is_told_by_the_dead_mans_switch(service: Story) -> None:
    alarm = service.alarm_s
    assert alarm is not None
    print(f"after Prometheus stopped: alarm in {alarm:.1f} s")
    assert alarm + 30 > DEAD_MAN_SILENCE_S, "it cannot have heard of Prometheus' end before its last message"
    assert alarm <= DEAD_MAN_S
