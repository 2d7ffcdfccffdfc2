"""A description as files, for those who do not use Pulumi: manifests, Helm values, `ray up`, a picture.

`python -m infra_pulumi render` writes those of any description, `python -m infra_pulumi.render` the ones that are kept
in the repository, under cluster/.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from infra_pulumi import spec as descriptions
from infra_pulumi.catalogue import Catalogue, check, load as load_catalogue
from infra_pulumi.charts import Chart, charts
from infra_pulumi.objects import beside
from infra_pulumi.rayservice import NAME, longest_request_s, on_gpus, rayservice, read_config
from infra_pulumi.rayup import on_premises, rayup
from infra_pulumi.spec import ClusterSpec
from infra_pulumi.topology import svg

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "cluster"
PROVIDERS = ("aws", "gcp", "azure")
_BY = "Written by `python -m infra_pulumi.render`; change the description, not this file."

# What only the account knows, and where it is found.
_PLACES = {
    "aws": (
        "REPLACE_IMAGE: an Ubuntu 24.04 with NVIDIA's driver:",
        "  aws ssm get-parameter --query Parameter.Value --name"
        " /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
        "REPLACE_NETWORK: a security group whose only rule lets its own members in. Without one of yours Ray makes a",
        "  group that lets SSH in from everywhere.",
        "REPLACE_SUBNET: a private subnet of that group's network, with NAT.",
        "REPLACE_HEAD_IDENTITY, REPLACE_WORKER_IDENTITY: instance profiles with AmazonSSMManagedInstanceCore. The head",
        "  may also start, tag, describe and terminate instances, and pass the workers' role. Without one of yours Ray",
        "  makes one with AmazonEC2FullAccess and AmazonS3FullAccess.",
    ),
    "gcp": (
        "REPLACE_ACCOUNT: the project. Ray gives the head a service account of its own making.",
        "REPLACE_IMAGE: an Ubuntu 24.04 with NVIDIA's driver, signed for Secure Boot, by its full name:",
        "  gcloud compute images list --project=deeplearning-platform-release --no-standard-images",
        "REPLACE_NETWORK: a subnetwork with Cloud NAT, by its full name. Its firewall lets SSH in from Identity-Aware",
        "  Proxy alone, 35.235.240.0/20.",
        "REPLACE_WORKER_IDENTITY: the address of a service account that may read the weights.",
    ),
    "azure": (
        "REPLACE_ACCOUNT: the subscription.",
        "REPLACE_IMAGE: the resource id of an Ubuntu 24.04 with NVIDIA's driver.",
        "REPLACE_NETWORK: the range of the network that Ray makes, such as 10.60.0.0/16. It has no way in or out: give",
        "  it a NAT gateway, and peer it with the network that you run this in, while Ray waits for the head. It waits",
        "  15 minutes; a second `ray up` goes on.",
        "REPLACE_HEAD_IDENTITY: a managed identity in the resource group beside; the workers have it too.",
    ),
}


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stay such, and nothing is said by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(*documents: object) -> str:
    """Keys keep their order; the same objects give the same bytes."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _commented(lines: tuple[str, ...], text: str) -> str:
    return "".join(f"# {line}\n" for line in lines) + text


def install_command(chart: Chart, values: str) -> str:
    return (
        f"helm upgrade --install {chart.release} {chart.chart} --repo {chart.repository} --version {chart.version} "
        f"--namespace {chart.namespace} --create-namespace --values {values}"
    )


def _kustomization(spec: ClusterSpec) -> dict[str, Any]:
    """`kubectl kustomize` puts the image's registry in: newName is to be that of the cluster's."""
    image, at, digest = spec.serve.image.partition("@")
    name, _, tag = image.rpartition(":") if ":" in image.rpartition("/")[2] else (image, "", "")
    version = {"digest": digest} if at else {"newTag": tag}
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["beside.yaml", "rayservice.yaml"],
        "images": [{"name": name, "newName": name, **version}],
    }


def manifests(spec: ClusterSpec, catalogue: Catalogue, config: Path) -> dict[str, str]:
    """Paths and their texts: what `kubectl apply -k` and `helm` take. Raises SpecError."""
    check(spec, catalogue)
    document = read_config(config)
    files = {
        "kustomization.yaml": _commented(
            (_BY, "images: put the registry in: `kustomize edit set image`, or newName by hand."),
            to_yaml(_kustomization(spec)),
        ),
        "beside.yaml": _commented((_BY,), to_yaml(*beside(spec))),
        "rayservice.yaml": _commented(
            (_BY, f"The service of {config.name}."), to_yaml(rayservice(spec, catalogue, document))
        ),
    }
    for number, chart in enumerate(charts(spec), start=1):
        path = f"values/{number}-{chart.release}.yaml"
        files[path] = _commented((_BY, install_command(chart, path)), to_yaml(chart.values))
    return files


def ray_up(spec: ClusterSpec, catalogue: Catalogue, config: Path) -> dict[str, str]:
    """The cloud's `ray up` file, and the service's config for it. Raises SpecError."""
    check(spec, catalogue)
    document = read_config(config)
    head = (
        _BY,
        f"In the repository's folder: `ray up cluster/ray-up/{spec.provider}.yaml`; docs/deploy.md has the rest.",
    )
    return {
        f"{spec.provider}.yaml": _commented(
            (*head, *_PLACES[spec.provider]), to_yaml(rayup(spec, catalogue, longest_request_s(document)))
        ),
        f"{spec.provider}.serve.yaml": _commented((_BY,), to_yaml(on_gpus(spec, catalogue, document))),
    }


def ray_on_premises(config: Path) -> dict[str, str]:
    """For machines that are there."""
    notes = (
        _BY,
        "In the repository's folder: `ray up cluster/ray-up/on-premises.yaml`; docs/deploy.md has the rest.",
        "head_ip, worker_ips: machines with Ubuntu 24.04 and NVIDIA's driver, on a network that nobody else reaches.",
    )
    longest_s = longest_request_s(read_config(config))
    return {"on-premises.yaml": _commented(notes, to_yaml(on_premises(NAME, longest_s, "10.0.0.10", ("10.0.0.11",))))}


def every(spec: ClusterSpec, catalogue: Catalogue, config: Path) -> dict[str, str]:
    """All files of one description. Raises SpecError."""
    return {
        **{f"kubernetes/{name}": text for name, text in manifests(spec, catalogue, config).items()},
        **{f"ray-up/{name}": text for name, text in ray_up(spec, catalogue, config).items()},
        "topology.svg": svg(spec, catalogue),
    }


def kept() -> dict[str, str]:
    """All files under cluster/ that are made here, by their paths there."""
    config, catalogue = ROOT / "serve_config.yaml", load_catalogue()
    files = {f"ray-up/{name}": text for name, text in ray_on_premises(config).items()}
    for provider in PROVIDERS:
        spec = descriptions.load(KEPT / f"descriptions/{provider}.yaml")
        files |= {f"kubernetes/{provider}/{name}": text for name, text in manifests(spec, catalogue, config).items()}
        files |= {f"ray-up/{name}": text for name, text in ray_up(spec, catalogue, config).items()}
        files[f"topology/{provider}.svg"] = svg(spec, catalogue)
    return files


def write(files: dict[str, str], folder: Path) -> Iterator[Path]:
    """Each file as a whole or not at all. Raises OSError."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        yield path


if __name__ == "__main__":
    for written in write(kept(), KEPT):
        print(f"wrote {written.relative_to(ROOT)}")
