"""What a throughput costs, and that the catalogue says where its prices are from."""

from __future__ import annotations

import datetime

import pytest

from infra_pulumi.catalogue import Catalogue
from perf.cost import CostError, UnknownInstanceType, best_stage, cost, find, main, stage_cost, stale
from perf.exits import Exit
from perf.results import Goodput
from tests.perf.made_runs import run, stage


def test_a_hand_sum() -> None:
    """g5.xlarge at 1.006 USD an hour, 500 tokens and 10 requests a second: 1.8 M tokens and 36,000 requests an hour."""
    found = cost("g5.xlarge", run(stage([50.0] * 20, tokens_per_s=500)))

    assert found.usd_per_million_output_tokens == pytest.approx(1.006 / 1.8, rel=1e-6)
    assert round(found.usd_per_million_output_tokens, 4) == 0.5589
    assert round(found.usd_per_thousand_requests, 4) == 0.0279
    assert (found.provider, found.usd_per_hour, found.stage) == ("aws", 1.006, "concurrency, 8 streams")


def test_an_anchor() -> None:
    """data-on-eks: 1,637 tokens a second on g6e.2xlarge are told there as 0.380 USD a million."""
    found = cost("g6e.2xlarge", run(stage([50.0] * 20, tokens_per_s=1637)))

    assert round(found.usd_per_million_output_tokens, 3) == 0.380


def test_the_stage_with_the_most_tokens_a_second_of_those_that_met_the_objective() -> None:
    slow, fast = stage([50.0] * 20, tokens_per_s=100), stage([900.0] * 20, name="32 streams", tokens_per_s=900)
    judged = {"goodput": Goodput(slo="ttft_p95<500ms", requests_per_s=1, share=1)}
    missed = fast.model_copy(update={**judged, "missed": ["ttft_p95 is 900 ms, not below 500 ms"]})
    late = fast.model_copy(update={"client": fast.client.model_copy(update={"limited": ["it was late"]})})

    assert best_stage(run(slow, fast)).name == "32 streams"
    assert best_stage(run(slow, late)).name == "8 streams"
    held = slow.model_copy(update=judged)
    assert best_stage(run(held, missed, slo="ttft_p95<500ms")).name == "8 streams"
    assert best_stage(run(held, fast, slo="ttft_p95<500ms")).name == "8 streams", "of the other it says nothing"
    with pytest.raises(CostError, match="no stage met ttft_p95<500ms"):
        best_stage(run(missed, slo="ttft_p95<500ms"))


def test_nothing_was_finished() -> None:
    with pytest.raises(CostError, match="finished nothing"):
        stage_cost("g5.xlarge", stage([50.0] * 20, tokens_per_s=0))
    with pytest.raises(CostError, match="has no stage"):
        cost("g5.xlarge", run())


@pytest.mark.parametrize("name", ["g5.xlarge", "G5.XLarge", "aws:g5.xlarge", "aws:us-west-2:g5.xlarge"])
def test_names_of_a_type(name: str) -> None:
    assert find(name).name == "aws:us-west-2:g5.xlarge"


def test_an_unknown_type_names_what_is_close() -> None:
    with pytest.raises(UnknownInstanceType, match=r"did you mean g5\.(2)?xlarge.*python -m perf\.cost"):
        find("g5.xlarg")
    with pytest.raises(UnknownInstanceType, match="no instance type 'nothing at all' is known; "):
        find("nothing at all")


def test_a_type_in_two_places_is_asked_which() -> None:
    there = find("g5.xlarge")
    both = Catalogue(instance_types=(there, there.model_copy(update={"region": "eu-west-1", "usd_per_hour": 1.123})))

    with pytest.raises(CostError, match=r"one of several: aws:us-west-2:g5\.xlarge, aws:eu-west-1:g5\.xlarge"):
        find("g5.xlarge", both)
    assert find("aws:eu-west-1:g5.xlarge", both).usd_per_hour == 1.123


def test_an_old_price_is_told() -> None:
    assert stale("2026-01-21", datetime.date(2026, 7, 20)) is None
    told = stale("2026-01-21", datetime.date(2026, 7, 21))
    assert told is not None
    assert told.startswith("The price is of 2026-01-21, 181 days ago")


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.OK

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("g5.xlarge") and line.rstrip().endswith("2026-01-21") for line in lines)
    assert main(["g5.xlarge"]) == Exit.USAGE
