"""Lists the manual steps that a cloud account needs once, before the first deployment."""

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
    """Sentences with a command each. A plan cannot see an account's state, so it always lists every step."""
    match spec.provider:
        case "aws":
            if spec.budget:
                yield (
                    "Once per account: activate the cost allocation tag `cluster`, because the budget filters by it: "
                    "aws ce update-cost-allocation-tags-status --cost-allocation-tags-status "
                    "TagKey=cluster,Status=Active (one day after the first resource has the tag)"
                )
        case "gcp":
            yield "Once per user: gcloud auth application-default login; export GOOGLE_PROJECT=PROJECT_ID"
            apis = " ".join(f"{name}.googleapis.com" for name in GOOGLE_APIS)
            yield f"Once per project: gcloud services enable {apis}"
            if spec.budget:
                yield "To create the budget, the deploying user needs roles/billing.costsManager on the billing account"
        case _:
            yield (
                "Once per subscription: az feature register --namespace Microsoft.Compute --name EncryptionAtHost; "
                "when its state is Registered: az provider register --namespace Microsoft.Compute"
            )
            for name in sorted({name for pool in spec.gpu_pools for name in pool.instance_types}):
                yield (
                    f"The zones that offer {name} differ by subscription: az vm list-skus --location {spec.region} "
                    f"--size {name} --zone --output table; list them in the pool's `zones`"
                )
    yield from _api_access(spec)


def _api_access(spec: ClusterSpec) -> Iterator[str]:
    if spec.network.api_cidrs:
        return
    if spec.addons.by_pulumi:
        yield (
            "addons.by_pulumi needs the Kubernetes API, which is private here: deploy from inside the network, or add "
            "your address to network.api_cidrs"
        )
    if spec.provider == "azure":
        yield "AKS cannot switch between a private and a public Kubernetes API later: choose network.api_cidrs now"
