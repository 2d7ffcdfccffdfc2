"""What a variant means for a request, and how a request of an experiment is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from serve_app.core.events import CANCELLED, Chunk
from serve_app.core.experiments import Assignment, Choice
from serve_app.core.requests import Adapter, ChatPrompt, GenerationRequest
from serve_app.errors import InvalidRequest, ServeAppError
from serve_app.gateway.experiment_state import Active, ExperimentState
from serve_app.gateway.shadow import LOWEST_PRIORITY


class RequestCounter(Protocol):
    def request_ended(
        self, experiment: str, variant: str, outcome: str, ttft_s: float | None, tpot_s: float | None, tokens: int
    ) -> None:
        """Count a request, with its times and generated tokens as far as they are known."""
        ...


def choice_of(active: Active, name: str, cluster: int | None) -> Choice:
    """The variant of this name. Raises InvalidRequest if the experiment has none."""
    experiment = active.experiment
    variant = next((one for one in experiment.variants if one.name == name), None)
    if variant is None:
        known = ", ".join(one.name for one in experiment.variants)
        raise InvalidRequest(
            f"Header 'x-variant' is {name[:64]!r}, but the variants of {experiment.name} are {known}.", "x-variant"
        )
    sampling = variant.sampling_defaults
    return Choice(
        Assignment(experiment.name, variant.name, cluster),
        variant.model,
        variant.adapter,
        None if sampling is None else sampling.temperature,
        None if sampling is None else sampling.top_p,
        active.templates[variant.name],
    )


def mirrored(request: GenerationRequest, own: Choice, choice: Choice, adapter: Adapter | None) -> GenerationRequest:
    """A request for the shadow variant `choice`, with the prompt of one for the variant `own`.

    The shadow's defaults for sampling replace the values that equal the defaults of `own`: a request does not say
    which of its values its caller has set.
    """
    params = request.params
    if choice.temperature is not None and own.temperature in (None, params.temperature):
        params = replace(params, temperature=choice.temperature)
    if choice.top_p is not None and own.top_p in (None, params.top_p):
        params = replace(params, top_p=choice.top_p)
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt):
        prompt = replace(prompt, template=choice.template)
    return replace(
        request,
        id=f"{request.id}-shadow",
        group=f"{request.group}-shadow" if request.group else "",
        model=choice.model,
        adapter=adapter,
        prompt=prompt,
        params=params,
        assignment=choice.assignment,
        priority=LOWEST_PRIORITY,
        traceparent="",
        cache_control="no-store",
        tenant="",
        key="",
    )


class Measured:
    """Measures a request of an experiment, until `record`. A replayed answer has a length but no times of a model."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._outcome = CANCELLED
        self._failed = False
        self._ttft_s: float | None = None
        self._last_s = 0.0
        self._tokens = 0

    def add(self, chunk: Chunk) -> None:
        if chunk.events:
            if self._ttft_s is None and not chunk.replayed:
                self._ttft_s = chunk.events[0].elapsed_s
            self._last_s = chunk.events[-1].elapsed_s
            self._tokens += len(chunk.events)
        if chunk.finished:
            self._outcome = chunk.outcome

    def fail(self, error: ServeAppError) -> None:
        self._outcome, self._failed = error.code, True

    def record(self, counter: RequestCounter, state: ExperimentState, active: Active) -> None:
        """Count the request. It is part of the statistics unless its assignment has no cluster."""
        tpot_s = None
        complete = self._outcome != CANCELLED and not self._failed
        if complete and self._ttft_s is not None and self._tokens > 1:
            tpot_s = (self._last_s - self._ttft_s) / (self._tokens - 1)
        one = self._assignment
        counter.request_ended(one.experiment, one.variant, self._outcome, self._ttft_s, tpot_s, self._tokens)
        current = state.active.get(one.experiment)
        if one.cluster is None or current is None or current.identity != active.identity:
            return
        statistics = state.own(active).of(one.variant)
        statistics.ended(one.cluster, self._outcome, self._failed)
        if self._ttft_s is not None:
            statistics.first_token(one.cluster, self._ttft_s)
        if tpot_s is not None:
            statistics.sums["tpot"].add(one.cluster, tpot_s)
        if complete and self._tokens:
            statistics.sums["length"].add(one.cluster, self._tokens)
