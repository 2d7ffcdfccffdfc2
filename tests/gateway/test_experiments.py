"""The stage of experiments: it chooses variants, measures them, mirrors requests and stops what a guard finds worse."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ConfigError
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import EngineLoad
from serve_app.core.events import Chunk, FinishReason, TokenEvent
from serve_app.core.experiments import Assignment, Caller, Feedback
from serve_app.core.queries import ModelState, ModelStatus
from serve_app.core.requests import Adapter, ChatMessage, ChatPrompt, GenerationRequest, SamplingParams
from serve_app.errors import InvalidRequest, NotReady
from serve_app.experiment_config import check_models, parse_experiments
from serve_app.gateway.experiment_report import report, worse_variant
from serve_app.gateway.experiment_state import Changes, ExperimentState, Stop
from serve_app.gateway.experiments import Experiments
from serve_app.gateway.feedback import KEEP_S, MAX_CALLS, AnsweredCalls
from serve_app.gateway.shadow import LOWEST_PRIORITY
from serve_app.gateway.statistics import ExperimentStatistics
from tests.gateway.scripted import LAST, ScriptedEngine, chunk, request

NOW = datetime(2026, 10, 1, tzinfo=UTC)


def document(percent: float = 50, candidate: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    variants = [{"name": "control", "model": "m"}, {"name": "b", "model": "n", "percent": percent, **(candidate or {})}]
    return {"experiments": [{"name": "chat", "variants": variants, **keys}]}


@dataclass
class KeptCounts:
    """A meter that keeps what it is given."""

    requests: list[tuple[Any, ...]] = field(default_factory=list)
    shadows: list[tuple[str, str, str]] = field(default_factory=list)
    scores: list[tuple[Any, ...]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_shadows(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.shadows) < count:
                self.changed.clear()
                await self.changed.wait()

    def request_ended(self, *about: Any) -> None:
        self.requests.append(about)

    def shadow_ended(self, experiment: str, variant: str, outcome: str) -> None:
        self.shadows.append((experiment, variant, outcome))
        self.changed.set()

    def feedback(self, *about: Any) -> None:
        self.scores.append(about)


@dataclass
class Loaded(ScriptedEngine):
    """An engine with the given load and state."""

    busy: EngineLoad = field(default_factory=lambda: EngineLoad(0, 0, 8))
    state: ModelState = ModelState.READY

    def load(self, model: str) -> EngineLoad:
        return self.busy

    def health(self, model: str) -> ModelStatus:
        return ModelStatus(model, self.state)


@dataclass
class Setup:
    """The stage over a scripted engine. `time` is the wall clock, in seconds."""

    engine: Loaded
    state: ExperimentState
    counts: KeptCounts
    stage: Experiments
    time: list[float]

    def assigned(self, user: str, variant: str = "", **changes: Any) -> GenerationRequest:
        """A request for the experiment by this user."""
        choice = self.stage.choose("chat", Caller(user=user, request="r", variant=variant))
        assert choice is not None
        made: GenerationRequest = replace(request(), model=choice.model, assignment=choice.assignment, **changes)
        return made

    def variants(self) -> set[tuple[str, bool]]:
        """The variants of all users, and whether they are counted."""
        found = [self.assigned(user).assignment for user in USERS]
        return {(one.variant, one.cluster is not None) for one in found if one is not None}

    async def run(self, users: Iterable[str], **changes: Any) -> None:
        for user in users:
            [_ async for _ in self.stage.generate(self.assigned(user, **changes))]


def setup(*steps: Any, adapters: AdapterDirectory | None = None, **keys: Any) -> Setup:
    engine, time, counts = Loaded(lambda _: steps or [chunk(), LAST]), [1000.0], KeptCounts()
    state = ExperimentState("i1", lambda: time[0])
    state.configure(parse_experiments(document(**keys)))
    find = (adapters or AdapterDirectory({})).find
    return Setup(engine, state, counts, Experiments(engine, state, counts, find), time)


USERS = [f"user-{number}" for number in range(60)]


async def test_a_request_without_an_assignment_passes_unchanged() -> None:
    made = setup()
    assert [one async for one in made.stage.generate(request())] == [chunk(), LAST]
    assert (made.counts.requests, made.stage.choose("m", Caller(user="u"))) == ([], None)


async def test_a_user_keeps_the_variant_and_the_model_of_the_variant_answers() -> None:
    made = setup()
    found = {user: made.assigned(user).assignment for user in USERS}
    assert {one.variant for one in found.values() if one} == {"control", "b"}
    assert {user: made.assigned(user).assignment for user in USERS} == found
    await made.run(USERS)
    assert [one.model for one in made.engine.requests] == [
        {"control": "m", "b": "n"}[one.variant] for one in found.values() if one
    ]


async def test_a_caller_of_whom_the_unit_is_unknown_gets_the_control_and_is_not_counted() -> None:
    made = setup(percent=100)
    choice = made.stage.choose("chat", Caller(key="k", session="s", request="r"))
    assert choice is not None
    assert choice.assignment == Assignment("chat", "control", None)


async def test_a_caller_that_asks_for_a_variant_gets_it_and_is_not_counted() -> None:
    made = setup(percent=0)
    await made.run(["user-1"], variant="b")
    assert made.engine.requests[0].model == "n"
    assert made.counts.requests == [("chat", "b", "stop", 0.1, 0.0, 2)]
    (active,) = made.state.active.values()
    assert made.state.statistics(active).variants == {}
    with pytest.raises(InvalidRequest, match="variants of chat are control, b"):
        made.assigned("user-1", variant="c")


def answer(*seconds: float) -> list[Chunk]:
    last = len(seconds) - 1
    return [
        Chunk((TokenEvent(1, "a", at, FinishReason.STOP if i == last else None),), 1, 0.0)
        for i, at in enumerate(seconds)
    ]


async def test_a_request_is_measured() -> None:
    made = setup(*answer(0.2, 0.3, 0.6), percent=100)
    await made.run(["user-1"])
    assert made.counts.requests == [("chat", "b", "stop", 0.2, pytest.approx(0.2), 3)]
    (active,) = made.state.active.values()
    measured = made.state.statistics(active).variants["b"]
    means = {metric: sums.mean for metric, sums in measured.sums.items()}
    assert means == {"error_rate": 0, "ttft": 0.2, "tpot": pytest.approx(0.2), "length": 3, "feedback": None}
    assert (sum(measured.ttft_bins), measured.outcomes) == (1, {"stop": 1})


async def test_an_error_counts_and_reaches_the_caller() -> None:
    made = setup(chunk(), NotReady("lost"), percent=100)
    with pytest.raises(NotReady):
        await made.run(["user-1"])
    assert made.counts.requests == [("chat", "b", "not_ready", 0.1, None, 1)]
    (active,) = made.state.active.values()
    measured = made.state.statistics(active).variants["b"]
    assert (measured.sums["error_rate"].mean, measured.sums["length"].count) == (1, 0)


async def test_a_client_that_leaves_is_no_error() -> None:
    made = setup(chunk(), asyncio.Event(), percent=100)
    chunks = made.stage.generate(made.assigned("user-1"))
    await anext(chunks)
    await chunks.aclose()
    assert made.counts.requests[0][2] == "cancelled"
    assert made.engine.closed == ["r"]
    (active,) = made.state.active.values()
    assert made.state.statistics(active).variants["b"].sums["error_rate"].mean == 0


async def test_only_enrolled_units_are_counted_during_a_ramp() -> None:
    steps = [{"at": "1970-01-01T00:30:00Z", "percent": 20}]
    made = setup(percent=50, ramp=steps)
    await made.run(USERS)
    (active,) = made.state.active.values()
    assert made.state.statistics(active).variants == {}, "before its begin"
    made.time[0] = 1801
    await made.run(f"user-{number}" for number in range(400))
    counted = {name: one.outcomes["stop"] for name, one in made.state.statistics(active).variants.items()}
    assert abs(counted["control"] - 40) < 20
    assert abs(counted["b"] - 40) < 20


# Shadow traffic.

SHADOW = {"variant": "b", "percent": 100, "max_running": 2}


async def test_a_mirrored_request_goes_to_the_variant_with_the_lowest_priority() -> None:
    made = setup(percent=0, shadow=SHADOW)
    await made.run(["user-1"], prompt=ChatPrompt((ChatMessage("user", "hi"),)))
    await made.counts.wait_for_shadows(1)
    mirrored, primary = sorted(made.engine.requests, key=lambda one: one.priority, reverse=True)
    assert (mirrored.id, mirrored.model, mirrored.priority) == ("r-shadow", "n", LOWEST_PRIORITY)
    assert (primary.id, primary.model, primary.priority) == ("r", "m", 0)
    assert mirrored.prompt == primary.prompt
    assert made.counts.shadows == [("chat", "b", "stop")]
    assert [about[:2] for about in made.counts.requests] == [("chat", "control")]


@pytest.mark.parametrize(
    ("busy", "state"),
    [
        (EngineLoad(0, 1, 8), ModelState.READY),
        (EngineLoad(4, 0, 8), ModelState.READY),
        (EngineLoad(0, 0, 8), ModelState.ASLEEP),
        (EngineLoad(0, 0, 8), ModelState.LOADING),
    ],
)
async def test_a_busy_or_sleeping_model_gets_no_mirrored_requests(busy: EngineLoad, state: ModelState) -> None:
    made = setup(percent=0, shadow=SHADOW)
    made.engine.busy, made.engine.state = busy, state
    await made.run(USERS[:3])
    assert [one.model for one in made.engine.requests] == ["m"] * 3
    assert made.counts.shadows == [("chat", "b", "skipped")] * 3


async def test_mirrored_requests_never_delay_or_fail_the_primary_and_are_bounded() -> None:
    made, hold = setup(percent=0, shadow=SHADOW), asyncio.Event()
    made.engine.script = lambda one: [hold, NotReady("lost")] if one.model == "n" else [chunk(), LAST]
    async with asyncio.timeout(2):
        await made.run(USERS[:5])
    assert [about[2] for about in made.counts.requests] == ["stop"] * 5
    assert sum(one.model == "n" for one in made.engine.requests) <= SHADOW["max_running"]  # type: ignore[operator]
    assert made.counts.shadows == [("chat", "b", "skipped")] * 3
    hold.set()
    await made.counts.wait_for_shadows(5)
    assert made.counts.shadows[3:] == [("chat", "b", "not_ready")] * 2


async def test_a_mirrored_request_ends_when_a_request_waits() -> None:
    made, step = setup(percent=0, shadow=SHADOW), asyncio.Event()
    made.engine.script = lambda one: [chunk(), step, chunk(), LAST] if one.model == "n" else [chunk(), LAST]
    await made.run(["user-1"])
    await asyncio.sleep(0.01)
    made.engine.busy = EngineLoad(8, 1, 8)
    step.set()
    await made.counts.wait_for_shadows(1)
    assert made.counts.shadows == [("chat", "b", "yielded")]
    assert "r-shadow" in made.engine.closed


async def test_a_mirrored_request_has_the_settings_of_the_shadow_variant(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    adapters = AdapterDirectory({"n": [Adapter("legal", "/adapters/legal")]})
    candidate = {
        "adapter": "legal",
        "sampling_defaults": {"temperature": 0.3, "top_p": 0.5},
        "chat_template": str(tmp_path / "t.jinja"),
    }
    made = setup(percent=0, shadow=SHADOW, candidate=candidate, adapters=adapters)
    await made.run(["user-1"], prompt=ChatPrompt((ChatMessage("user", "hi"),)), params=SamplingParams(top_k=4))
    await made.counts.wait_for_shadows(1)
    mirrored = next(one for one in made.engine.requests if one.id == "r-shadow")
    assert mirrored.adapter == Adapter("legal", "/adapters/legal")
    assert mirrored.params == SamplingParams(top_k=4, temperature=0.3, top_p=0.5)
    assert isinstance(mirrored.prompt, ChatPrompt)
    assert mirrored.prompt.template == "{{ messages }}"


async def test_a_request_whose_variant_was_removed_meanwhile_is_answered() -> None:
    made = setup(percent=0, shadow=SHADOW)
    late = made.assigned("user-1")
    made.state.configure(parse_experiments(document(percent=0, shadow=SHADOW, candidate={"model": "m"})))
    assigned = replace(late, assignment=Assignment("chat", "gone", 3))
    assert [one async for one in made.stage.generate(assigned)] == [chunk(), LAST]
    made.state.configure(parse_experiments({}))
    assert [one async for one in made.stage.generate(assigned)] == [chunk(), LAST]
    assert [one.model for one in made.engine.requests] == ["m", "m"]


# Guards.


def measured(**values: list[tuple[float, int]]) -> ExperimentStatistics:
    """Statistics of `control` and `b`: seconds to the first token (a negative number is an error), and users."""
    found = ExperimentStatistics(1.0)
    for name, groups in values.items():
        for seconds, users in groups:
            for user in range(users):
                variant = found.of(name)
                variant.ended(user % 128, "stop", seconds < 0)
                if seconds >= 0:
                    variant.first_token(user % 128, seconds)
                    variant.sums["tpot"].add(user % 128, seconds / 10 * (1 + user % 3 / 10))
    return found


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (measured(control=[(0.1, 100)], b=[(0.1, 50), (-1, 50)]), "error_rate is 0.5, that of the control 0, "),
        (measured(control=[(0.1, 900), (0.2, 100)], b=[(0.1, 900), (0.9, 200)]), "ttft_p95 is "),
        (measured(control=[(0.1, 150)], b=[(0.2, 150)]), "tpot is 0.022, that of the control 0.011, "),
        (measured(control=[(0.1, 100)], b=[(0.1, 100)]), None),
        (measured(control=[(0.1, 100)], b=[(0.11, 100)]), None),
        (measured(control=[(0.1, 100)], b=[(-1, 12)]), "error_rate is 1, that of the control 0, "),
        (measured(control=[(0.1, 100)], b=[(-1, 9)]), None),
        (measured(control=[(-1, 100)], b=[(-1, 100)]), None),
        (measured(), None),
    ],
)
def test_a_guard_finds_a_variant_that_is_worse_than_it_tolerates(
    statistics: ExperimentStatistics, reason: str | None
) -> None:
    experiment = parse_experiments(document()).experiments[0]
    found = worse_variant(experiment, statistics)
    assert (found is None) == (reason is None)
    if found is not None and reason is not None:
        assert found[0] == "b"
        assert found[1].startswith(reason)
    off = {"error_rate": None, "ttft_p95": None, "tpot": None}
    assert worse_variant(parse_experiments(document(guards=off)).experiments[0], statistics) is None


def test_one_user_whose_requests_fail_stops_nothing() -> None:
    statistics = measured(control=[(0.1, 100)], b=[(0.1, 20)])
    for _ in range(500):
        statistics.of("b").ended(7, "internal_error", True)
    assert worse_variant(parse_experiments(document()).experiments[0], statistics) is None


def test_a_stop_gives_all_users_to_the_control_until_the_revision_is_raised() -> None:
    made = setup()
    (active,) = made.state.active.values()
    stop = made.state.stop(active, "b", "error_rate is 1")
    assert stop == Stop(1000.0, "chat", "b", "error_rate is 1")
    assert made.state.stop(active, "b", "again") is None
    assert made.variants() == {("control", False)}
    made.state.configure(parse_experiments(document(percent=20)))
    assert made.variants() == {("control", False)}
    made.state.configure(parse_experiments(document(percent=20, revision=2)))
    assert made.variants() == {("control", True), ("b", True)}


# The state of several ingresses.


async def test_ingresses_add_up_their_statistics_and_pass_on_those_of_others() -> None:
    first, second, third = setup(percent=100), setup(percent=100), setup(percent=100)
    for number, made in enumerate((first, second, third)):
        made.state.ingress = f"i{number}"
        await made.run(USERS[: number + 1])
    (active,) = first.state.active.values()
    second.state.merge(first.state.changes(second.state.known()))
    for _ in range(2):  # a change that is received twice counts once
        third.state.merge(second.state.changes({}))
    assert third.state.statistics(active).variants["b"].outcomes == {"stop": 6}
    assert third.state.changes(third.state.known()).snapshots == {}
    await second.run(USERS[:1])
    third.state.merge(second.state.changes(third.state.known()))
    assert third.state.statistics(active).variants["b"].outcomes == {"stop": 7}


def test_ingresses_agree_on_the_earliest_stop() -> None:
    first, second = setup(), setup()
    (active,) = first.state.active.values()
    later = second.state.stop(replace(active), "b", "later")
    first.time[0] = 999.0
    earlier = first.state.stop(active, "b", "earlier")
    assert later is not None
    assert earlier is not None
    assert first.state.merge(second.state.changes({})) == []
    assert second.state.merge(first.state.changes({})) == []
    assert list(first.state.stops.values()) == list(second.state.stops.values()) == [earlier]
    third = setup()
    assert third.state.merge(Changes({}, {active.identity: earlier})) == [earlier]


def test_the_number_of_ingresses_whose_statistics_are_kept_is_bounded() -> None:
    made = setup()
    for number in range(100):
        other = setup()
        other.state.ingress = f"other-{number}"
        made.state.merge(other.state.changes({}))
    assert len(made.state.known()) == 65


# The configuration.


def test_a_change_that_would_flip_users_is_refused_and_the_old_configuration_stays() -> None:
    def three(first: float, revision: int = 1) -> dict[str, Any]:
        names = [("x", first), ("y", 20), ("z", 20)]
        variants = [{"name": "control", "model": "m"}, *({"name": n, "model": "m", "percent": p} for n, p in names)]
        return {"experiments": [{"name": "chat", "revision": revision, "variants": variants}]}

    state = ExperimentState("i")
    state.configure(parse_experiments(three(20)))
    before = state.active
    with pytest.raises(ConfigError, match="chat would move units from z to x; raise its revision"):
        state.configure(parse_experiments(three(40)))
    assert state.active is before
    state.configure(parse_experiments(three(40, revision=2)))


async def test_a_change_of_a_variant_begins_the_statistics_anew_and_one_of_the_split_does_not() -> None:
    made = setup(percent=100)
    await made.run(USERS)

    def count() -> int:
        (active,) = made.state.active.values()
        return sum(sum(one.outcomes.values()) for one in made.state.statistics(active).variants.values())

    made.state.configure(parse_experiments(document(percent=70, guards={"tpot": None})))
    assert count() == 60
    made.state.configure(parse_experiments(document(percent=70, candidate={"sampling_defaults": {"temperature": 0}})))
    assert count() == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"percent": 101}, "variants.1.percent"),
        ({"candidate": {"name": "control"}}, "several variants have the name control"),
        ({"candidate": {"name": "-"}}, "variants.1.name"),
        ({"shadow": {"variant": "control"}}, "shadow.variant control is none of b"),
        ({"unit": "cookie"}, "unit"),
        ({"unknown": 1}, "unknown"),
        ({"ramp": [{"at": "2026-10-01T00:00:00", "percent": 1}]}, "timezone"),
        (
            {"ramp": [{"at": f"2026-10-0{day}T00:00:00Z", "percent": 1} for day in (2, 1)]},
            "the steps of ramp are not in the order of their times",
        ),
        ({"candidate": {"chat_template": "builtin:none"}}, "builtin:none does not exist"),
    ],
)
def test_a_wrong_configuration_names_the_fault(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_experiments(document(**changes))


def test_the_control_has_no_percent_and_the_sum_is_at_most_100() -> None:
    variants = [{"name": "a", "model": "m", "percent": 50}, {"name": "b", "model": "m", "percent": 50}]
    with pytest.raises(ConfigError, match="remove percent of a"):
        parse_experiments({"experiments": [{"name": "x", "variants": variants}]})
    more = [{"name": "a", "model": "m"}, *({"name": n, "model": "m", "percent": 55} for n in "bc")]
    with pytest.raises(ConfigError, match="the percent of the variants are 110 together"):
        parse_experiments({"experiments": [{"name": "x", "variants": more}]})
    with pytest.raises(ConfigError, match="several experiments have the name chat"):
        parse_experiments({"experiments": document()["experiments"] * 2})


def test_a_chat_template_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jinja of b cannot be read"):
        setup(candidate={"chat_template": str(tmp_path / "none.jinja")})


def test_variants_name_models_and_adapters_of_the_service() -> None:
    from tests.api.scripted import app_config

    config, adapters = app_config(), {"support": "small"}
    variants = [{"name": "a", "model": "small"}, {"name": "b", "model": "small", "adapter": "support"}]
    check_models(parse_experiments({"experiments": [{"name": "x", "variants": variants}]}), config, adapters)
    wrong = [{"name": "a", "model": "none"}, {"name": "b", "model": "org/large", "adapter": "support"}]
    with pytest.raises(ConfigError) as error:
        check_models(parse_experiments({"experiments": [{"name": "x", "variants": wrong}]}), config, adapters)
    assert str(error.value).splitlines() == [
        "user_config:",
        "  x, variant a: there is no model none; the models are " + str(error.value).splitlines()[1].split("are ")[1],
        "  x, variant b: model org/large has no LoRA adapter support",
    ]


# Feedback and the report.


async def test_feedback_is_counted_for_the_variant_and_a_later_score_replaces_it() -> None:
    made = setup(percent=100)
    assignment = made.assigned("user-1").assignment
    made.stage.called("call", "n", assignment)
    made.stage.called("other", "m", None)
    for score in (0.0, 1.0):
        assert made.stage.take_feedback(Feedback("call", score))
    assert made.stage.take_feedback(Feedback("other", 0.5))
    assert not made.stage.take_feedback(Feedback("unknown", 0.5))
    (active,) = made.state.active.values()
    sums = made.state.statistics(active).variants["b"].sums["feedback"]
    assert (sums.count, sums.mean) == (1, 1.0)
    assert made.counts.scores == [("n", "chat", "b", 0.0), ("n", "chat", "b", 1.0), ("m", "", "", 0.5)]


def test_the_memory_for_feedback_is_bounded_in_number_and_age() -> None:
    now = [0.0]
    calls = AnsweredCalls(lambda: now[0])
    for number in range(MAX_CALLS + 5):
        calls.add(("", str(number)), "m", None, "")
    assert (calls.find(("", "4")), calls.find(("", "5")) is None) == (None, False)
    now[0] = KEEP_S + 1
    assert calls.find(("", "5")) is None
    calls.add(("", "new"), "m", None, "")
    assert len(calls._calls) == 1


def test_the_report_says_plainly_what_is_seen() -> None:
    experiment = parse_experiments(document(percent=30)).experiments[0]
    nothing = report(experiment, ExperimentStatistics(0.0), "", NOW)
    assert nothing.verdict == "not enough data yet"
    assert [one.percent for one in nothing.variants] == [70, 30]
    assert nothing.variants[1].differences["ttft"].verdict == "not enough data yet"
    alike = report(experiment, measured(control=[(0.1, 200)], b=[(0.1, 200)]), "", NOW)
    assert alike.verdict == "no difference seen yet"
    slower = report(experiment, measured(control=[(0.1, 200)], b=[(0.3, 200)]), "", NOW)
    differences = slower.variants[1].differences
    assert slower.verdict.startswith("b: ttft is worse; b: tpot is worse")
    assert differences["ttft"].value == pytest.approx(0.2)
    assert differences["error_rate"].verdict == "no difference seen yet"
    assert slower.variants[0].differences == {}
    stopped = report(experiment, measured(control=[(0.1, 200)]), "b: error_rate is 1", NOW)
    assert stopped.verdict == "stopped by a guard: b: error_rate is 1; all requests go to control"
    assert [one.percent for one in stopped.variants] == [100, 0]
