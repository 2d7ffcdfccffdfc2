"""What a real Alertmanager tells whom, with the configuration that is rendered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.alerts.world import Json, Letter, World, alert, never_now, until, world

pytestmark = pytest.mark.system

SAID = {
    "summary": "First tokens take 6.2 s",
    "description": "p99 over 5 minutes is 6.2 s & above 5 s.",
    "runbook_url": "https://llm.test/runbooks/HighTTFT.md",
    "dashboard_url": "https://llm.test/d/llm",
}


async def test_a_critical_alert_pages_and_is_told_to_slack_by_mail_and_to_the_history(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        firing = alert("HighTTFT", "critical", SAID, model="smollm2", cluster="a", instance="10.0.0.7:8000")
        await here.tell(firing)
        (page,) = await until(lambda: here.web.pages, "the page")
        (post,) = await until(lambda: here.web.slack_critical, "Slack")
        (note,) = await until(lambda: here.web.history, "the history")
        (letter,) = await until(lambda: here.mail.letters, "the letter")
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
        assert letter.recipients == ["team@llm.test", "lead@llm.test"]
        assert letter.subject == "[FIRING:1] HighTTFT (smollm2): First tokens take 6.2 s"
        assert "HighTTFT (critical): First tokens take 6.2 s\np99 over 5 minutes is 6.2 s & above 5 s." in letter.text
        assert "runbook: https://llm.test/runbooks/HighTTFT.md" in letter.text
        (token,) = {post.authorization for post in here.web.posts if post.path == "/history"}
        assert token == "Bearer history-secret"

        await here.resolve(firing)
        await until(
            lambda: len(here.web.pages) == len(here.web.slack_critical) == len(here.web.history) == 2, "the end"
        )
        await until(lambda: len(here.mail.letters) == 2, "the letter of the end")
        assert here.web.pages[1]["event_action"] == "resolve"
        assert here.web.pages[1]["dedup_key"] == page["dedup_key"]
        (attachment,) = here.web.slack_critical[1]["attachments"]
        assert attachment["title"] == "[RESOLVED] HighTTFT (smollm2)"
        assert attachment["color"] == "good"
        assert here.web.history[1]["alerts"][0]["status"] == "resolved"
        assert here.mail.letters[1].subject.startswith("[RESOLVED] HighTTFT (smollm2)")
        assert here.web.slack_warning == []


async def test_a_warning_is_told_to_slack_and_by_mail_and_does_not_page(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        firing = alert("HighTTFT", "warning", SAID, model="smollm2")
        await here.tell(firing)
        (post,) = await until(lambda: here.web.slack_warning, "Slack")
        (letter,) = await until(lambda: here.mail.letters, "the letter")
        assert post["channel"] == "#warnings"
        assert post["attachments"][0]["color"] == "warning"
        assert letter.recipients == ["team@llm.test", "lead@llm.test"]
        assert letter.message["From"] == "alerts@llm.test"
        assert letter.subject == "[FIRING:1] HighTTFT (smollm2): First tokens take 6.2 s"
        assert "HighTTFT (warning): First tokens take 6.2 s\np99 over 5 minutes is 6.2 s & above 5 s." in letter.text
        assert "runbook: https://llm.test/runbooks/HighTTFT.md" in letter.text
        assert letter.message.get_body(("html",)) is None

        await here.resolve(firing)
        await until(lambda: len(here.web.slack_warning) == len(here.mail.letters) == 2, "the end")
        assert here.mail.letters[1].subject.startswith("[RESOLVED] HighTTFT")
        assert here.web.pages == here.web.slack_critical == []
        assert here.mail.refused == 0


async def test_outside_business_hours_only_warnings_wait(tmp_path: Path) -> None:
    async with world(tmp_path, business_hours=never_now()) as here:
        warning = alert("HighTTFT", "warning", model="a")
        await here.tell(warning, alert("HighTTFT", "critical", model="b"), alert("Started", "info"))
        await until(lambda: here.web.pages, "the page")
        await until(lambda: len(here.mail.letters) == 2, "the digest, and the page's letter")
        await until(lambda: len(here.web.history) == 3, "the history, of all three")
        await here.resolve(warning)
        await until(lambda: len(here.web.history) == 4, "the history of the warning's end")
        assert here.web.slack_warning == []
        assert sorted(letter.recipients for letter in here.mail.letters) == [
            ["digest@llm.test"],
            ["team@llm.test", "lead@llm.test"],
        ]
        assert warnings(here) == []


async def test_a_severity_that_nobody_knows_is_told_at_any_hour(tmp_path: Path) -> None:
    async with world(tmp_path, business_hours=never_now()) as here:
        await here.tell(alert("Misspelt", "Critical"), alert("Forgotten", None), alert("ForAlertmanager", "none"))
        await until(lambda: len(here.web.slack_warning) == len(here.mail.letters) == 2, "both")
        assert sorted(title(post) for post in here.web.slack_warning) == ["[FIRING:1] Forgotten", "[FIRING:1] Misspelt"]


async def test_what_is_only_to_be_known_comes_as_one_letter(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        infos = [alert("Scaled", "info", {"summary": "Two replicas"}, model=model) for model in ("a", "b")]
        await here.tell(*infos, alert("IdleGPU", "info", {"summary": "Nothing to do"}, gpu="0"))
        (letter,) = await until(lambda: here.mail.letters, "the letter")
        assert letter.subject == "Digest: 3 firing, 0 resolved"
        assert letter.recipients == ["digest@llm.test"]
        assert letter.text.count("Scaled (info): Two replicas") == 2
        assert "IdleGPU (info): Nothing to do" in letter.text
        assert here.web.slack_warning == here.web.slack_critical == here.web.pages == []


async def test_alerts_with_the_same_name_and_model_are_told_together(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        replicas = [alert("EngineStalled", "critical", model="a", replica=f"r{number}") for number in range(3)]
        await here.tell(*replicas, alert("EngineStalled", "critical", model="b", replica="r9"))
        await until(lambda: len(here.web.pages) == len(here.web.slack_critical) == 2, "a page for each model")
        assert sorted(map(title, here.web.slack_critical)) == [
            "[FIRING:1] EngineStalled (b)",
            "[FIRING:3] EngineStalled (a)",
        ]
        (three,) = (page for page in here.web.pages if page["payload"]["component"] == "a")
        assert all(f"replica=r{number}" in three["payload"]["custom_details"]["firing"] for number in range(3))


async def test_the_more_severe_alert_silences_the_less_severe(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.tell(
            alert("HighTTFT", "critical", model="a", cluster="x"),
            alert("TTFTBurnFast", "critical", model="a", cluster="x", symptom="ttft"),
        )
        await until(lambda: len(here.web.pages) == 2, "the pages")
        silenced = [
            alert("HighTTFT", "warning", model="a", cluster="x"),
            alert("TTFTBurnSlow", "warning", model="a", cluster="x", symptom="ttft"),
        ]
        await here.tell(alert("NotificationsFail", "critical", cluster="x", symptom="monitoring"))
        others = [
            alert("RulesFail", "warning", cluster="x", symptom="monitoring"),  # which are never silenced
            alert("HighTTFT", "warning", model="b", cluster="x"),  # of another model
            alert("HighTTFT", "warning", model="a", cluster="y"),  # in another place
            alert("HighQueueWait", "warning", model="a", cluster="x"),  # about something else, without a symptom
            alert("TPOTBurnSlow", "warning", model="a", cluster="x", symptom="tpot"),  # of another objective
        ]
        await here.tell(*silenced, *others)
        await until(lambda: len(here.web.slack_warning) == len(warnings(here)) == 5, "those that are not silenced")
        await here.resolve(*others)  # a whole group_interval later: the silenced have had their turn as well
        await until(lambda: len(here.web.slack_warning) == len(warnings(here)) == 10, "their end")
        states = await here.states()
        assert states["HighTTFT warning a"] == states["TTFTBurnSlow warning a"] == "suppressed"
        told = {title(post).split(maxsplit=1)[1] for post in here.web.slack_warning}
        assert told == {"HighTTFT (a)", "HighTTFT (b)", "HighQueueWait (a)", "TPOTBurnSlow (a)", "RulesFail"}
        assert one_cluster(here, "HighTTFT (a)") == {"y"}


async def test_a_warning_silences_what_is_only_to_be_known(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.tell(alert("DiskNearFull", "warning"))
        await until(lambda: here.web.slack_warning, "the warning")
        await here.tell(alert("DiskNearFull", "info"), alert("Scaled", "info"))
        await until(lambda: any("Digest" in letter.subject for letter in here.mail.letters), "the digest")
        (digest,) = (letter for letter in here.mail.letters if "Digest" in letter.subject)
        assert digest.subject == "Digest: 1 firing, 0 resolved"


async def test_a_service_that_is_down_silences_the_rest_but_not_what_may_be_the_cause(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        down = alert("ServiceDown", "critical", cluster="x", job="serve_app")
        await here.tell(down)
        await until(lambda: here.web.pages, "the page")
        rest = [
            alert("HighErrorRate", "critical", cluster="x", model="a", symptom="errors"),
            alert("HighTTFT", "warning", cluster="x", symptom="latency"),
        ]
        heard = [
            alert("NodeLost", "critical", cluster="x", symptom="replicas"),
            alert("HighErrorRate", "critical", cluster="y", symptom="errors"),
            alert("SomebodyElses", "critical", cluster="x"),
        ]
        await here.tell(*rest, *heard, alert("Watchdog", "none", cluster="x"))
        await until(lambda: len(here.web.pages) == 4, "the cause, what is elsewhere, and what is another service's")
        await until(lambda: here.web.at("/dead-man"), "the dead-man's switch")
        assert (await here.states())["HighErrorRate critical a"] == "suppressed"
        await here.resolve(down)
        await until(lambda: len(here.web.pages) == 6, "what is still wrong after the repair, and the end")
        names = sorted(page["payload"]["class"] for page in here.web.pages)
        assert names == ["HighErrorRate", "HighErrorRate", "NodeLost", "ServiceDown", "ServiceDown", "SomebodyElses"]


async def test_the_dead_mans_switch_hears_of_life_and_never_of_an_end(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        watchdog = alert("Watchdog", "none")
        await here.tell(watchdog)
        await until(lambda: len(here.web.at("/dead-man")) >= 3, "three signs of life")
        assert {post.authorization for post in here.web.posts} == {"Bearer dead-man-secret"}
        await here.resolve(watchdog)
        sentinel = alert("HighTTFT", "critical")
        await here.tell(sentinel)
        await until(lambda: here.web.pages, "a page")
        heard = len(here.web.at("/dead-man"))
        await here.resolve(sentinel)
        await until(lambda: len(here.web.pages) == 2, "its end, a group_interval later")
        assert len(here.web.at("/dead-man")) == heard
        assert {one["status"] for one in here.web.at("/dead-man")} == {"firing"}
        assert not any(one["alerts"][0]["labels"]["alertname"] == "Watchdog" for one in here.web.history)


async def test_labels_cannot_call_everybody_in_slack(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.tell(alert("Odd", "critical", {"summary": "<!channel> & all"}, model="<!here>"))
        (post,) = await until(lambda: here.web.slack_critical, "Slack")
        assert title(post) == "[FIRING:1] Odd (&lt;!here&gt;)"
        assert "&lt;!channel&gt; &amp; all" in post["attachments"][0]["text"]
        assert "<!" not in str(post)


async def test_without_links_there_are_none_and_a_hundred_alerts_stay_readable(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.tell(*(alert("Flapping", "critical", replica=f"r{number:03}") for number in range(100)))
        (page,) = await until(lambda: here.web.pages, "the page")
        (post,) = await until(lambda: here.web.slack_critical, "Slack")
        assert page.get("links", []) == []
        assert page["payload"]["source"] == "serve_app"
        for text in (page["payload"]["custom_details"]["firing"], post["attachments"][0]["text"]):
            assert text.count("replica=") == 10
            assert "100 in all" in text


async def test_a_receiver_that_fails_is_told_again_and_holds_up_nobody(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        here.web.failing |= {"/history", "/slack/critical"}
        await here.tell(alert("HighTTFT", "critical"))
        await until(lambda: here.web.pages, "the page")
        await until(lambda: len(here.web.history) >= 2 and len(here.web.slack_critical) >= 2, "tried again")
        here.web.failing.clear()
        tries = len(here.web.history)
        await until(lambda: len(here.web.history) > tries, "taken at last")
        assert len(here.web.pages) == 1


def title(post: Json) -> str:
    return str(post["attachments"][0]["title"])


def warnings(here: World) -> list[Letter]:
    return [letter for letter in here.mail.letters if "(warning): " in letter.text or "(warning)\n" in letter.text]


def one_cluster(here: World, told: str) -> set[str]:
    texts = [post["attachments"][0]["text"] for post in here.web.slack_warning if title(post).endswith(told)]
    return {word.removeprefix("cluster=") for text in texts for word in text.split() if word.startswith("cluster=")}
