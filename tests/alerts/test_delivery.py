"""The notifications of a real Alertmanager with the rendered configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.alerts.receivers import AlertingStack, Email, Json, alert, alerting_stack, closed_business_hours, until

pytestmark = pytest.mark.system

ANNOTATIONS = {
    "summary": "First tokens take 6.2 s",
    "description": "p99 over 5 minutes is 6.2 s & above 5 s.",
    "runbook_url": "https://llm.test/runbooks/HighTTFT.md",
    "dashboard_url": "https://llm.test/d/llm",
}


async def test_a_critical_alert_goes_to_pagerduty_slack_email_and_the_history(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        firing = alert("HighTTFT", "critical", ANNOTATIONS, model="smollm2", cluster="a", instance="10.0.0.7:8000")
        await stack.fire(firing)
        (page,) = await until(lambda: stack.webhooks.pages, "the page")
        (post,) = await until(lambda: stack.webhooks.slack_critical, "Slack")
        (note,) = await until(lambda: stack.webhooks.history, "the history")
        (email,) = await until(lambda: stack.mail.emails, "the email")
        assert page["routing_key"] == "0123456789abcdef0123456789abcdef"
        assert page["event_action"] == "trigger"
        assert page["client"] == "serve_app alerts"
        assert page["client_url"] == "http://alerts.llm.test"
        assert page["links"] == [
            {"href": "https://llm.test/runbooks/HighTTFT.md", "text": "Runbook"},
            {"href": "https://llm.test/d/llm", "text": "Dashboard"},
        ]
        payload = page["payload"]
        assert payload["summary"] == "[FIRING:1] HighTTFT (smollm2): First tokens take 6.2 s"
        assert payload["severity"] == "critical"
        assert payload["source"] == "10.0.0.7:8000"
        assert (payload["class"], payload["component"], payload["group"]) == ("HighTTFT", "smollm2", "a")
        details = payload["custom_details"]
        assert details["summary"] == "First tokens take 6.2 s"
        assert details["description"] == "p99 over 5 minutes is 6.2 s & above 5 s."
        assert "labels: alertname=HighTTFT cluster=a instance=10.0.0.7:8000 model=smollm2" in details["firing"]
        assert details["resolved"].strip() == ""
        (attachment,) = post["attachments"]
        assert post["channel"] == "#pages"
        assert attachment["title"] == attachment["fallback"] == "[FIRING:1] HighTTFT (smollm2)"
        assert attachment["title_link"] == "http://alerts.llm.test"
        assert attachment["color"] == "danger"
        assert "*firing: First tokens take 6.2 s*\np99 over 5 minutes is 6.2 s &amp; above 5 s." in attachment["text"]
        assert "<https://llm.test/runbooks/HighTTFT.md|Runbook>" in attachment["text"]
        assert "<https://llm.test/d/llm|Dashboard>" in attachment["text"]
        assert [one["labels"]["alertname"] for one in note["alerts"]] == ["HighTTFT"]
        assert email.recipients == ["team@llm.test", "lead@llm.test"]
        assert email.subject == "[FIRING:1] HighTTFT (smollm2): First tokens take 6.2 s"
        assert "HighTTFT (critical): First tokens take 6.2 s\np99 over 5 minutes is 6.2 s & above 5 s." in email.text
        assert "runbook: https://llm.test/runbooks/HighTTFT.md" in email.text
        (token,) = {post.authorization for post in stack.webhooks.posts if post.path == "/history"}
        assert token == "Bearer history-secret"

        await stack.resolve(firing)
        await until(
            lambda: len(stack.webhooks.pages) == len(stack.webhooks.slack_critical) == len(stack.webhooks.history) == 2,
            "the end",
        )
        await until(lambda: len(stack.mail.emails) == 2, "the email of the end")
        assert stack.webhooks.pages[1]["event_action"] == "resolve"
        assert stack.webhooks.pages[1]["dedup_key"] == page["dedup_key"]
        (attachment,) = stack.webhooks.slack_critical[1]["attachments"]
        assert attachment["title"] == "[RESOLVED] HighTTFT (smollm2)"
        assert attachment["color"] == "good"
        assert stack.webhooks.history[1]["alerts"][0]["status"] == "resolved"
        assert stack.mail.emails[1].subject.startswith("[RESOLVED] HighTTFT (smollm2)")
        assert stack.webhooks.slack_warning == []


async def test_a_warning_goes_to_slack_and_email_and_does_not_page(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        firing = alert("HighTTFT", "warning", ANNOTATIONS, model="smollm2")
        await stack.fire(firing)
        (post,) = await until(lambda: stack.webhooks.slack_warning, "Slack")
        (email,) = await until(lambda: stack.mail.emails, "the email")
        assert post["channel"] == "#warnings"
        assert post["attachments"][0]["color"] == "warning"
        assert email.recipients == ["team@llm.test", "lead@llm.test"]
        assert email.message["From"] == "alerts@llm.test"
        assert email.subject == "[FIRING:1] HighTTFT (smollm2): First tokens take 6.2 s"
        assert "HighTTFT (warning): First tokens take 6.2 s\np99 over 5 minutes is 6.2 s & above 5 s." in email.text
        assert "runbook: https://llm.test/runbooks/HighTTFT.md" in email.text
        assert email.message.get_body(("html",)) is None

        await stack.resolve(firing)
        await until(lambda: len(stack.webhooks.slack_warning) == len(stack.mail.emails) == 2, "the end")
        assert stack.mail.emails[1].subject.startswith("[RESOLVED] HighTTFT")
        assert stack.webhooks.pages == stack.webhooks.slack_critical == []
        assert stack.mail.refused == 0


async def test_outside_business_hours_only_warnings_are_delayed(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path, business_hours=closed_business_hours()) as stack:
        warning = alert("HighTTFT", "warning", model="a")
        await stack.fire(warning, alert("HighTTFT", "critical", model="b"), alert("Started", "info"))
        await until(lambda: stack.webhooks.pages, "the page")
        await until(lambda: len(stack.mail.emails) == 2, "the digest and the email of the critical alert")
        await until(lambda: len(stack.webhooks.history) == 3, "all three in the history")
        await stack.resolve(warning)
        await until(lambda: len(stack.webhooks.history) == 4, "the end of the warning in the history")
        assert stack.webhooks.slack_warning == []
        assert sorted(email.recipients for email in stack.mail.emails) == [
            ["digest@llm.test"],
            ["team@llm.test", "lead@llm.test"],
        ]
        assert warnings(stack) == []


async def test_an_unknown_severity_is_sent_at_any_hour(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path, business_hours=closed_business_hours()) as stack:
        await stack.fire(alert("Misspelt", "Critical"), alert("Forgotten", None), alert("ForAlertmanager", "none"))
        await until(lambda: len(stack.webhooks.slack_warning) == len(stack.mail.emails) == 2, "both alerts")
        assert sorted(title(post) for post in stack.webhooks.slack_warning) == [
            "[FIRING:1] Forgotten",
            "[FIRING:1] Misspelt",
        ]


async def test_info_alerts_arrive_in_one_email(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        infos = [alert("Scaled", "info", {"summary": "Two replicas"}, model=model) for model in ("a", "b")]
        await stack.fire(*infos, alert("IdleGPU", "info", {"summary": "Nothing to do"}, gpu="0"))
        (email,) = await until(lambda: stack.mail.emails, "the email")
        assert email.subject == "Digest: 3 firing, 0 resolved"
        assert email.recipients == ["digest@llm.test"]
        assert email.text.count("Scaled (info): Two replicas") == 2
        assert "IdleGPU (info): Nothing to do" in email.text
        assert stack.webhooks.slack_warning == stack.webhooks.slack_critical == stack.webhooks.pages == []


async def test_alerts_with_the_same_name_and_model_are_grouped(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        replicas = [alert("EngineStalled", "critical", model="a", replica=f"r{number}") for number in range(3)]
        await stack.fire(*replicas, alert("EngineStalled", "critical", model="b", replica="r9"))
        await until(
            lambda: len(stack.webhooks.pages) == len(stack.webhooks.slack_critical) == 2, "a page for each model"
        )
        assert sorted(map(title, stack.webhooks.slack_critical)) == [
            "[FIRING:1] EngineStalled (b)",
            "[FIRING:3] EngineStalled (a)",
        ]
        (three,) = (page for page in stack.webhooks.pages if page["payload"]["component"] == "a")
        assert all(f"replica=r{number}" in three["payload"]["custom_details"]["firing"] for number in range(3))


async def test_a_more_severe_alert_suppresses_a_less_severe_one(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        await stack.fire(
            alert("HighTTFT", "critical", model="a", cluster="x"),
            alert("TTFTBurnFast", "critical", model="a", cluster="x", symptom="ttft"),
        )
        await until(lambda: len(stack.webhooks.pages) == 2, "the pages")
        suppressed = [
            alert("HighTTFT", "warning", model="a", cluster="x"),
            alert("TTFTBurnSlow", "warning", model="a", cluster="x", symptom="ttft"),
        ]
        await stack.fire(alert("NotificationsFail", "critical", cluster="x", symptom="monitoring"))
        others = [
            alert("RulesFail", "warning", cluster="x", symptom="monitoring"),  # never suppressed
            alert("HighTTFT", "warning", model="b", cluster="x"),  # another model
            alert("HighTTFT", "warning", model="a", cluster="y"),  # another cluster
            alert("HighQueueWait", "warning", model="a", cluster="x"),  # another subject, without a symptom
            alert("TPOTBurnSlow", "warning", model="a", cluster="x", symptom="tpot"),  # another objective
        ]
        await stack.fire(*suppressed, *others)
        await until(
            lambda: len(stack.webhooks.slack_warning) == len(warnings(stack)) == 5, "the alerts that are not suppressed"
        )
        await stack.resolve(*others)  # one group_interval later, so the suppressed alerts would have been sent
        await until(lambda: len(stack.webhooks.slack_warning) == len(warnings(stack)) == 10, "their end")
        states = await stack.states()
        assert states["HighTTFT warning a"] == states["TTFTBurnSlow warning a"] == "suppressed"
        titles = {title(post).split(maxsplit=1)[1] for post in stack.webhooks.slack_warning}
        assert titles == {"HighTTFT (a)", "HighTTFT (b)", "HighQueueWait (a)", "TPOTBurnSlow (a)", "RulesFail"}
        assert clusters(stack, "HighTTFT (a)") == {"y"}


async def test_a_warning_suppresses_an_info_alert(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        await stack.fire(alert("DiskNearFull", "warning"))
        await until(lambda: stack.webhooks.slack_warning, "the warning")
        await stack.fire(alert("DiskNearFull", "info"), alert("Scaled", "info"))
        await until(lambda: any("Digest" in email.subject for email in stack.mail.emails), "the digest")
        (digest,) = (email for email in stack.mail.emails if "Digest" in email.subject)
        assert digest.subject == "Digest: 1 firing, 0 resolved"


async def test_service_down_suppresses_other_alerts_but_not_possible_causes(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        down = alert("ServiceDown", "critical", cluster="x", job="serve_app")
        await stack.fire(down)
        await until(lambda: stack.webhooks.pages, "the page")
        rest = [
            alert("HighErrorRate", "critical", cluster="x", model="a", symptom="errors"),
            alert("HighTTFT", "warning", cluster="x", symptom="latency"),
        ]
        sent = [
            alert("NodeLost", "critical", cluster="x", symptom="replicas"),
            alert("HighErrorRate", "critical", cluster="y", symptom="errors"),
            alert("OtherService", "critical", cluster="x"),
        ]
        await stack.fire(*rest, *sent, alert("Watchdog", "none", cluster="x"))
        await until(
            lambda: len(stack.webhooks.pages) == 4, "the possible cause, the other cluster and the other service"
        )
        await until(lambda: stack.webhooks.at("/dead-man"), "the dead man's switch")
        assert (await stack.states())["HighErrorRate critical a"] == "suppressed"
        await stack.resolve(down)
        await until(lambda: len(stack.webhooks.pages) == 6, "the remaining alert and the end of ServiceDown")
        names = sorted(page["payload"]["class"] for page in stack.webhooks.pages)
        assert names == ["HighErrorRate", "HighErrorRate", "NodeLost", "OtherService", "ServiceDown", "ServiceDown"]


async def test_the_dead_mans_switch_receives_firing_messages_only(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        watchdog = alert("Watchdog", "none")
        await stack.fire(watchdog)
        await until(lambda: len(stack.webhooks.at("/dead-man")) >= 3, "three messages")
        assert {post.authorization for post in stack.webhooks.posts} == {"Bearer dead-man-secret"}
        await stack.resolve(watchdog)
        sentinel = alert("HighTTFT", "critical")
        await stack.fire(sentinel)
        await until(lambda: stack.webhooks.pages, "a page")
        received = len(stack.webhooks.at("/dead-man"))
        await stack.resolve(sentinel)
        await until(lambda: len(stack.webhooks.pages) == 2, "its end, one group_interval later")
        assert len(stack.webhooks.at("/dead-man")) == received
        assert {one["status"] for one in stack.webhooks.at("/dead-man")} == {"firing"}
        assert not any(one["alerts"][0]["labels"]["alertname"] == "Watchdog" for one in stack.webhooks.history)


async def test_labels_cannot_notify_a_slack_channel(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        await stack.fire(alert("Odd", "critical", {"summary": "<!channel> & all"}, model="<!here>"))
        (post,) = await until(lambda: stack.webhooks.slack_critical, "Slack")
        assert title(post) == "[FIRING:1] Odd (&lt;!here&gt;)"
        assert "&lt;!channel&gt; &amp; all" in post["attachments"][0]["text"]
        assert "<!" not in str(post)


async def test_a_notification_shows_at_most_ten_alerts(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        await stack.fire(*(alert("Flapping", "critical", replica=f"r{number:03}") for number in range(100)))
        (page,) = await until(lambda: stack.webhooks.pages, "the page")
        (post,) = await until(lambda: stack.webhooks.slack_critical, "Slack")
        assert page.get("links", []) == []
        assert page["payload"]["source"] == "serve_app"
        for text in (page["payload"]["custom_details"]["firing"], post["attachments"][0]["text"]):
            assert text.count("replica=") == 10
            assert "The first 10 of 100 alerts." in text


async def test_a_failing_receiver_is_retried_and_does_not_delay_others(tmp_path: Path) -> None:
    async with alerting_stack(tmp_path) as stack:
        stack.webhooks.failing |= {"/history", "/slack/critical"}
        await stack.fire(alert("HighTTFT", "critical"))
        await until(lambda: stack.webhooks.pages, "the page")
        await until(lambda: len(stack.webhooks.history) >= 2 and len(stack.webhooks.slack_critical) >= 2, "retries")
        stack.webhooks.failing.clear()
        tries = len(stack.webhooks.history)
        await until(lambda: len(stack.webhooks.history) > tries, "delivery")
        assert len(stack.webhooks.pages) == 1


def title(post: Json) -> str:
    return str(post["attachments"][0]["title"])


def warnings(stack: AlertingStack) -> list[Email]:
    return [email for email in stack.mail.emails if "(warning): " in email.text or "(warning)\n" in email.text]


def clusters(stack: AlertingStack, name: str) -> set[str]:
    texts = [post["attachments"][0]["text"] for post in stack.webhooks.slack_warning if title(post).endswith(name)]
    return {word.removeprefix("cluster=") for text in texts for word in text.split() if word.startswith("cluster=")}
