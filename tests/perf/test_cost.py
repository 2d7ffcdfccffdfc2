"""The cost of a throughput on an instance type of the catalogue."""

from __future__ import annotations

import datetime

import pytest

from infra_pulumi.catalogue import Catalogue
from perf.cost import CostError, UnknownInstanceType, best_stage, cost, find, main, stage_cost, stale
from perf.exits import Exit
from perf.results import Goodput
from tests.perf.run_factory import run, stage


def test_cost_matches_a_calculation_by_hand() -> None:
    """g5.xlarge: 1.006 USD per hour; 500 tokens/s and 10 requests/s are 1.8 M tokens and 36,000 requests per hour."""
    found = cost("g5.xlarge", run(stage([50.0] * 20, tokens_per_s=500)))

    assert found.usd_per_million_output_tokens == pytest.approx(1.006 / 1.8, rel=1e-6)
    assert round(found.usd_per_million_output_tokens, 4) == 0.5589
    assert round(found.usd_per_thousand_requests, 4) == 0.0279
    assert (found.provider, found.usd_per_hour, found.stage) == ("aws", 1.006, "concurrency, 8 streams")


def test_cost_matches_a_published_figure() -> None:
    """data-on-eks publishes 0.380 USD per million tokens for 1,637 tokens per second on g6e.2xlarge."""
    found = cost("g6e.2xlarge", run(stage([50.0] * 20, tokens_per_s=1637)))

    assert round(found.usd_per_million_output_tokens, 3) == 0.380


def test_best_stage_has_the_highest_throughput_of_those_that_met_the_objective() -> None:
    slow, fast = stage([50.0] * 20, tokens_per_s=100), stage([900.0] * 20, name="32 streams", tokens_per_s=900)
    evaluated = {"goodput": Goodput(slo="ttft_p95<500ms", requests_per_s=1, share=1)}
    missed = fast.model_copy(update={**evaluated, "missed": ["ttft_p95 is 900 ms, not below 500 ms"]})
    late = fast.model_copy(update={"client": fast.client.model_copy(update={"limited": ["the client was late"]})})

    assert best_stage(run(slow, fast)).name == "32 streams"
    assert best_stage(run(slow, late)).name == "8 streams"
    met = slow.model_copy(update=evaluated)
    assert best_stage(run(met, missed, slo="ttft_p95<500ms")).name == "8 streams"
    assert best_stage(run(met, fast, slo="ttft_p95<500ms")).name == "8 streams", (
        "the objective was not evaluated at the other stage"
    )
    with pytest.raises(CostError, match="no stage met ttft_p95<500ms"):
        best_stage(run(missed, slo="ttft_p95<500ms"))


def test_stage_without_a_finished_request_has_no_cost() -> None:
    with pytest.raises(CostError, match="finished no request"):
        stage_cost("g5.xlarge", stage([50.0] * 20, tokens_per_s=0))
    with pytest.raises(CostError, match="has no stage"):
        cost("g5.xlarge", run())


@pytest.mark.parametrize("name", ["g5.xlarge", "G5.XLarge", "aws:g5.xlarge", "aws:us-west-2:g5.xlarge"])
def test_instance_type_has_three_names(name: str) -> None:
    assert find(name).name == "aws:us-west-2:g5.xlarge"


def test_unknown_type_suggests_similar_names() -> None:
    with pytest.raises(UnknownInstanceType, match=r"did you mean g5\.(2)?xlarge.*python -m perf\.cost"):
        find("g5.xlarg")
    with pytest.raises(UnknownInstanceType, match="unknown instance type 'nothing at all'; "):
        find("nothing at all")


def test_type_in_two_regions_is_ambiguous() -> None:
    there = find("g5.xlarge")
    both = Catalogue(instance_types=(there, there.model_copy(update={"region": "eu-west-1", "usd_per_hour": 1.123})))

    with pytest.raises(
        CostError, match=r"is ambiguous; write one of aws:us-west-2:g5\.xlarge, aws:eu-west-1:g5\.xlarge"
    ):
        find("g5.xlarge", both)
    assert find("aws:eu-west-1:g5.xlarge", both).usd_per_hour == 1.123


def test_old_price_has_a_warning() -> None:
    assert stale("2026-01-21", datetime.date(2026, 7, 20)) is None
    warning = stale("2026-01-21", datetime.date(2026, 7, 21))
    assert warning is not None
    assert warning.startswith("The price is from 2026-01-21, 181 days ago")


def test_command_lists_the_instance_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.OK

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("g5.xlarge") and line.rstrip().endswith("2026-01-21") for line in lines)
    assert main(["g5.xlarge"]) == Exit.USAGE
