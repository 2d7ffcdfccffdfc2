"""The stage before the Catalog: chooses the variant that answers a request of an experiment, and measures it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from serve_app.core.adapters import ListedAdapter
from serve_app.core.engine import Engine
from serve_app.core.events import Chunk
from serve_app.core.experiments import Assignment, Caller, Choice, Feedback
from serve_app.core.requests import GenerationRequest
from serve_app.errors import InternalError, ServeAppError
from serve_app.gateway.assignment import cluster_of, is_counted, is_shadowed, place, unit_of, variant_at
from serve_app.gateway.experiment_state import Active, ExperimentState
from serve_app.gateway.feedback import AnsweredCalls
from serve_app.gateway.shadow import ShadowTraffic
from serve_app.gateway.stage import Stage
from serve_app.gateway.variants import Measured, RequestCounter, choice_of, mirrored


class ExperimentMeter(RequestCounter, Protocol):
    """Counts what happens in experiments."""

    def shadow_ended(self, experiment: str, variant: str, outcome: str) -> None:
        """Count a mirrored request."""
        ...

    def feedback(self, model: str, experiment: str, variant: str, score: float) -> None:
        """Count feedback. `experiment` and `variant` are "" for a call that named a model."""
        ...


class Experiments(Stage):
    """An Engine of the experiments and models. A request without an assignment is passed on.

    `find_adapter` finds a LoRA adapter by its name.
    """

    def __init__(
        self,
        inner: Engine,
        state: ExperimentState,
        meter: ExperimentMeter,
        find_adapter: Callable[[str], ListedAdapter | None],
    ) -> None:
        super().__init__(inner)
        self._state = state
        self._meter = meter
        self._find_adapter = find_adapter
        self._shadow = ShadowTraffic(inner, meter.shadow_ended)
        self._calls = AnsweredCalls()

    def stop(self) -> None:
        self._shadow.stop()

    def names(self) -> tuple[str, ...]:
        return tuple(self._state.active)

    def choose(self, name: str, caller: Caller) -> Choice | None:
        """The variant for a caller; None if there is no experiment of this name.

        A caller whose unit is unknown gets the control, and is not counted. A caller that asks for a variant gets it,
        and is not counted either. Raises InvalidRequest for an unknown variant.
        """
        active = self._state.active.get(name)
        if active is None:
            return None
        experiment = active.experiment
        unit, share = unit_of(experiment, caller), self._state.share(active)
        if caller.variant:
            return choice_of(active, caller.variant, None)
        if not unit:
            return choice_of(active, experiment.control.name, None)
        variant = variant_at(experiment, share, place(name, unit))
        return choice_of(active, variant, cluster_of(name, unit) if is_counted(experiment, share, unit) else None)

    def called(self, request_id: str, model: str, assignment: Assignment | None, tenant: str = "") -> None:
        """Remember a call, for feedback."""
        active = None if assignment is None else self._state.active.get(assignment.experiment)
        self._calls.add((tenant, request_id), model, assignment, "" if active is None else active.identity)

    def take_feedback(self, feedback: Feedback) -> bool:
        """Count feedback on a call of this ingress; False if it does not know the call. A later score replaces it."""
        call = self._calls.find((feedback.tenant, feedback.request_id))
        if call is None:
            return False
        assignment, earlier = call.assignment, call.score
        call.score = feedback.score
        if assignment is None:
            self._meter.feedback(call.model, "", "", feedback.score)
            return True
        self._meter.feedback(call.model, assignment.experiment, assignment.variant, feedback.score)
        active = self._state.active.get(assignment.experiment)
        if active is not None and active.identity == call.identity and assignment.cluster is not None:
            sums = self._state.own(active).of(assignment.variant).sums["feedback"]
            sums.add(assignment.cluster, feedback.score - (earlier or 0.0), count=earlier is None)
        return True

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        active = None if request.assignment is None else self._state.active.get(request.assignment.experiment)
        if active is None:
            return self.inner.generate(request)
        return self._measured(request, active)

    async def _measured(self, request: GenerationRequest, active: Active) -> AsyncGenerator[Chunk, None]:
        assert request.assignment is not None
        self._mirror(request, request.assignment, active)
        measured = Measured(request.assignment)
        try:
            async with aclosing(self.inner.generate(request)) as chunks:
                async for chunk in chunks:
                    measured.add(chunk)
                    yield chunk
        except ServeAppError as error:
            measured.fail(error)
            raise
        except Exception:
            measured.fail(InternalError(""))
            raise
        finally:
            measured.record(self._meter, self._state, active)

    def _mirror(self, request: GenerationRequest, assignment: Assignment, active: Active) -> None:
        experiment, shadow = active.experiment, active.experiment.shadow
        if shadow is None or assignment.variant == shadow.variant or active.identity in self._state.stops:
            return
        # The configuration can have changed since the variant was chosen.
        if assignment.variant not in active.templates or not is_shadowed(experiment, request.id):
            return
        choice, own = (choice_of(active, name, None) for name in (shadow.variant, assignment.variant))
        listed = None if choice.adapter is None else self._find_adapter(choice.adapter)
        if choice.adapter is None or listed is not None:
            copy = mirrored(request, own, choice, None if listed is None else listed.adapter)
            self._shadow.mirror(copy, shadow.max_running)
