"""Cost of clusters, compared with sums computed by hand; machines that hold a model."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml

from infra_pulumi import catalogue, cost, model_sizing
from infra_pulumi.catalogue import CatalogueError
from infra_pulumi.sizing_facts import GPUS, Dtype, Load
from infra_pulumi.spec import SpecError, parse
from tests.infra.helpers import document

TODAY = datetime.date(2026, 11, 27)


def test_aws_cost_equals_hand_computed_sum() -> None:
    spec = parse(document(pool={"max": 4}, network={"nat": "per-zone"}))
    found = cost.estimate(spec, catalogue.load(), busy_share=0.5)
    always = 0.10 * 730 + 1 + 2 * (0.045 + 0.005) * 730  # control plane, key, two NAT gateways with an address each
    system = 0.4032 * 730 + 100 * 0.08 + 125 * 0.04  # m7i.2xlarge, and a disk of 250 MiB/s
    gpu = 1.006 * 730 + 200 * 0.08 + 125 * 0.04
    assert found.idle == pytest.approx(always + 2 * system, rel=0.01)
    assert found.expected == pytest.approx(always + 2 * system + 2 * gpu, rel=0.01)
    assert found.maximum == pytest.approx(always + 4 * system + 4 * gpu, rel=0.01)


def test_gcp_cost_equals_hand_computed_sum() -> None:
    spec = parse(document("gcp", pool={"min": 1, "max": 3}))
    found = cost.estimate(spec, catalogue.load(), busy_share=0.25)
    system, gpu = 0.388472 * 730 + 100 * 0.10, 0.706832 * 730 + 200 * 0.10
    assert found.idle == pytest.approx((0.10 + 0.005 + 3 * 0.0014) * 730 + 2 * system + gpu, rel=0.01)
    assert found.expected == pytest.approx((0.10 + 0.005 + 3.5 * 0.0014) * 730 + 2 * system + 1.5 * gpu, rel=0.01)
    assert found.maximum == pytest.approx((0.10 + 0.005 + 7 * 0.0014) * 730 + 4 * system + 3 * gpu, rel=0.01)


def test_azure_cost_equals_hand_computed_sum() -> None:
    spec = parse(document("azure", pool={"max": 2}))
    found = cost.estimate(spec, catalogue.load(), busy_share=0.25)
    always = (0.10 + 0.045 + 0.005) * 730
    system, gpu = 0.384 * 730 + 19.71, 3.673 * 730 + 38.01  # disks of 128 and 256 GiB
    assert found.idle == pytest.approx(always + 2 * system, rel=0.01)
    assert found.expected == pytest.approx(always + 2 * system + 0.5 * gpu, rel=0.01)
    assert found.maximum == pytest.approx(always + 4 * system + 2 * gpu, rel=0.01)


@pytest.fixture
def with_spot(tmp_path: Path) -> catalogue.Catalogue:
    content = yaml.safe_load(Path("infra_pulumi/catalogue.yaml").read_text())
    (machine,) = [each for each in content["instance_types"] if each["type"] == "g5.xlarge"]
    machine |= {"spot_usd_per_hour": 0.4, "spot_as_of": TODAY, "spot_source": "a test"}
    path = tmp_path / "prices.yaml"
    path.write_text(yaml.safe_dump(content))
    return catalogue.load(path)


def test_the_on_demand_group_of_a_spot_pool_has_the_on_demand_price(with_spot: catalogue.Catalogue) -> None:
    spec = parse(document(pool={"spot": True, "min": 1, "on_demand_base": 1, "max": 3}))
    lines = {line.what: line for line in cost.estimate(spec, with_spot).lines}
    assert lines["gpuod: g5.xlarge"].maximum == pytest.approx(1.006 * 730)
    assert lines["gpusp: g5.xlarge, spot"].maximum == pytest.approx(2 * 0.4 * 730)
    assert lines["gpusp: g5.xlarge, spot"].source == "a test"


def test_an_unknown_spot_price_is_replaced_by_the_on_demand_price_with_a_warning() -> None:
    spec = parse(document("azure", pool={"instance_types": ["Standard_NC8as_T4_v3"], "spot": True}))
    without_spot_price = (
        catalogue.load()
        .get("azure", "Standard_NC8as_T4_v3")
        .model_copy(update={"spot_usd_per_hour": None, "spot_as_of": None, "spot_source": None})
    )
    system = catalogue.load().get("azure", "Standard_D8s_v5")
    reduced = catalogue.Catalogue(instance_types=(without_spot_price, system))
    (line,) = [each for each in cost.estimate(spec, reduced).lines if each.what.endswith(", spot")]
    assert line.assumed == "spot price unknown: on-demand price"
    assert line.maximum == pytest.approx(4 * 0.752 * 730)
    assert "The spot price of Standard_NC8as_T4_v3 is unknown" in "\n".join(catalogue.warnings(spec, reduced, TODAY))


def test_every_price_has_a_date_and_a_source() -> None:
    for provider in ("aws", "gcp", "azure"):
        for line in cost.estimate(parse(document(provider)), catalogue.load()).lines:
            assert line.source
            assert line.as_of.year >= 2025
    assert len([each for each in catalogue.load().instance_types if each.gpu]) >= 25


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (["p3.2xlarge"], "p3.2xlarge is refused: torch's CUDA 13 builds have no Volta; take g5.xlarge"),
        (["g5g.xlarge"], "g5g.xlarge cannot run the service: its processor is ARM"),
        (["g4ad.xlarge"], "g4ad.xlarge cannot run the service: its GPUs are from AMD"),
        (["g5.xlrge"], "unknown machine 'g5.xlrge' of aws; did you mean g5.xlarge"),
        (["c7i.xlarge"], "c7i.xlarge has no GPU"),
        (["g5.xlarge", "g6.xlarge"], "these types have different GPUs"),
    ],
)
def test_invalid_machines_are_refused(pool: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        catalogue.check(parse(document(pool={"instance_types": pool})), catalogue.load())
    assert message in str(caught.value)


def test_allow_refused_allows_a_refused_machine_with_a_warning() -> None:
    spec = parse(document(pool={"instance_types": ["p3.2xlarge"]}, allow_refused=True))
    catalogue.check(spec, catalogue.load())
    assert "p3.2xlarge is allowed by allow_refused, although" in "\n".join(
        catalogue.warnings(spec, catalogue.load(), TODAY)
    )


def test_a_gpu_machine_in_the_system_pool_is_refused() -> None:
    with pytest.raises(SpecError, match="which the system pool does not use"):
        catalogue.check(parse(document(system={"instance_type": "g5.xlarge"})), catalogue.load())


def test_a_missing_or_incomplete_catalogue_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    with pytest.raises(CatalogueError, match="No such file"):
        catalogue.load(path)
    path.write_text("instance_types: [{provider: aws}]")
    with pytest.raises(CatalogueError, match=r"instance_types\.0\.vcpu: Field required"):
        catalogue.load(path)


# --- machines that hold a model


@pytest.mark.parametrize(("text", "count"), [("7b", 7e9), ("0.5B", 5e8), ("135m", 1.35e8)])
def test_model_sizes_are_parsed(text: str, count: float) -> None:
    assert model_sizing.parameters(text) == count


@pytest.mark.parametrize("text", ["7", "b", "7t", "-1b", "99999b", "1e9b", ""])
def test_invalid_model_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it like 7b"):
        model_sizing.parameters(text)


def test_required_memory_equals_hand_computed_value() -> None:
    load = Load(streams=32, context=2048)
    assert model_sizing.required_bytes(7e9, "int8", load) == 7e9 * 1.04 + 128 * 1024 * 32 * 2048
    assert model_sizing.required_bytes(7e9, "float16", load) == 14e9 + 8 * 2**30


def ranked(size: str, dtype: Dtype, **measured: float) -> dict[str, model_sizing.Fit]:
    names = {name.replace("_", "."): rate for name, rate in measured.items()}
    found = model_sizing.ranked(catalogue.load(), model_sizing.parameters(size), dtype, Load(), names)
    assert [fit.usd_per_million_tokens for fit in found] == sorted(fit.usd_per_million_tokens for fit in found)
    return {fit.machine.type: fit for fit in found}


def test_machines_with_too_little_memory_are_not_ranked() -> None:
    small, big = ranked("7b", "int8"), ranked("70b", "float16")
    assert "g4dn.xlarge" not in small  # 14.8 GiB in 16, of which 12.9 are free
    assert small["g5.xlarge"].replicas == 1
    assert small["g5.12xlarge"].replicas == 4
    assert set(big) == {
        "Standard_NC80adis_H100_v5",
        "Standard_NC96ads_A100_v4",
        "g5.48xlarge",
        "p4d.24xlarge",
        "p5.48xlarge",
    }
    assert big["p5.48xlarge"].gpus_per_replica == 3
    assert "p3.2xlarge" not in ranked("1b", "int8")


def test_gpus_without_bfloat16_are_not_ranked_for_it() -> None:
    assert "g4dn.xlarge" in ranked("1b", "float16")
    assert "g4dn.xlarge" not in ranked("1b", "bfloat16")


def test_a_measurement_replaces_the_derived_throughput() -> None:
    derived, measured = ranked("7b", "int8")["g5.xlarge"], ranked("7b", "int8", g5_xlarge=500)["g5.xlarge"]
    assert (derived.throughput, measured.throughput) == ("derived", "measured")
    assert measured.usd_per_million_tokens == pytest.approx(1.006 / 3600 / 500 * 1e6)


def test_the_derived_throughput_of_an_a100_is_close_to_a_measurement() -> None:
    """Llama-3.1-8B in 16 bits: 75 tokens a second at one stream (vLLM 0.23, A100 of 40 GiB, johnmusgrave.com)."""
    machine = catalogue.load().get("gcp", "a2-highgpu-1g")
    rate = model_sizing.derived_tokens_per_s(machine, 8e9, "bfloat16", Load(streams=1, context=1152))
    assert 0.6 < rate / 75 < 1.2


def test_every_gpu_of_the_catalogue_has_a_data_sheet() -> None:
    gpus = {(str(each.gpu), float(each.gpu_memory_gib or 0)) for each in catalogue.load().instance_types if each.gpu}
    assert gpus <= set(GPUS)


@pytest.mark.parametrize(("days", "stale"), [(catalogue.STALE_DAYS, False), (catalogue.STALE_DAYS + 1, True)])
def test_an_old_price_is_reported(days: int, stale: bool) -> None:
    spec = parse(document())
    oldest = min(catalogue.load().get("aws", name).as_of for pool in spec.gpu_pools for name in pool.instance_types)
    today = oldest + datetime.timedelta(days=days)
    found = [text for text in catalogue.warnings(spec, catalogue.load(), today) if text.startswith("The price of")]
    assert any(f"dates from {oldest}" in text for text in found) == stale
