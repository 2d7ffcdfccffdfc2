"""How the three clouds name regions, zones and machines, as far as a name alone can be judged."""

from __future__ import annotations

import re
from collections.abc import Iterator

KUBERNETES_VERSION = "1.35"  # EKS takes more than six times as much for one that is out of standard support
OLDEST_KUBERNETES = "1.34"

DEFAULT_REGION = {"aws": "us-west-2", "gcp": "us-central1", "azure": "eastus"}

REGION = {
    "aws": r"(af|ap|ca|eu|il|me|mx|sa|us)(-gov)?-(central|(north|south)?(east|west)|north|south)-\d",
    "gcp": r"(africa|asia|australia|europe|me|northamerica|southamerica|us)-[a-z]+\d{1,2}",
    "azure": r"[a-z]{4,24}\d?",
}

# Where the first zones are not a and b, or a, b and c. Sources: AWS's list of availability zones (us-west-1 gives most
# accounts a and c, ap-northeast-1 has no b for accounts that began late), Google's "Regions and zones".
_ZONES = {
    "us-west-1": ("a", "c"),
    "ap-northeast-1": ("a", "c"),
    "us-east1": ("b", "c", "d"),
    "europe-west1": ("b", "c", "d"),
}


def default_zones(provider: str, region: str) -> tuple[str, ...]:
    """Two zones on AWS, whose traffic between zones costs; three elsewhere."""
    match provider:
        case "aws":
            return tuple(f"{region}{letter}" for letter in _ZONES.get(region, ("a", "b")))
        case "gcp":
            return tuple(f"{region}-{letter}" for letter in _ZONES.get(region, ("a", "b", "c")))
        case _:
            return ("1", "2", "3")


def zone_pattern(provider: str, region: str) -> str:
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


def misnamed(provider: str, instance_type: str) -> Iterator[str]:
    """A sentence where the provider has no machine of such a name."""
    pattern, example = _TYPE[provider]
    if not re.fullmatch(pattern, instance_type):
        yield f"{instance_type!r} is no instance type of {provider}; they are written like {example}"
