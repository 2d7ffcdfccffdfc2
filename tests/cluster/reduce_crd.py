"""From KubeRay's CustomResourceDefinition of a RayService to the JSON Schema that tests hold manifests against.

`python tests/cluster/reduce_crd.py helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml 1.7.0`, in a clone of
github.com/ray-project/kuberay (Apache-2.0) at that tag. A megabyte becomes some kilobytes: what belongs to Kubernetes
itself is left out, and is held against its own schemas. A key that is not in the schema is an error.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = Path(__file__).with_name("kuberay-rayservice.json")
# Parts of Kubernetes' own kinds, by their names wherever they occur.
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
_WORDS = ("type", "enum", "required", "minimum", "maximum", "pattern", "anyOf", "format")


def reduce(schema: dict[str, Any], name: str = "") -> dict[str, Any]:
    """The same without what is Kubernetes' own, and with unknown keys refused."""
    if name in _KUBERNETES:
        return {"type": schema["type"]}
    reduced: dict[str, Any] = {word: schema[word] for word in _WORDS if word in schema}
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
    KEPT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
