"""The limits and the usage of an ingress, from its start to its end, with a real database."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import AppConfig
from serve_app.core.tenants import Limits
from serve_app.core.usage import Group, UsageQuery
from serve_app.deployments.ingress_quotas import IngressQuotas
from serve_app.errors import InsufficientQuota, NotReady
from serve_app.gateway.quota import Quota
from serve_app.telemetry.metrics import QuotaSeries
from tests.configs import app_args
from tests.gateway.scripted import model
from tests.gateway.test_quota import ScriptedTenants, ask, engine_with


def config(folder: Path, **sections: Any) -> AppConfig:
    return AppConfig.model_validate(app_args() | {"database": {"url": f"sqlite:///{folder / 'test.db'}"}} | sections)


@asynccontextmanager
async def started(config: AppConfig, limits: Limits) -> AsyncIterator[tuple[IngressQuotas, Quota, QuotaSeries]]:
    meter = QuotaSeries("r")
    quotas = IngressQuotas(config, "i", meter)
    shared = await quotas.start(ScriptedTenants(limits))
    try:
        yield quotas, Quota(engine_with(3, "a", "b"), model(), shared), meter
    finally:
        await quotas.stop()


async def answer(stage: Quota) -> None:
    async for _ in stage.generate(ask(max_tokens=10)):
        pass


def value(meter: QuotaSeries, name: str, **labels: str) -> float:
    samples = [sample for family in meter.families() for sample in family.samples if sample.name == f"serve_app_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def test_budgets_and_usage_outlive_the_process(tmp_path: Path) -> None:
    limits = Limits(tokens_per_month=24)
    async with started(config(tmp_path), limits) as (_, stage, meter):
        for _ in range(2):
            await answer(stage)
        assert value(meter, "budgets_nearly_used") == 0
    async with started(config(tmp_path), limits) as (quotas, stage, meter):
        (row,) = await quotas.report(UsageQuery(groups=(Group.TENANT, Group.KEY, Group.MODEL)))
        assert (row["tenant"], row["key"], row["model"]) == ("t", "k", "m")
        assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (2, 6, 4)
        await answer(stage)  # 10 are used, and at most 13 are reserved
        with pytest.raises(InsufficientQuota):
            await answer(stage)
        assert value(meter, "quota_refusals_total", subject="key", limit="tokens_per_month") == 1


async def test_a_budget_that_is_nearly_used_is_a_metric(tmp_path: Path) -> None:
    async with started(config(tmp_path), Limits(tokens_per_day=14)) as (_, stage, meter):
        await answer(stage)
        assert value(meter, "budgets_nearly_used", period="day") == 1, "while the request ran"
        assert value(meter, "budgets_nearly_used", period="month") == 0


async def test_a_database_that_is_away_delays_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with started(config(tmp_path / "missing"), Limits(tokens_per_day=1000)) as (quotas, stage, _):
        await answer(stage)
        with pytest.raises(NotReady):
            await quotas.report(UsageQuery())
    assert any("budgets begin with nothing used" in line for line in caplog.messages)


async def test_several_ingresses_without_a_server_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    deployment = {"num_replicas": 2, "max_ongoing_requests": 8, "max_queued_requests": 8}
    async with started(config(tmp_path, ingress={"deployment": deployment}), Limits()):
        assert any("Set quotas.url" in line for line in caplog.messages)
