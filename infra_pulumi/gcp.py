"""The GKE cluster: regional, private GPU node pools; Google installs the driver and the device plugin."""

from __future__ import annotations

import math
from typing import Any

import pulumi
import pulumi_gcp as gcp

from infra_pulumi.base import GPU_TAINT, Access, GpuCluster, Outputs
from infra_pulumi.catalogue import CatalogueError, InstanceType
from infra_pulumi.spec import POOL_LABEL, NodeGroup

# Roles for logs, metrics and image pulls. The default account could edit the whole project.
NODE_ROLES = ("roles/container.defaultNodeServiceAccount", "roles/artifactregistry.reader")
ATTACHED = {"t4": "nvidia-tesla-t4"}  # GPUs attached to a machine; the catalogue writes them after a +
BUILT_IN = {("L4", 24): "nvidia-l4", ("A100", 40): "nvidia-tesla-a100", ("A100", 80): "nvidia-a100-80gb"}


def computed_outputs(kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs of Google Cloud that this program reads, as placeholders for a plan."""
    outputs: dict[str, Any] = {}
    match kind:
        case "gcp.serviceaccount.Account":
            outputs["name"] = f"${{{name}.name}}"
            outputs["email"] = f"{inputs['accountId']}@${{gcp.project}}.iam.gserviceaccount.com"
        case "gcp.container.Cluster":
            outputs |= {
                "endpoint": f"${{{name}.endpoint}}",
                "masterAuth": {**inputs["masterAuth"], "clusterCaCertificate": f"${{{name}.clusterCaCertificate}}"},
                "workloadIdentityConfig": {"workloadPool": "${gcp.project}.svc.id.goog"},
            }
        case "gcp.artifactregistry.Repository":
            outputs["registryUri"] = f"{inputs['location']}-docker.pkg.dev/${{gcp.project}}/{inputs['repositoryId']}"
        case "gcp:organizations/getProject:getProject":
            outputs |= {
                "projectId": "${gcp.project}",
                "number": "${gcp.projectNumber}",
                "billingAccount": "${gcp.billingAccount}",
            }
    return outputs


def _accelerator(machine: InstanceType) -> str:
    """Google's name of the machine's GPU. Raises CatalogueError for a GPU that this module does not list."""
    _, _, attached = machine.type.partition("+")
    found = ATTACHED.get(attached) if attached else BUILT_IN.get((str(machine.gpu), int(machine.gpu_memory_gib or 0)))
    if found is None:
        raise CatalogueError(
            f"{machine.type}: Google's name of its GPU is unknown; add it to the tables in infra_pulumi/gcp.py"
        )
    return found


class GcpCluster(GpuCluster):
    def create(self) -> Outputs:
        spec = self.spec
        self.tags = spec.all_tags()
        self._provider = gcp.Provider(self.name("gcp"), region=spec.region, opts=pulumi.ResourceOptions(parent=self))
        project = gcp.organizations.get_project_output(opts=pulumi.InvokeOptions(parent=self, provider=self._provider))
        self.project = project.project_id
        subnetwork, nat = self._network()
        nodes = self._node_account()
        self._gke = cluster = self._cluster(subnetwork, nat, nodes)
        system = self._pool(cluster, nodes, None)
        # GKE taints a GPU pool only if another pool already exists (terraform-google-kubernetes-engine#703).
        groups = [self._pool(cluster, nodes, group, [system]) for group in spec.node_groups()]
        repository = self._registry()
        identity = self._identity(cluster)
        self._administrators()
        self._budget(project)
        return Outputs(
            cluster_name=cluster.name,
            endpoint=cluster.endpoint,
            registry=repository.registry_uri,
            kubeconfig_command=f"gcloud container clusters get-credentials {spec.name} --region {spec.region}",
            identity=identity.email,
            node_groups=[group.name for group in (system, *groups)],
        )

    def access(self) -> Access:
        server = pulumi.Output.format("https://{0}", self._gke.endpoint)
        return Access(server, self._gke.master_auth.cluster_ca_certificate, ("gke-gcloud-auth-plugin",))

    def child_options(self, **options: Any) -> pulumi.ResourceOptions:
        return super().child_options(provider=self._provider, **options)

    def _network(self) -> tuple[gcp.compute.Subnetwork, gcp.compute.RouterNat]:
        spec = self.spec
        network = gcp.compute.Network(
            self.name("vpc"), name=spec.name, auto_create_subnetworks=False, opts=self.protected_options()
        )
        subnetwork = gcp.compute.Subnetwork(
            self.name("nodes", "subnet"),
            name=spec.name,
            network=network.id,
            region=spec.region,
            ip_cidr_range=spec.network.cidr,
            private_ip_google_access=True,  # reach the registry and buckets without NAT
            secondary_ip_ranges=[
                gcp.compute.SubnetworkSecondaryIpRangeArgs(range_name="pods", ip_cidr_range=spec.network.pods_cidr),
                gcp.compute.SubnetworkSecondaryIpRangeArgs(
                    range_name="services", ip_cidr_range=spec.network.services_cidr
                ),
            ],
            opts=self.child_options(),
        )
        router = gcp.compute.Router(
            self.name("router"), name=spec.name, network=network.id, region=spec.region, opts=self.child_options()
        )
        nat = gcp.compute.RouterNat(  # regional, for both values of `network.nat`
            self.name("nat"),
            name=spec.name,
            router=router.name,
            region=spec.region,
            nat_ip_allocate_option="AUTO_ONLY",
            source_subnetwork_ip_ranges_to_nat="ALL_SUBNETWORKS_ALL_IP_RANGES",
            log_config=gcp.compute.RouterNatLogConfigArgs(enable=True, filter="ERRORS_ONLY"),
            opts=self.child_options(),
        )
        return subnetwork, nat

    def _node_account(self) -> gcp.serviceaccount.Account:
        account = gcp.serviceaccount.Account(
            self.name("nodes", "account"),
            account_id=self.name("nodes"),
            display_name=f"Nodes of {self.spec.name}",
            opts=self.child_options(),
        )
        self.granted: list[pulumi.Resource] = [
            gcp.projects.IAMMember(
                self.name("nodes", role.rpartition("/")[2].lower()),
                project=self.project,
                role=role,
                member=pulumi.Output.format("serviceAccount:{0}", account.email),
                opts=self.child_options(),
            )
            for role in NODE_ROLES
        ]
        return account

    def _cluster(
        self, subnetwork: gcp.compute.Subnetwork, nat: gcp.compute.RouterNat, nodes: gcp.serviceaccount.Account
    ) -> gcp.container.Cluster:
        spec = self.spec
        callers = [
            gcp.container.ClusterMasterAuthorizedNetworksConfigCidrBlockArgs(cidr_block=cidr)
            for cidr in spec.network.api_cidrs
        ]
        return gcp.container.Cluster(
            self.name("cluster"),
            name=spec.name,
            location=spec.region,
            node_locations=list(spec.zones),
            network=subnetwork.network,
            subnetwork=subnetwork.id,
            min_master_version=spec.kubernetes_version,
            release_channel=gcp.container.ClusterReleaseChannelArgs(channel="REGULAR"),
            remove_default_node_pool=True,
            initial_node_count=1,
            # For the default pool, removed after creation: an organisation's policy may forbid the defaults.
            node_config=gcp.container.ClusterNodeConfigArgs(
                service_account=nodes.email,
                shielded_instance_config=gcp.container.ClusterNodeConfigShieldedInstanceConfigArgs(
                    enable_integrity_monitoring=True, enable_secure_boot=True
                ),
            ),
            deletion_protection=spec.protect,
            datapath_provider="ADVANCED_DATAPATH",  # Dataplane V2, which enforces network policies
            ip_allocation_policy=gcp.container.ClusterIpAllocationPolicyArgs(
                cluster_secondary_range_name="pods", services_secondary_range_name="services"
            ),
            private_cluster_config=gcp.container.ClusterPrivateClusterConfigArgs(
                enable_private_nodes=True, enable_private_endpoint=not spec.network.api_cidrs
            ),
            master_authorized_networks_config=gcp.container.ClusterMasterAuthorizedNetworksConfigArgs(
                cidr_blocks=callers, gcp_public_cidrs_access_enabled=False
            ),
            workload_identity_config=gcp.container.ClusterWorkloadIdentityConfigArgs(
                workload_pool=pulumi.Output.format("{0}.svc.id.goog", self.project)
            ),
            enable_shielded_nodes=True,
            enable_legacy_abac=False,
            master_auth=gcp.container.ClusterMasterAuthArgs(
                client_certificate_config=gcp.container.ClusterMasterAuthClientCertificateConfigArgs(
                    issue_client_certificate=False
                )
            ),
            logging_config=gcp.container.ClusterLoggingConfigArgs(
                enable_components=["SYSTEM_COMPONENTS", "APISERVER", "SCHEDULER", "CONTROLLER_MANAGER"]
            ),
            cost_management_config=gcp.container.ClusterCostManagementConfigArgs(enabled=True),
            resource_labels=self.tags,
            opts=self.protected_options(
                depends_on=[nat, *self.granted], ignore_changes=["nodeConfig", "minMasterVersion"]
            ),
        )

    def _pool(
        self,
        cluster: gcp.container.Cluster,
        account: gcp.serviceaccount.Account,
        group: NodeGroup | None,
        previous: list[pulumi.Resource] | None = None,
    ) -> gcp.container.NodePool:
        """The system pool (`group` is None) or a GPU pool. Node counts are totals over all zones."""
        system = self.spec.system
        minimum, maximum = (system.min, system.max) if group is None else (group.min, group.max)
        zones = self.zones(group.pool) if group else self.spec.zones[:maximum]
        return gcp.container.NodePool(
            self.pool_name(group) if group else self.name("system"),
            name=group.name if group else "system",
            cluster=cluster.id,
            location=self.spec.region,
            node_locations=list(zones),
            # Per zone. The autoscaler adds nodes for pending pods only; the cluster's own pods need nodes at the
            # start, so that the system pool begins with its minimum.
            initial_node_count=0 if group else math.ceil(minimum / len(zones)),
            autoscaling=gcp.container.NodePoolAutoscalingArgs(
                total_min_node_count=minimum,
                total_max_node_count=maximum,
                location_policy="ANY" if group else "BALANCED",
            ),
            management=gcp.container.NodePoolManagementArgs(auto_repair=True, auto_upgrade=True),
            upgrade_settings=gcp.container.NodePoolUpgradeSettingsArgs(max_surge=0 if group else 1, max_unavailable=1),
            node_config=self._node_config(account, group),
            opts=self.child_options(
                depends_on=[*self.granted, *(previous or [])], ignore_changes=["nodeCount", "initialNodeCount"]
            ),
        )

    def _node_config(
        self, account: gcp.serviceaccount.Account, group: NodeGroup | None
    ) -> gcp.container.NodePoolNodeConfigArgs:
        system = self.spec.system
        machine = str(system.instance_type) if group is None else group.pool.instance_types[0].partition("+")[0]
        return gcp.container.NodePoolNodeConfigArgs(
            machine_type=machine,
            disk_size_gb=system.disk_gib if group is None else group.pool.disk_gib,
            disk_type="pd-balanced",
            image_type="COS_CONTAINERD",
            spot=bool(group and group.spot),
            service_account=account.email,
            oauth_scopes=["https://www.googleapis.com/auth/cloud-platform"],  # the account's roles limit access
            labels={POOL_LABEL: "system"} if group is None else self.labels(group),
            resource_labels=self.tags,
            taints=self._pool_taints(group),
            guest_accelerators=self._accelerators(group),
            gcfs_config=gcp.container.NodePoolNodeConfigGcfsConfigArgs(enabled=True),  # image streaming
            gvnic=gcp.container.NodePoolNodeConfigGvnicArgs(enabled=True),
            metadata={"disable-legacy-endpoints": "true"},
            workload_metadata_config=gcp.container.NodePoolNodeConfigWorkloadMetadataConfigArgs(mode="GKE_METADATA"),
            shielded_instance_config=gcp.container.NodePoolNodeConfigShieldedInstanceConfigArgs(
                enable_integrity_monitoring=True,
                enable_secure_boot=True,
            ),
        )

    def _pool_taints(self, group: NodeGroup | None) -> list[gcp.container.NodePoolNodeConfigTaintArgs] | None:
        """Taints without the GPU taint: GKE adds it and refuses a duplicate (terraform-provider-google#7928)."""
        if group is None:
            return None
        effects = {"NoSchedule": "NO_SCHEDULE", "PreferNoSchedule": "PREFER_NO_SCHEDULE", "NoExecute": "NO_EXECUTE"}
        return [
            gcp.container.NodePoolNodeConfigTaintArgs(key=key, value=value, effect=effects[effect])
            for key, value, effect in self.taints(group)
            if (key, value, effect) != GPU_TAINT
        ]

    def _accelerators(
        self, group: NodeGroup | None
    ) -> list[gcp.container.NodePoolNodeConfigGuestAcceleratorArgs] | None:
        if group is None:
            return None
        machine = self.machine(group.pool)
        return [
            gcp.container.NodePoolNodeConfigGuestAcceleratorArgs(
                type=_accelerator(machine),
                count=machine.gpu_count,
                gpu_driver_installation_config=(
                    gcp.container.NodePoolNodeConfigGuestAcceleratorGpuDriverInstallationConfigArgs(
                        gpu_driver_version="DEFAULT"
                    )
                ),
            )
        ]

    def _registry(self) -> gcp.artifactregistry.Repository:
        return gcp.artifactregistry.Repository(
            self.name("images"),
            repository_id=self.spec.name,
            location=self.spec.region,
            format="DOCKER",
            docker_config=gcp.artifactregistry.RepositoryDockerConfigArgs(immutable_tags=True),
            labels=self.tags,
            opts=self.protected_options(),
        )

    def _identity(self, cluster: gcp.container.Cluster) -> gcp.serviceaccount.Account:
        """The workload identity of the service's pods, without rights until some are granted."""
        account = gcp.serviceaccount.Account(
            self.name("serve", "account"),
            account_id=self.name("serve"),
            display_name=f"Pods of {self.spec.name}",
            opts=self.child_options(),
        )
        pool = cluster.workload_identity_config.workload_pool
        gcp.serviceaccount.IAMMember(
            self.name("serve", "identity"),
            service_account_id=account.name,
            role="roles/iam.workloadIdentityUser",
            member=pulumi.Output.format("serviceAccount:{0}[{1}/serve-app]", pool, self.spec.name),
            opts=self.child_options(),
        )
        return account

    def _administrators(self) -> None:
        for name, member in self.principals().items():
            gcp.projects.IAMMember(
                self.name("admin", name),
                project=self.project,
                role="roles/container.admin",
                member=member,
                opts=self.child_options(),
            )

    def _budget(self, project: Any) -> None:
        """A budget. Alerts go to billing administrators and to the budget's addresses."""
        budget = self.spec.budget
        if budget is None:
            return
        channels = [
            gcp.monitoring.NotificationChannel(
                self.name("mail", str(index)),
                type="email",
                display_name=f"Budget of {self.spec.name}",
                labels={"email_address": address},
                user_labels=self.tags,
                opts=self.child_options(),
            )
            for index, address in enumerate(budget.emails)
        ]
        rules = [("CURRENT_SPEND", threshold) for threshold in budget.thresholds] + [("FORECASTED_SPEND", 100)]
        whole, cents = divmod(round(budget.monthly_usd * 100), 100)
        # With a user's credentials this API needs the project whose quota its calls use.
        billing = gcp.Provider(
            self.name("billing"),
            region=self.spec.region,
            user_project_override=True,
            billing_project=self.project,
            opts=pulumi.ResourceOptions(parent=self),
        )
        gcp.billing.Budget(
            self.name("budget"),
            billing_account=project.billing_account,
            display_name=self.spec.name,
            amount=gcp.billing.BudgetAmountArgs(
                specified_amount=gcp.billing.BudgetAmountSpecifiedAmountArgs(
                    currency_code="USD", units=str(whole), nanos=cents * 10_000_000
                )
            ),
            budget_filter=gcp.billing.BudgetBudgetFilterArgs(
                projects=[pulumi.Output.format("projects/{0}", project.number)],
                labels={"cluster": self.spec.name},
            ),
            threshold_rules=[
                gcp.billing.BudgetThresholdRuleArgs(threshold_percent=threshold / 100, spend_basis=basis)
                for basis, threshold in rules
            ],
            all_updates_rule=gcp.billing.BudgetAllUpdatesRuleArgs(
                monitoring_notification_channels=[channel.id for channel in channels]
            )
            if channels
            else None,
            opts=super().child_options(provider=billing),
        )
