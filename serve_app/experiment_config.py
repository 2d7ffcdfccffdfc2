"""The `user_config` of the ingress: experiments, which split the requests for one name over variants of a model."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError, field_validator, model_validator

from serve_app.config import AppConfig, ConfigError, SamplingDefaults, Section, check_template, describe, template_path
from serve_app.lora_config import NAME_PATTERN

_VARIANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Variant(Section):
    """One variant: a model of the configuration, and what differs from the model's own settings.

    `adapter` is a LoRA adapter of the model. `sampling_defaults` and `chat_template` replace those of the model. The
    first variant of an experiment is its control, which gets the requests that no other variant gets.
    """

    name: str = Field(min_length=1, max_length=64, pattern=_VARIANT_PATTERN)
    model: str = Field(min_length=1)
    percent: float = Field(0, ge=0, le=100)
    adapter: str | None = Field(None, min_length=1)
    sampling_defaults: SamplingDefaults | None = None
    chat_template: str | None = Field(None, min_length=1)

    @field_validator("chat_template")
    @classmethod
    def _check_chat_template(cls, source: str | None) -> str | None:
        return check_template(source)


class RampStep(Section):
    """From the instant `at` on, the variants get `percent` of their share."""

    at: AwareDatetime
    percent: float = Field(ge=0, le=100)


class Shadow(Section):
    """Mirrors `percent` of the requests to a variant and drops its answers. At most `max_running` run in an ingress."""

    variant: str = Field(min_length=1)
    percent: float = Field(100, gt=0, le=100)
    max_running: int = Field(4, ge=1, le=64)


class Guards(Section):
    """The tolerances beyond which an experiment stops. None switches a guard off.

    `error_rate` is the difference of the shares of failed requests. `ttft_p95` and `tpot` are ratios to the control: of
    the 95th percentile of the time to the first token, and of the mean time per output token.
    """

    error_rate: float | None = Field(0.01, ge=0, le=1)
    ttft_p95: float | None = Field(1.5, ge=1)
    tpot: float | None = Field(1.5, ge=1)


class Experiment(Section):
    """Requests that name `name` as their model go to one of the variants, always to the same one for each `unit`.

    A higher `revision` begins the statistics anew, and ends the stop by a guard.
    """

    name: str = Field(min_length=1, max_length=128, pattern=NAME_PATTERN)
    revision: int = Field(1, ge=1)
    unit: Literal["user", "key", "session", "request"] = "user"
    variants: Annotated[tuple[Variant, ...], Field(min_length=2, max_length=8)]
    ramp: Annotated[tuple[RampStep, ...], Field(max_length=32)] = ()
    shadow: Shadow | None = None
    guards: Guards = Guards()

    @property
    def control(self) -> Variant:
        return self.variants[0]

    @model_validator(mode="after")
    def _check_variants(self) -> Experiment:
        names = [variant.name for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several variants have the name {', '.join(twice)}")
        if "percent" in self.control.model_fields_set:
            raise ValueError(f"remove percent of {self.control.name}: the first variant gets what the others leave")
        if (total := sum(variant.percent for variant in self.variants)) > 100:
            raise ValueError(f"the percent of the variants are {total:g} together, above 100")
        if self.shadow is not None and self.shadow.variant not in names[1:]:
            raise ValueError(f"shadow.variant {self.shadow.variant} is none of {', '.join(names[1:])}")
        return self

    @model_validator(mode="after")
    def _check_ramp(self) -> Experiment:
        if any(one.at >= later.at for one, later in pairwise(self.ramp)):
            raise ValueError("the steps of ramp are not in the order of their times")
        return self


class Experiments(Section):
    """The `user_config` of the ingress, which can change while the service runs."""

    experiments: Annotated[tuple[Experiment, ...], Field(max_length=32)] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Experiments:
        names = [experiment.name for experiment in self.experiments]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several experiments have the name {', '.join(twice)}")
        return self


def parse_experiments(document: object) -> Experiments:
    """Raises ConfigError, with every fault and its place."""
    try:
        return Experiments.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"user_config:\n{describe(error)}") from None


def check_models(experiments: Experiments, config: AppConfig, adapters: dict[str, str]) -> None:
    """Raises ConfigError if a variant names a model or an adapter that the service does not have.

    `adapters` maps the names of the LoRA adapters to the models that they belong to.
    """
    models, faults = {model.name for model in config.models}, []
    for experiment in experiments.experiments:
        for variant in experiment.variants:
            place = f"{experiment.name}, variant {variant.name}"
            if variant.model not in models:
                faults.append(f"  {place}: there is no model {variant.model}; the models are {', '.join(models)}")
            elif variant.adapter is not None and adapters.get(variant.adapter) != variant.model:
                faults.append(f"  {place}: model {variant.model} has no LoRA adapter {variant.adapter}")
    if faults:
        raise ConfigError("user_config:\n" + "\n".join(faults))


def template_text(variant: Variant) -> str:
    """The Jinja source of a variant's chat template; "" for that of the model. Raises ConfigError."""
    if variant.chat_template is None:
        return ""
    path = template_path(variant.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"user_config: the chat template {path} of {variant.name} cannot be read: {error}") from None
