"""Renders a description as files: Kubernetes manifests, Helm values, `ray up` files and a diagram."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from infra_pulumi.catalogue import Catalogue, check
from infra_pulumi.charts import Chart, charts
from infra_pulumi.objects import namespace_objects
from infra_pulumi.prepull import prepull_objects
from infra_pulumi.rayservice import images, rayservice
from infra_pulumi.rayup import on_premises, rayup
from infra_pulumi.serve_config import Object, cluster_config, longest_request_s, read_config, server_ports, vllm_models
from infra_pulumi.spec import ClusterSpec
from infra_pulumi.topology import svg

_HEADER = "Written by `python -m infra_pulumi render`; change the description, not this file."

# The values of an account that a `ray up` file needs, and where to find them.
_ACCOUNT_VALUES = {
    "aws": (
        "REPLACE_IMAGE: an Ubuntu 24.04 image with NVIDIA's driver:",
        "  aws ssm get-parameter --query Parameter.Value --name"
        " /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
        "REPLACE_NETWORK: a security group with one rule, which allows its own members. Otherwise Ray creates a group",
        "  that allows SSH from all addresses.",
        "REPLACE_SUBNET: a private subnet of the group's network, with NAT.",
        "REPLACE_HEAD_IDENTITY, REPLACE_WORKER_IDENTITY: instance profiles with AmazonSSMManagedInstanceCore. The",
        "  head's profile also needs rights to start, tag, describe and terminate instances, and to pass the",
        "  workers' role. Otherwise Ray creates a role with AmazonEC2FullAccess and AmazonS3FullAccess.",
    ),
    "gcp": (
        "REPLACE_ACCOUNT: the project. Ray creates the head's service account.",
        "REPLACE_IMAGE: the full name of an Ubuntu 24.04 image with NVIDIA's driver, signed for Secure Boot:",
        "  gcloud compute images list --project=deeplearning-platform-release --no-standard-images",
        "REPLACE_NETWORK: the full name of a subnetwork with Cloud NAT. Its firewall allows SSH only from",
        "  Identity-Aware Proxy, 35.235.240.0/20.",
        "REPLACE_WORKER_IDENTITY: the address of a service account with read access to the weights.",
    ),
    "azure": (
        "REPLACE_ACCOUNT: the subscription.",
        "REPLACE_IMAGE: the resource id of an Ubuntu 24.04 image with NVIDIA's driver.",
        "REPLACE_NETWORK: the address range of the network that Ray creates, such as 10.60.0.0/16. The network has no",
        "  outbound or inbound route: while Ray waits for the head (15 minutes), add a NAT gateway and peer it with",
        "  the network of this machine. A second `ray up` continues.",
        "REPLACE_HEAD_IDENTITY: a managed identity in the resource group below, for the head and the workers.",
    ),
}


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as blocks, and no YAML aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: object) -> str:
    """YAML documents with keys in their given order; the same objects give the same bytes."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _commented(lines: tuple[str, ...], text: str) -> str:
    return "".join(f"# {line}\n" for line in lines) + text


def install_command(chart: Chart, values: str) -> str:
    """The helm command that installs a chart with a file of values."""
    return (
        f"helm upgrade --install {chart.release} {chart.chart} --repo {chart.repository} --version {chart.version} "
        f"--namespace {chart.namespace} --create-namespace --values {values}"
    )


def _kustomization(files: list[str], used: list[str]) -> Object:
    """A kustomization of these files, whose `newName` must be set to the images in the cluster's registry."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": files,
        "images": _replacements(used),
    }


def _replacements(used: list[str]) -> list[Object]:
    """One entry for each name of an image. Without a version in the entry, each image keeps its own."""
    versions: dict[str, list[Object]] = {}
    for each in used:
        image, at, digest = each.partition("@")
        name, _, tag = image.rpartition(":") if ":" in image.rpartition("/")[2] else (image, "", "")
        versions.setdefault(name, []).append({"digest": digest} if at else {"newTag": tag})
    return [
        {"name": name, "newName": name, **(found[0] if len(found) == 1 else {})} for name, found in versions.items()
    ]


def manifests(spec: ClusterSpec, catalogue: Catalogue, config: Path) -> dict[str, str]:
    """The files for `kubectl apply -k` and `helm`, by relative path. Raises SpecError."""
    check(spec, catalogue)
    document = read_config(config)
    service = rayservice(spec, catalogue, document)
    objects = {
        "namespace.yaml": ((_HEADER,), namespace_objects(spec, servers=server_ports(document))),
        "prepull.yaml": ((_HEADER,), prepull_objects(spec, catalogue, document, images(spec))),
        "rayservice.yaml": ((_HEADER, f"serveConfigV2 is {config.name}, adapted to the cluster."), [service]),
    }
    written = {name: _commented(header, to_yaml(*found)) for name, (header, found) in objects.items() if found}
    kustomization = _commented(
        (
            _HEADER,
            "Set newName to the image in the cluster's registry, by hand or with `kustomize edit set image`.",
        ),
        to_yaml(_kustomization(list(written), _used_images(service))),
    )
    files = {"kustomization.yaml": kustomization, **written}
    for number, chart in enumerate(charts(spec), start=1):
        path = f"values/{number}-{chart.release}.yaml"
        files[path] = _commented((_HEADER, install_command(chart, path)), to_yaml(chart.values))
    return files


def _used_images(service: Object) -> list[str]:
    """The images of a RayService, each once."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return list(dict.fromkeys(group["template"]["spec"]["containers"][0]["image"] for group in groups))


def ray_up(spec: ClusterSpec, catalogue: Catalogue, config: Path, folder: Path) -> dict[str, str]:
    """The `ray up` files for the cloud and for existing machines, and the Ray Serve config that they copy to the nodes.

    `folder` is where the files will be written, relative to the folder in which `ray up` runs. Raises SpecError.
    """
    check(spec, catalogue)
    document = read_config(config)
    longest_s, serve_config = longest_request_s(document), (folder / "serve.yaml").as_posix()
    vllm = bool(vllm_models(document))
    existing = (
        "head_ip, worker_ips: machines with Ubuntu 24.04 and NVIDIA's driver, on a network without other machines.",
    )
    return {
        f"{spec.provider}.yaml": _commented(
            _ray_up_header(folder, spec.provider) + _ACCOUNT_VALUES[spec.provider],
            to_yaml(rayup(spec, catalogue, longest_s, serve_config, vllm=vllm)),
        ),
        "on-premises.yaml": _commented(
            _ray_up_header(folder, "on-premises") + existing,
            to_yaml(on_premises(spec.name, longest_s, serve_config, "10.0.0.10", ("10.0.0.11",), vllm=vllm)),
        ),
        "serve.yaml": _commented((_HEADER,), to_yaml(cluster_config(spec, catalogue, document))),
    }


def _ray_up_header(folder: Path, name: str) -> tuple[str, ...]:
    path = (folder / f"{name}.yaml").as_posix()
    return (_HEADER, f"Run in the repository's folder: `ray up {path}`. docs/deploy.md describes the other steps.")


def files(spec: ClusterSpec, catalogue: Catalogue, config: Path, folder: Path) -> dict[str, str]:
    """All files of a description by path relative to `folder`, the target folder. Raises SpecError."""
    return {
        **{f"kubernetes/{name}": text for name, text in manifests(spec, catalogue, config).items()},
        **{f"ray-up/{name}": text for name, text in ray_up(spec, catalogue, config, folder / "ray-up").items()},
        "topology.svg": svg(spec, catalogue),
    }


def write(files: dict[str, str], folder: Path) -> Iterator[Path]:
    """Write each file atomically and yield its path. Raises OSError."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        yield path
