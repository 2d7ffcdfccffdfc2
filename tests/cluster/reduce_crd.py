"""Converts KubeRay's CustomResourceDefinition of a RayService into the JSON Schema that tests validate manifests with.

Usage: `python tests/cluster/reduce_crd.py helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml 1.7.0` in a clone of
github.com/ray-project/kuberay (Apache-2.0) at that tag. Parts that belong to Kubernetes are removed, because tests
validate them with Kubernetes' schemas; this reduces 1 MB to a few kB. The schema refuses unknown keys.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMA = Path(__file__).with_name("kuberay-rayservice.json")
# Keys whose values are parts of Kubernetes' own kinds.
_KUBERNETES = {
    "affinity",
    "egressRules",
    "env",
    "envFrom",
    "headService",
    "ingressRules",
    "resources",
    "securityContext",
    "serveService",
    "template",
    "valueFrom",
    "volumeMounts",
}
_KEYWORDS = ("type", "enum", "required", "minimum", "maximum", "pattern", "anyOf", "format")


def reduce(schema: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The schema without Kubernetes' own kinds, refusing unknown keys."""
    if name in _KUBERNETES:
        return {"type": schema["type"]}
    reduced: dict[str, Any] = {keyword: schema[keyword] for keyword in _KEYWORDS if keyword in schema}
    if "properties" in schema:
        reduced["properties"] = {key: reduce(value, key) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            reduced["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        reduced["additionalProperties"] = reduce(schema["additionalProperties"])
    if "items" in schema:
        reduced["items"] = reduce(schema["items"])
    return reduced


def main(crd: Path, version: str) -> None:
    content = crd.read_bytes()
    (schema,) = (
        each["schema"]["openAPIV3Schema"]
        for each in yaml.load(content, Loader=yaml.CSafeLoader)["spec"]["versions"]
        if each["name"] == "v1"
    )
    properties = schema["properties"]
    document = {
        "$comment": "Reduced by tests/cluster/reduce_crd.py from KubeRay's ray.io_rayservices.yaml (Apache-2.0).",
        "kuberay": version,
        "sha256": hashlib.sha256(content).hexdigest(),
        "schema": {
            "type": "object",
            "required": ["apiVersion", "kind", "metadata", "spec"],
            "additionalProperties": False,
            "properties": {
                "apiVersion": {"enum": ["ray.io/v1"]},
                "kind": {"enum": ["RayService"]},
                "metadata": {"type": "object"},
                "spec": reduce(properties["spec"]),
            },
        },
    }
    SCHEMA.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
