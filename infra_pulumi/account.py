"""What a plan cannot do: the steps that an account needs by hand, once, before the first deployment."""

from __future__ import annotations

from collections.abc import Iterator

from infra_pulumi.spec import ClusterSpec

GOOGLE_APIS = (
    "artifactregistry",
    "billingbudgets",
    "cloudbilling",
    "cloudresourcemanager",
    "compute",
    "container",
    "containerfilesystem",
    "iam",
    "monitoring",
)


def steps(spec: ClusterSpec) -> Iterator[str]:
    """Sentences with the command in them. Nothing here can be seen without an account, so they are always told."""
    match spec.provider:
        case "aws":
            if spec.budget:
                yield (
                    "Once an account: activate the cost allocation tag `cluster`, or the budget sees nothing: "
                    "aws ce update-cost-allocation-tags-status --cost-allocation-tags-status "
                    "TagKey=cluster,Status=Active (a day after something has the tag)"
                )
        case "gcp":
            yield "Once a person: gcloud auth application-default login; export GOOGLE_PROJECT=the project's id"
            apis = " ".join(f"{name}.googleapis.com" for name in GOOGLE_APIS)
            yield f"Once a project: gcloud services enable {apis}"
            if spec.budget:
                yield "Whoever deploys needs roles/billing.costsManager on the billing account, to make a budget there"
        case _:
            yield (
                "Once a subscription: az feature register --namespace Microsoft.Compute --name EncryptionAtHost; when "
                "it is Registered: az provider register --namespace Microsoft.Compute"
            )
            for name in sorted({name for pool in spec.gpu_pools for name in pool.instance_types}):
                yield (
                    f"Which zones have {name} is each subscription's own: az vm list-skus --location {spec.region} "
                    f"--size {name} --zone --output table; name them in the pool's `zones`"
                )
    yield from _way_in(spec)


def _way_in(spec: ClusterSpec) -> Iterator[str]:
    if spec.network.api_cidrs:
        return
    if spec.addons.by_pulumi:
        yield (
            "addons.by_pulumi with a private Kubernetes API: deploy from inside the network, or name your address in "
            "network.api_cidrs"
        )
    if spec.provider == "azure":
        yield "AKS cannot make a private Kubernetes API public later, nor the other way: choose network.api_cidrs now"
