"""The experiments of several ingresses, which call each other directly: configuration, statistics, stops, feedback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.core.adapters import AdapterDirectory
from serve_app.core.experiments import Assignment, Feedback
from serve_app.deployments.experiments import IngressExperiments
from serve_app.telemetry.experiment_metrics import ExperimentSeries
from tests.api.scripted import app_config
from tests.gateway.scripted import ScriptedEngine

CONTROL = {"name": "control", "model": "small"}


def config(**variant: Any) -> dict[str, Any]:
    variants = [CONTROL, {"name": "b", "model": "org/large", "percent": 50, **variant}]
    return {"experiments": [{"name": "chat", "variants": variants}]}


WRONG = config(model="none")


class Group:
    """Ingresses that reach each other. A call to one that `fails` raises."""

    def __init__(self) -> None:
        self.members: list[IngressExperiments] = []
        self.fails = False
        self.stopped: list[tuple[str, str]] = []

    def add(self) -> IngressExperiments:
        series = ExperimentSeries(f"i{len(self.members)}", ["small"])
        adapters = AdapterDirectory({})
        made = IngressExperiments(
            app_config(),
            f"i{len(self.members)}",
            ScriptedEngine(),
            adapters,
            series,
            lambda *call: self.ask(*call),
            self._note_stop,
        )
        self.members.append(made)
        return made

    async def _note_stop(self, *about: str) -> None:
        self.stopped.append((about[0], about[1]))

    async def ask(self, method: str, argument: Any) -> list[Any]:
        if self.fails:
            raise ConnectionError("unreachable")
        if method == "experiment_changes":
            return [member.state.changes(argument) for member in self.members]
        return [member.stage.take_feedback(argument) for member in self.members]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The records of Ray Serve's logger, which passes none on."""
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    level, logger.level = logger.level, logging.INFO
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.level = level


async def test_a_refused_configuration_is_logged_and_the_earlier_one_stays(log: pytest.LogCaptureFixture) -> None:
    one = Group().add()
    await one.configure(config())
    assert one.names() == ("chat",)
    await one.configure(WRONG)
    assert one.names() == ("chat",)
    assert "chat, variant b: there is no model none" in (await one.reports()).error
    assert "The configuration of experiments is refused, the earlier one stays." in log.text
    documents: list[object] = ["text", [1], {"experiments": [{}]}, {"unknown": 1}]
    for wrong in documents:
        await one.configure(wrong)
        assert (await one.reports()).error
    await one.configure({"experiments": []})
    assert (one.names(), (await one.reports()).error) == ((), "")


async def test_a_new_ingress_takes_the_configuration_of_the_others_if_its_own_is_refused() -> None:
    group = Group()
    await group.add().configure(config())
    new = group.add()
    await new.exchange()
    await new.configure(WRONG)
    assert new.names() == ("chat",)
    assert (await new.reports()).error
    alone = Group().add()
    await alone.configure(WRONG)
    assert alone.names() == ()


async def test_a_stop_reaches_the_others_and_is_logged(log: pytest.LogCaptureFixture) -> None:
    group = Group()
    first, second = group.add(), group.add()
    for member in (first, second):
        await member.configure(config())
    (active,) = first.state.active.values()
    variant = first.state.own(active)
    for cluster in range(100):
        variant.of("control").ended(cluster, "stop", failed=False)
        variant.of("b").ended(cluster, "internal_error", failed=True)
    await second._check()  # the statistics of the first one stop it in the second one
    assert "Experiment chat was stopped by a guard" in log.text
    assert "Variant b: error_rate is 1, that of the control 0, the tolerance +0.01" in log.text
    log.clear()
    await first._check()
    assert "(reported by another ingress)" in log.text
    assert first.state.stops == second.state.stops
    assert [name for name, _ in group.stopped] == ["chat"], "by one ingress"
    assert group.stopped[0][1].startswith("variant b: error_rate is 1")
    assert [one.stopped[:2] for one in (await first.reports()).experiments] == ["b:"]


async def test_feedback_goes_to_the_ingress_that_knows_the_call(log: pytest.LogCaptureFixture) -> None:
    group = Group()
    first, second = group.add(), group.add()
    for member in (first, second):
        await member.configure(config())
    first.called("call", "org/large", Assignment("chat", "b", 3))
    assert await second.take_feedback(Feedback("call", 1.0, "Fine.\nReally."))
    assert not await second.take_feedback(Feedback("nobody", 1.0, "Fine."))
    assert not await second.take_feedback(Feedback("call", 1.0, "Fine.", tenant="other"))
    assert r"Feedback on request call: score 1, 'Fine.\nReally.'." in log.text
    (report,) = (await second.reports()).experiments
    assert report.variants[1].metrics["feedback"].value == 1.0


async def test_ingresses_that_cannot_be_reached_do_no_harm() -> None:
    group = Group()
    one = group.add()
    await one.configure(config())
    group.fails = True
    await one.exchange()
    assert not await one.take_feedback(Feedback("call", 1.0))
    assert [report.name for report in (await one.reports()).experiments] == ["chat"]
