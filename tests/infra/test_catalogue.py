"""The catalogue says where its prices are from, and what is wrong with another one."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from infra_pulumi.catalogue import Catalogue, CatalogueError, load


def test_every_row_says_where_its_price_is_from() -> None:
    types = load().instance_types

    assert len(types) >= 25
    assert {each.provider for each in types} == {"aws", "gcp", "azure"}
    assert all(each.usd_per_hour > 0 and each.source and each.as_of <= datetime.date(2026, 11, 27) for each in types)
    assert all(each.compute_capability for each in types if each.gpu)


def test_volta_is_refused() -> None:
    refused = [each.type for each in load().instance_types if each.refused]

    assert refused == ["p3.2xlarge"]
    assert refused == [each.type for each in load().instance_types if each.compute_capability == "7.0"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("instance_types: [{type: x}]", "instance_types.0.provider"),
        ("a: [", "is not YAML"),
        ("instance_types: []\nmore: 1", "more"),
    ],
)
def test_another_catalogue_that_is_wrong(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)

    with pytest.raises(CatalogueError, match=wrong):
        load(file)


def test_half_a_gpu_is_wrong() -> None:
    with pytest.raises(ValueError, match="go together"):
        Catalogue(instance_types=({**load().get("aws", "g5.xlarge").model_dump(), "gpu_count": 0},))


def test_the_same_twice_is_wrong() -> None:
    there = load().get("aws", "g5.xlarge")

    with pytest.raises(ValueError, match=r"twice in the catalogue: aws:us-west-2:g5\.xlarge"):
        Catalogue(instance_types=(there, there))
