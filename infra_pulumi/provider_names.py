"""Naming patterns and defaults of the three clouds: regions, zones, principals and machine types."""

from __future__ import annotations

import re
from collections.abc import Iterator

KUBERNETES_VERSION = "1.35"  # in standard support: EKS charges six times the price for older versions
OLDEST_KUBERNETES = "1.34"

DEFAULT_REGION = {"aws": "us-west-2", "gcp": "us-central1", "azure": "eastus"}

REGION = {
    "aws": r"(af|ap|ca|eu|il|me|mx|sa|us)(-gov)?-(central|(north|south)?(east|west)|north|south)-\d",
    "gcp": r"(africa|asia|australia|europe|me|northamerica|southamerica|us)-[a-z]+\d{1,2}",
    "azure": r"[a-z]{4,24}\d?",
}

# Regions whose first zones are not a, b and c. Sources: AWS's list of availability zones (most accounts have a and c in
# us-west-1, and newer accounts have no b in ap-northeast-1), Google's "Regions and zones".
_ZONES = {
    "us-west-1": ("a", "c"),
    "ap-northeast-1": ("a", "c"),
    "us-east1": ("b", "c", "d"),
    "europe-west1": ("b", "c", "d"),
}


def default_zones(provider: str, region: str) -> tuple[str, ...]:
    """Two zones on AWS, which charges for traffic between zones; three zones elsewhere."""
    match provider:
        case "aws":
            return tuple(f"{region}{letter}" for letter in _ZONES.get(region, ("a", "b")))
        case "gcp":
            return tuple(f"{region}-{letter}" for letter in _ZONES.get(region, ("a", "b", "c")))
        case _:
            return ("1", "2", "3")


def zone_pattern(provider: str, region: str) -> str:
    """A regular expression for the zones of a region."""
    return {"aws": rf"{region}[a-f]", "gcp": rf"{region}-[a-f]", "azure": "[123]"}[provider]


PRINCIPAL = {
    "aws": (r"arn:aws[a-z-]*:iam::\d{12}:(user|role)/[\w+=,.@/-]+", "arn:aws:iam::123456789012:role/team"),
    "gcp": (r"(user|group|serviceAccount):[^@\s]+@[^@\s]+", "group:team@host.org"),
    "azure": (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "the object id of a user or a group"),
}

_TYPE = {
    "aws": (r"[a-z][a-z0-9-]*\.[a-z0-9-]+", "g5.xlarge"),
    "gcp": (r"[a-z][a-z0-9]*-[a-z0-9-]+(\+[a-z0-9]+)?", "g2-standard-4, or n1-standard-4+t4 for one with a T4"),
    "azure": (r"Standard_[A-Z][A-Za-z0-9_-]+", "Standard_NC24ads_A100_v4"),
}


def type_faults(provider: str, instance_type: str) -> Iterator[str]:
    """A sentence if the name does not have the form of the provider's instance types."""
    pattern, example = _TYPE[provider]
    if not re.fullmatch(pattern, instance_type):
        yield f"{instance_type!r} is not an instance type of {provider}; write it like {example}"
