"""The diagram of a cluster: valid SVG, inside its frame, with the cluster's data."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from infra_pulumi.topology import WIDTH, svg
from tests.cluster.helpers import CATALOGUE, CLOUDS, changed, description

_SVG = "{http://www.w3.org/2000/svg}"


def texts(image: str) -> list[str]:
    """The lines of text in an SVG."""
    return [each.text or "" for each in ET.fromstring(image).iter(f"{_SVG}text")]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_all_boxes_are_inside_the_frame(cloud: str) -> None:
    root = ET.fromstring(svg(description(cloud), CATALOGUE))
    height = float(root.attrib["height"])
    for box in root.iter(f"{_SVG}rect"):
        x, y, box_width, box_height = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + box_width <= WIDTH
        assert y + box_height <= height


def test_the_longest_names_fit_into_their_boxes() -> None:
    """Boxes are 320 px wide. A character of the 13 px font is at most 8 px wide, of the bold 14 px font 9 px."""
    pool = {"name": "a" * 9, "instance_types": ["Standard_NC96ads_A100_v4"], "min": 10, "max": 100}
    lines = texts(svg(changed("azure", pool={**pool, "on_demand_base": 5}), CATALOGUE))
    assert "GPU pool aaaaaaaaa: 10 to 100 nodes" in lines
    assert "4 x A100, spot, 5 on demand" in lines
    assert [line for line in lines if "pool" in line and len(line) * 9 > 320] == []
    assert [line for line in lines if line.startswith(("one Ray", "Standard_")) and len(line) * 8 > 340] == []


def test_the_diagram_shows_the_addresses_that_reach_the_kubernetes_api() -> None:
    assert any("only from inside" in line for line in texts(svg(description("aws"), CATALOGUE)))
    public = changed("aws", network={"api_cidrs": ["203.0.113.0/24"]})
    assert any("203.0.113.0/24" in line for line in texts(svg(public, CATALOGUE)))


def test_the_style_sheet_has_all_colours_for_light_and_dark() -> None:
    image = svg(description("aws"), CATALOGUE)
    assert "prefers-color-scheme: dark" in image
    assert "fill=" not in image
    assert "stroke=" not in image


def test_more_pools_increase_the_height() -> None:
    one = changed("aws")
    pools = [{"name": f"p{number}", "instance_types": ["g5.xlarge"]} for number in range(4)]
    many = one.model_validate({**one.model_dump(), "gpu_pools": pools})
    assert sum("GPU pool" in line for line in texts(svg(many, CATALOGUE))) == 4
    heights = [float(ET.fromstring(svg(each, CATALOGUE)).attrib["height"]) for each in (one, many)]
    assert heights[1] > heights[0]
