"""The experiments of one ingress: takes their configuration, exchanges statistics with the others, checks guards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from serve_app.config import AppConfig, ConfigError
from serve_app.core.adapters import AdapterDirectory
from serve_app.core.engine import Engine
from serve_app.core.experiments import Assignment, Caller, Choice, Feedback, Reports
from serve_app.experiment_config import Experiments as Config, check_models, parse_experiments
from serve_app.gateway.experiment_report import report, worse_variant
from serve_app.gateway.experiment_state import ExperimentState, Stop
from serve_app.gateway.experiments import Experiments
from serve_app.telemetry.experiment_metrics import ExperimentSeries

logger = logging.getLogger("ray.serve")

# The interval in which the statistics of all ingresses are compared with the guards.
_CHECK_INTERVAL_S = 2.0
_ASK_TIMEOUT_S = 2.0

Ask = Callable[[str, object], Awaitable[list[Any]]]
# Receives the name of an experiment that its guards have stopped, and the reason.
Stopped = Callable[[str, str], Awaitable[None]]


async def _tell_nobody(experiment: str, reason: str) -> None:
    """The stop is only logged."""


class IngressExperiments:
    """The experiments, as the HTTP layer sees them. `stage` is the Engine in front of the models.

    `ask` calls a method of all other ingresses and returns their results.
    """

    def __init__(
        self,
        config: AppConfig,
        ingress: str,
        catalog: Engine,
        adapters: AdapterDirectory,
        series: ExperimentSeries,
        ask: Ask,
        stopped: Stopped = _tell_nobody,
    ) -> None:
        self._config = config
        self._adapters = adapters
        self._series = series
        self._ask = ask
        self._stopped = stopped
        self._received: dict[str, object] | None = None
        self.state = ExperimentState(ingress)
        self.stage = Experiments(catalog, self.state, series, adapters.find)
        self._checks: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._checks = asyncio.create_task(self._check_forever())

    def stop(self) -> None:
        self.stage.stop()
        if self._checks is not None:
            self._checks.cancel()

    async def configure(self, user_config: object) -> None:
        """Replace the configuration of the experiments.

        One that cannot be used is refused: the earlier one stays, in a new ingress that of the other ingresses. It does
        not raise: Ray Serve would restart the ingress, with the same configuration, again and again.
        """
        self.state.error = self._apply(user_config)
        if self.state.error:
            logger.error("The configuration of experiments is refused, the earlier one stays. %s", self.state.error)
        if self.state.error and self.state.accepted is None and self._received is not None:
            self._apply(self._received)
        self._series.set_refused(bool(self.state.error))

    def _apply(self, user_config: object) -> str:
        """Returns why the configuration cannot be used, or "" if it applies now."""
        try:
            self._use(parse_experiments(user_config))
        except ConfigError as error:
            return str(error)
        return ""

    def _use(self, experiments: Config) -> None:
        """Raises ConfigError."""
        adapters = {one.adapter.name: one.model for one in self._adapters.all()}
        check_models(experiments, self._config, adapters)
        self.state.configure(experiments)
        self._series.configure({one.name: [v.name for v in one.variants] for one in experiments.experiments})
        self._show()
        logger.info("The experiments are: %s.", ", ".join(self.state.active) or "none")

    async def exchange(self) -> None:
        """Get what the other ingresses know. An error is only logged, because the next exchange replaces this one."""
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                found = await self._ask("experiment_changes", self.state.known())
        except Exception:
            logger.debug("the other ingresses did not answer", exc_info=True)
            return
        for changes in found:
            self._received = changes.accepted or self._received
            for stop in self.state.merge(changes):
                logger.warning("%s (reported by another ingress)", _sentence(stop))

    def names(self) -> tuple[str, ...]:
        return self.stage.names()

    def choose(self, name: str, caller: Caller) -> Choice | None:
        return self.stage.choose(name, caller)

    def called(self, request_id: str, model: str, assignment: Assignment | None, tenant: str = "") -> None:
        self.stage.called(request_id, model, assignment, tenant)

    async def take_feedback(self, feedback: Feedback) -> bool:
        """Count feedback here, or at the ingress that has answered the call."""
        known = self.stage.take_feedback(feedback) or await self._told(feedback)
        if known and feedback.comment:
            logger.info("Feedback on request %s: score %g, %r.", feedback.request_id, feedback.score, feedback.comment)
        return known

    async def _told(self, feedback: Feedback) -> bool:
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                return any(await self._ask("experiment_feedback", feedback))
        except Exception:
            logger.warning("the other ingresses did not take the feedback", exc_info=True)
            return False

    async def reports(self) -> Reports:
        await self.exchange()
        now, measured = datetime.fromtimestamp(self.state.clock(), UTC), self.state.measured()
        found = await asyncio.to_thread(
            lambda: [report(active.experiment, statistics, stopped, now) for active, statistics, stopped in measured]
        )
        return Reports(tuple(found), self.state.error)

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                await self._check()
            except Exception:
                logger.exception("the guards of the experiments could not be checked")

    async def _check(self) -> None:
        if not self.state.active:
            return
        await self.exchange()
        for active, statistics, stopped in self.state.measured():
            worse = None if stopped else await asyncio.to_thread(worse_variant, active.experiment, statistics)
            stop = None if worse is None else self.state.stop(active, *worse)
            if stop is not None:
                logger.warning("%s", _sentence(stop))
                await self._stopped(stop.experiment, f"variant {stop.variant}: {stop.reason}")
        self._show()

    def _show(self) -> None:
        """Update the metrics about the state of the experiments."""
        for name, active in self.state.active.items():
            share, experiment = self.state.share(active), active.experiment
            shares = {one.name: share * one.percent / 100 for one in experiment.variants[1:]}
            shares[experiment.control.name] = 1 - sum(shares.values())
            self._series.set_state(name, shares, active.identity in self.state.stops)


def _sentence(stop: Stop) -> str:
    return (
        f"Experiment {stop.experiment} was stopped by a guard, all its requests go to the control. "
        f"Variant {stop.variant}: {stop.reason}."
    )
