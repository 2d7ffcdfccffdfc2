"""The AKS cluster: GPU agent pools with Azure's driver, private nodes behind a NAT gateway, no local accounts."""

from __future__ import annotations

import base64
import ipaddress
import uuid
from typing import Any

import pulumi
import pulumi_azure_native as azure
import yaml
from pulumi_azure_native import (
    authorization,
    consumption,
    containerregistry,
    containerservice as aks,
    managedidentity,
    monitor,
    network,
    operationalinsights,
    resources,
)

from infra_pulumi.base import Access, GpuCluster, Outputs
from infra_pulumi.spec import POOL_LABEL, NodeGroup

# Azure's ids of built-in roles, the same in every subscription.
NETWORK_CONTRIBUTOR = "4d97b98b-1d4f-4787-a291-c67834d212e7"
ACR_PULL = "7f951dda-4ed3-4680-a7ca-43fe172d538d"
RBAC_CLUSTER_ADMIN = "b1ff04bb-8a4e-4dc4-8eb5-8693973ce19b"
CLUSTER_USER = "4abbcc35-e782-43d8-92c5-2d3f1bd2253f"
AKS_SERVER = "6dae42f8-4368-4678-94ff-3960e28e3630"  # the audience of tokens for AKS clusters
# AKS adds this taint to spot pools. Stating it here too prevents a difference at the next update.
SPOT_TAINT = "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"
SPOT_LABEL = ("kubernetes.azure.com/scalesetpriority", "spot")
AUDIT_LOGS = ("kube-audit-admin", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "guard")
LOG_DAYS = 30
# AKS reserves memory for each possible pod. The overlay's default of 250 pods would reserve 5 GB of each node.
MAX_PODS = 110


def computed_outputs(kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs of Azure that this program reads, as placeholders for a plan."""
    outputs: dict[str, Any] = {}
    match kind:
        case "azure-native.resources.ResourceGroup":
            outputs["name"] = inputs["resourceGroupName"]
        case "azure-native.containerservice.ManagedCluster":
            outputs |= {
                "name": inputs["resourceName"],
                "identity": {
                    "type": "UserAssigned",
                    "userAssignedIdentities": {},
                },  # the request has a list, the response a mapping
                "fqdn": f"${{{name}.fqdn}}",
                "privateFQDN": f"${{{name}.privateFQDN}}",
                "identityProfile": {"kubeletidentity": {"objectId": f"${{{name}.kubelet}}"}},
                "oidcIssuerProfile": {"enabled": True, "issuerURL": f"${{{name}.issuer}}"},
            }
        case "azure-native.containerservice.AgentPool":
            outputs["name"] = inputs["agentPoolName"]
        case "azure-native.managedidentity.UserAssignedIdentity":
            outputs |= {
                "name": inputs["resourceName"],
                "clientId": f"${{{name}.clientId}}",
                "principalId": f"${{{name}.principalId}}",
            }
        case "azure-native.network.PublicIPAddress":
            outputs["ipAddress"] = f"${{{name}.ipAddress}}"
        case "azure-native.containerregistry.Registry":
            outputs["loginServer"] = f"${{{name}.loginServer}}"
        case "azure-native.network.VirtualNetwork":
            outputs["subnets"] = [{"id": f"${{{name}.subnet}}", "name": "nodes"}]
        case "azure-native:authorization:getClientConfig":
            outputs |= {"subscriptionId": "${azure.subscription}", "objectId": "${azure.caller}"}
        case "azure-native:containerservice:listManagedClusterUserCredentials":
            cluster = {"certificate-authority-data": "${cluster.certificateAuthority}"}
            kubeconfig = yaml.safe_dump({"clusters": [{"cluster": cluster}]}).encode()
            outputs["kubeconfigs"] = [{"name": "clusterUser", "value": base64.b64encode(kubeconfig).decode()}]
    return outputs


class AzureCluster(GpuCluster):
    def create(self) -> Outputs:
        spec = self.spec
        self.tags = spec.all_tags()
        self._provider = azure.Provider(
            self.name("azure"), location=spec.region, opts=pulumi.ResourceOptions(parent=self)
        )
        client = authorization.get_client_config_output(opts=pulumi.InvokeOptions(parent=self, provider=self._provider))
        self.subscription = client.subscription_id
        self._nodes_group = self.name("nodes")
        self.group = resources.ResourceGroup(
            self.name("group"),
            resource_group_name=spec.name,
            location=spec.region,
            tags=self.tags,
            opts=self.protected_options(),
        )
        if spec.protect:
            self._lock()
        subnet = self._network()
        control, allowed = self._control_identity(subnet)
        self._aks = cluster = self._cluster(subnet, control, allowed)
        self._endpoint = cluster.fqdn if spec.network.api_cidrs else cluster.private_fqdn
        pools: list[aks.AgentPool] = []
        for group in spec.node_groups():  # one after the other: AKS refuses concurrent changes of a cluster
            pools.append(self._pool(cluster, subnet, group, pools[-1:]))
        registry = self._registry(cluster)
        identity = self._identity(cluster)
        self._creator(client, cluster)
        self._administrators(cluster)
        self._logs(cluster)
        self._budget()
        return Outputs(
            cluster_name=cluster.name,
            endpoint=self._endpoint,
            registry=registry.login_server,
            kubeconfig_command=f"az aks get-credentials --resource-group {spec.name} --name {spec.name}",
            identity=identity.client_id,
            node_groups=["system", *(pool.name for pool in pools)],
        )

    def access(self) -> Access:
        """Read the certificate authority from a kubeconfig, its only source; it contains no credentials."""
        credentials = aks.list_managed_cluster_user_credentials_output(
            resource_group_name=self.group.name,
            resource_name=self._aks.name,
            opts=pulumi.InvokeOptions(parent=self, provider=self._provider),
        )
        return Access(
            pulumi.Output.format("https://{0}:443", self._endpoint),
            credentials.kubeconfigs.apply(lambda found: _certificate_authority(found[0].value)),
            ("kubelogin", "get-token", "--login", "azurecli", "--server-id", AKS_SERVER),
        )

    def child_options(self, **options: Any) -> pulumi.ResourceOptions:
        return super().child_options(provider=self._provider, **options)

    def _lock(self) -> None:
        """Lock the resource group, because Azure has no deletion protection for a cluster.

        The lock itself is not protected: without `protect` Pulumi must be able to delete it.
        """
        authorization.ManagementLockByScope(
            self.name("lock"),
            scope=self.group.id,
            lock_name=self.name("lock"),
            level="CanNotDelete",
            notes="The description has protect: true.",
            opts=self.child_options(),
        )

    def _network(self) -> pulumi.Output[str]:
        """Create the network and return the id of the nodes' subnet. Outbound traffic uses one NAT gateway."""
        spec = self.spec
        self._nat_address = network.PublicIPAddress(
            self.name("nat-ip"),
            resource_group_name=self.group.name,
            location=spec.region,
            sku=network.PublicIPAddressSkuArgs(name="Standard"),
            public_ip_allocation_method="Static",
            zones=[spec.zones[0]] if spec.network.nat == "one" else None,
            tags=self.tags,
            opts=self.child_options(),
        )
        gateway = network.NatGateway(
            self.name("nat"),
            resource_group_name=self.group.name,
            location=spec.region,
            sku=network.NatGatewaySkuArgs(name="Standard"),
            public_ip_addresses=[network.SubResourceArgs(id=self._nat_address.id)],
            zones=[spec.zones[0]] if spec.network.nat == "one" else None,
            tags=self.tags,
            opts=self.child_options(),
        )
        net = network.VirtualNetwork(
            self.name("vnet"),
            resource_group_name=self.group.name,
            location=spec.region,
            address_space=network.AddressSpaceArgs(address_prefixes=[spec.network.cidr]),
            subnets=[
                network.SubnetArgs(
                    name="nodes",
                    address_prefix=spec.network.cidr,
                    nat_gateway=network.SubResourceArgs(id=gateway.id),
                    default_outbound_access=False,
                )
            ],
            tags=self.tags,
            opts=self.protected_options(),
        )
        return net.subnets.apply(lambda subnets: str((subnets or [])[0].id))

    def _control_identity(
        self, subnet: pulumi.Output[str]
    ) -> tuple[managedidentity.UserAssignedIdentity, authorization.RoleAssignment]:
        """The control plane's identity: it manages load balancers in the subnet and has no other rights."""
        identity = managedidentity.UserAssignedIdentity(
            self.name("control"),
            resource_group_name=self.group.name,
            resource_name_=self.name("control"),
            location=self.spec.region,
            tags=self.tags,
            opts=self.child_options(),
        )
        return identity, self._grant("control-network", NETWORK_CONTRIBUTOR, identity.principal_id, subnet)

    def _grant(
        self,
        name: str,
        role: str,
        principal: pulumi.Input[str],
        scope: pulumi.Input[str],
        kind: str | None = "ServicePrincipal",
        **options: Any,
    ) -> authorization.RoleAssignment:
        return authorization.RoleAssignment(
            self.name(name),
            role_assignment_name=self.subscription.apply(lambda subscription: _guid(subscription, self.name(name))),
            role_definition_id=pulumi.Output.format(
                "/subscriptions/{0}/providers/Microsoft.Authorization/roleDefinitions/{1}", self.subscription, role
            ),
            principal_id=principal,
            principal_type=kind,
            scope=scope,
            opts=self.child_options(**options),
        )

    def _creator(self, client: Any, cluster: aks.ManagedCluster) -> None:
        """Make the creating user an administrator, as on AWS; without local accounts no other user has access."""
        self._grant("creator", RBAC_CLUSTER_ADMIN, client.object_id, cluster.id, None, ignore_changes=["principalId"])

    def _administrators(self, cluster: aks.ManagedCluster) -> None:
        """Grant each administrator the cluster and, by the second role, the download of a kubeconfig."""
        for name, principal in self.principals().items():
            self._grant(f"admin-{name}", RBAC_CLUSTER_ADMIN, principal, cluster.id, None)
            self._grant(f"admin-{name}-kubeconfig", CLUSTER_USER, principal, cluster.id, None)

    def _cluster(
        self,
        subnet: pulumi.Output[str],
        control: managedidentity.UserAssignedIdentity,
        allowed: authorization.RoleAssignment,
    ) -> aks.ManagedCluster:
        spec = self.spec
        callers: list[pulumi.Input[str]] = list(spec.network.api_cidrs)
        if callers:  # nodes reach a public API through NAT, so NAT's address must be allowed
            callers.append(pulumi.Output.format("{0}/32", self._nat_address.ip_address))
        return aks.ManagedCluster(
            self.name("cluster"),
            resource_group_name=self.group.name,
            resource_name_=spec.name,
            location=spec.region,
            dns_prefix=spec.name,
            node_resource_group=self._nodes_group,
            kubernetes_version=spec.kubernetes_version,
            sku=aks.ManagedClusterSKUArgs(name="Base", tier="Standard"),
            identity=aks.ManagedClusterIdentityArgs(
                type=aks.ResourceIdentityType.USER_ASSIGNED, user_assigned_identities=[control.id]
            ),
            enable_rbac=True,
            disable_local_accounts=True,
            aad_profile=aks.ManagedClusterAADProfileArgs(managed=True, enable_azure_rbac=True),
            api_server_access_profile=aks.ManagedClusterAPIServerAccessProfileArgs(
                enable_private_cluster=not callers,
                authorized_ip_ranges=callers or None,
                disable_run_command=True,
            ),
            oidc_issuer_profile=aks.ManagedClusterOIDCIssuerProfileArgs(enabled=True),
            security_profile=aks.ManagedClusterSecurityProfileArgs(
                workload_identity=aks.ManagedClusterSecurityProfileWorkloadIdentityArgs(enabled=True),
                image_cleaner=aks.ManagedClusterSecurityProfileImageCleanerArgs(enabled=True, interval_hours=168),
            ),
            network_profile=aks.ContainerServiceNetworkProfileArgs(
                network_plugin="azure",
                network_plugin_mode="overlay",
                network_dataplane="cilium",
                network_policy="cilium",
                outbound_type="userAssignedNATGateway",
                load_balancer_sku="standard",
                pod_cidr=spec.network.pods_cidr,
                service_cidr=spec.network.services_cidr,
                dns_service_ip=_tenth(spec.network.services_cidr),
            ),
            auto_upgrade_profile=aks.ManagedClusterAutoUpgradeProfileArgs(
                upgrade_channel="patch", node_os_upgrade_channel="NodeImage"
            ),
            agent_pool_profiles=[self._system_pool(subnet)],
            tags=self.tags,
            opts=self.protected_options(
                depends_on=[allowed], ignore_changes=["agentPoolProfiles[0].count", "kubernetesVersion"]
            ),
        )

    def _system_pool(self, subnet: pulumi.Output[str]) -> aks.ManagedClusterAgentPoolProfileArgs:
        system = self.spec.system
        return aks.ManagedClusterAgentPoolProfileArgs(
            name="system",
            mode="System",
            type="VirtualMachineScaleSets",
            vm_size=system.instance_type,
            os_type="Linux",
            os_disk_size_gb=system.disk_gib,
            max_pods=MAX_PODS,
            enable_auto_scaling=True,
            count=system.min,
            min_count=system.min,
            max_count=system.max,
            availability_zones=list(self.spec.zones),
            enable_encryption_at_host=True,
            enable_node_public_ip=False,
            node_labels={POOL_LABEL: "system"},
            vnet_subnet_id=subnet,
            tags=self.tags,
        )

    def _pool(
        self, cluster: aks.ManagedCluster, subnet: pulumi.Output[str], group: NodeGroup, previous: list[aks.AgentPool]
    ) -> aks.AgentPool:
        spot: dict[str, Any] = (
            {"scale_set_priority": "Spot", "scale_set_eviction_policy": "Delete", "spot_max_price": -1}
            if group.spot
            else {"scale_set_priority": "Regular"}
        )
        return aks.AgentPool(
            self.pool_name(group),
            resource_group_name=self.group.name,
            resource_name_=cluster.name,
            agent_pool_name=group.name,
            mode="User",
            type="VirtualMachineScaleSets",
            vm_size=group.pool.instance_types[0],
            os_type="Linux",
            os_sku="Ubuntu",
            os_disk_size_gb=group.pool.disk_gib,
            max_pods=MAX_PODS,
            gpu_profile=aks.GPUProfileArgs(driver="Install"),
            enable_auto_scaling=True,
            count=group.min,
            min_count=group.min,
            max_count=group.max,
            scale_down_mode="Delete",
            availability_zones=list(self.zones(group.pool)),
            enable_encryption_at_host=True,
            enable_node_public_ip=False,
            node_labels={**self.labels(group), **(dict([SPOT_LABEL]) if group.spot else {})},
            node_taints=[f"{key}={value}:{effect}" for key, value, effect in self.taints(group)]
            + ([SPOT_TAINT] if group.spot else []),
            vnet_subnet_id=subnet,
            tags=self.tags,
            opts=self.child_options(depends_on=previous, ignore_changes=["count"]),
            **spot,
        )

    def _registry(self, cluster: aks.ManagedCluster) -> containerregistry.Registry:
        """The registry. Its name is globally unique, so the provider adds a random suffix; it has no hyphens."""
        registry = containerregistry.Registry(
            self.spec.name.replace("-", "") + "images",
            resource_group_name=self.group.name,
            location=self.spec.region,
            sku=containerregistry.SkuArgs(name="Standard"),
            admin_user_enabled=False,
            anonymous_pull_enabled=False,
            tags=self.tags,
            opts=self.protected_options(),
        )
        kubelet = cluster.identity_profile.apply(lambda profile: str((profile or {})["kubeletidentity"].object_id))
        self._grant("nodes-pull", ACR_PULL, kubelet, registry.id)
        return registry

    def _identity(self, cluster: aks.ManagedCluster) -> managedidentity.UserAssignedIdentity:
        """The workload identity of the service's pods, without rights until some are granted."""
        identity = managedidentity.UserAssignedIdentity(
            self.name("serve"),
            resource_group_name=self.group.name,
            resource_name_=self.name("serve"),
            location=self.spec.region,
            tags=self.tags,
            opts=self.child_options(),
        )
        managedidentity.FederatedIdentityCredential(
            self.name("serve", "identity"),
            resource_group_name=self.group.name,
            resource_name_=identity.name,
            federated_identity_credential_resource_name="serve-app",
            issuer=cluster.oidc_issuer_profile.apply(lambda profile: str(profile.issuer_url if profile else "")),
            subject=f"system:serviceaccount:{self.spec.name}:serve-app",
            audiences=["api://AzureADTokenExchange"],
            opts=self.child_options(),
        )
        return identity

    def _logs(self, cluster: aks.ManagedCluster) -> None:
        workspace = operationalinsights.Workspace(
            self.name("logs"),
            resource_group_name=self.group.name,
            location=self.spec.region,
            sku=operationalinsights.WorkspaceSkuArgs(name="PerGB2018"),
            retention_in_days=LOG_DAYS,
            tags=self.tags,
            opts=self.child_options(),
        )
        monitor.DiagnosticSetting(
            self.name("audit"),
            name="control-plane",
            resource_uri=cluster.id,
            workspace_id=workspace.id,
            logs=[monitor.DiagnosticsLogSettingsArgs(category=category, enabled=True) for category in AUDIT_LOGS],
            opts=self.child_options(),
        )

    def _budget(self) -> None:
        """A budget for both resource groups: machines and disks are in the one that AKS creates.

        Alerts go to the subscription's owners and to the budget's addresses.
        """
        budget = self.spec.budget
        if budget is None:
            return
        alerts = [("Actual", threshold) for threshold in budget.thresholds] + [("Forecasted", 100)]
        consumption.Budget(
            self.name("budget"),
            budget_name=self.name("budget"),
            scope=pulumi.Output.format("/subscriptions/{0}", self.subscription),
            filter=consumption.BudgetFilterArgs(
                dimensions=consumption.BudgetComparisonExpressionArgs(
                    name="ResourceGroupName", operator="In", values=[self.spec.name, self._nodes_group]
                )
            ),
            amount=budget.monthly_usd,
            category="Cost",
            time_grain="Monthly",
            time_period=consumption.BudgetTimePeriodArgs(start_date=self.month),
            notifications={
                f"{kind}{threshold}": consumption.NotificationArgs(
                    enabled=True,
                    operator="GreaterThan",
                    threshold=threshold,
                    threshold_type=kind,
                    contact_emails=list(budget.emails),
                    contact_roles=["Owner"],
                )
                for kind, threshold in alerts
            },
            opts=self.child_options(ignore_changes=["timePeriod"]),
        )


def _guid(subscription: str, name: str) -> str:
    """A stable GUID for a role assignment, unique in the tenant."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{subscription}/{name}"))


def _tenth(cidr: str) -> str:
    """The address of the cluster's DNS service: the tenth address of the service range, AKS's convention."""
    return str(ipaddress.IPv4Network(cidr)[10])


def _certificate_authority(kubeconfig: str) -> str:
    """The certificate authority (PEM in base64) of a kubeconfig in base64."""
    (cluster,) = yaml.safe_load(base64.b64decode(kubeconfig))["clusters"]
    return str(cluster["cluster"]["certificate-authority-data"])
