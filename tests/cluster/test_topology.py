"""The picture of a cluster: well-formed, within its frame, and about this cluster."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from infra_pulumi.topology import WIDTH, svg
from tests.cluster.helpers import CLOUDS, KNOWN, changed, description

_SVG = "{http://www.w3.org/2000/svg}"


def texts(picture: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(picture).iter(f"{_SVG}text")]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_everything_is_within_the_frame(cloud: str) -> None:
    root = ET.fromstring(svg(description(cloud), KNOWN))
    height = float(root.attrib["height"])
    for box in root.iter(f"{_SVG}rect"):
        x, y, wide, high = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + wide <= WIDTH
        assert y + high <= height


def test_no_line_is_wider_than_its_box_with_the_longest_names_there_are() -> None:
    """Boxes are 320 and 300 wide less their margins; a letter of 13 pixels is at most 8 wide, a bold one of 14 at 9."""
    pool = {"name": "a" * 9, "instance_types": ["Standard_NC96ads_A100_v4"], "min": 10, "max": 100}
    said = texts(svg(changed("azure", pool={**pool, "on_demand_base": 5}), KNOWN))
    assert "GPU pool aaaaaaaaa: 10 to 100 nodes" in said
    assert "4 x A100, spot, 5 on demand" in said
    assert [line for line in said if "pool" in line and len(line) * 9 > 320] == []
    assert [line for line in said if line.startswith(("one Ray", "Standard_")) and len(line) * 8 > 340] == []


def test_it_says_who_reaches_the_kubernetes_api() -> None:
    assert any("from inside only" in line for line in texts(svg(description("aws"), KNOWN)))
    named = changed("aws", network={"api_cidrs": ["203.0.113.0/24"]})
    assert any("203.0.113.0/24" in line for line in texts(svg(named, KNOWN)))


def test_it_has_two_colour_schemes_and_no_colour_of_its_own_in_a_shape() -> None:
    picture = svg(description("aws"), KNOWN)
    assert "prefers-color-scheme: dark" in picture
    assert "fill=" not in picture
    assert "stroke=" not in picture


def test_more_pools_make_it_higher() -> None:
    one = changed("aws")
    pools = [{"name": f"p{number}", "instance_types": ["g5.xlarge"]} for number in range(4)]
    many = one.model_validate({**one.model_dump(), "gpu_pools": pools})
    assert sum("GPU pool" in line for line in texts(svg(many, KNOWN))) == 4
    heights = [float(ET.fromstring(svg(each, KNOWN)).attrib["height"]) for each in (one, many)]
    assert heights[1] > heights[0]
