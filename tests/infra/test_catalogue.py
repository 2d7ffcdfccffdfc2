"""The catalogue: sources of prices, and faults of other catalogue files."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from infra_pulumi.catalogue import Catalogue, CatalogueError, load


def test_every_row_has_the_source_of_its_price() -> None:
    types = load().instance_types

    assert len(types) >= 25
    assert {each.provider for each in types} == {"aws", "gcp", "azure"}
    assert all(each.usd_per_hour > 0 and each.source and each.as_of <= datetime.date(2026, 11, 27) for each in types)
    assert all(each.compute_capability for each in types if each.gpu)


def test_volta_gpus_are_refused() -> None:
    refused = [each.type for each in load().instance_types if each.refused]

    assert refused == ["p3.2xlarge"]
    assert refused == [each.type for each in load().instance_types if each.compute_capability == "7.0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instance_types: [{type: x}]", "instance_types.0.provider"),
        ("a: [", "is not valid YAML"),
        ("instance_types: []\nmore: 1", "more"),
    ],
)
def test_an_invalid_catalogue_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)

    with pytest.raises(CatalogueError, match=message):
        load(file)


def test_incomplete_gpu_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be set together"):
        Catalogue(instance_types=({**load().get("aws", "g5.xlarge").model_dump(), "gpu_count": 0},))


def test_a_duplicate_machine_is_an_error() -> None:
    machine = load().get("aws", "g5.xlarge")

    with pytest.raises(ValueError, match=r"duplicate machines in the catalogue: aws:us-west-2:g5\.xlarge"):
        Catalogue(instance_types=(machine, machine))
