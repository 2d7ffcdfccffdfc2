"""The EKS cluster: managed GPU node groups on private subnets, made of plain resources so that a plan lists all."""

from __future__ import annotations

import json
from typing import Any

import pulumi
import pulumi_aws as aws

from infra_pulumi.aws_network import Vpc, vpc
from infra_pulumi.base import Access, GpuCluster, Outputs
from infra_pulumi.spec import NodeGroup

LOGS = ["api", "audit", "authenticator", "controllerManager", "scheduler"]
LOG_DAYS = 30
GPU_AMI = "AL2023_x86_64_NVIDIA"  # driver and container toolkit, but no device plugin
CPU_AMI = "AL2023_x86_64_STANDARD"
NODE_POLICIES = ("AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly")
TEMPLATE = "k8s.io/cluster-autoscaler/node-template"
# Taint effects in the spelling of EKS's API.
EFFECTS = {"NoSchedule": "NO_SCHEDULE", "PreferNoSchedule": "PREFER_NO_SCHEDULE", "NoExecute": "NO_EXECUTE"}


def computed_outputs(kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs of AWS that this program reads, as placeholders for a plan."""
    outputs: dict[str, Any] = {"arn": f"${{{name}.arn}}"}
    match kind:
        case "aws.eks.Cluster":
            outputs |= {
                "name": inputs["name"],
                "endpoint": f"${{{name}.endpoint}}",
                "certificateAuthority": {"data": f"${{{name}.certificateAuthority}}"},
                "vpcConfig": {**inputs["vpcConfig"], "clusterSecurityGroupId": f"${{{name}.securityGroup}}"},
            }
        case "aws.eks.NodeGroup":
            outputs["resources"] = [{"autoscalingGroups": [{"name": f"${{{name}.autoscalingGroup}}"}]}]
            outputs["nodeGroupName"] = f"${{{name}.nodeGroupName}}"
        case "aws.ecr.Repository":
            outputs["repositoryUrl"] = f"${{{name}.repositoryUrl}}"
        case "aws.iam.Role":
            outputs["name"] = f"${{{name}.name}}"
        case "aws.ec2.LaunchTemplate":
            outputs["latestVersion"] = f"${{{name}.latestVersion}}"
    return outputs


class AwsCluster(GpuCluster):
    def create(self) -> Outputs:
        spec = self.spec
        self.tags = spec.all_tags()
        self.attached: dict[str, list[pulumi.Resource]] = {}  # policy attachments and pod identities, by role name
        self.partition = "aws-us-gov" if "-gov-" in spec.region else "aws"
        provider = aws.Provider(self.name("aws"), region=spec.region, opts=pulumi.ResourceOptions(parent=self))
        self._provider = provider
        network = vpc(self, self.tags)
        self._eks = cluster = self._cluster(network)
        nodes = self._role("nodes", _trust("ec2.amazonaws.com", ["sts:AssumeRole"]), *NODE_POLICIES)
        agent = self._addon(cluster, "eks-pod-identity-agent", [])
        self._allow_api_from_network(cluster)
        self._administrators(cluster)
        cni = self._addon(cluster, "vpc-cni", [], {"enableNetworkPolicy": str(spec.addons.network_policy).lower()})
        system = self._system_group(cluster, network, nodes, [cni])
        groups = [system, *(self._gpu_group(cluster, network, nodes, group, [cni]) for group in spec.node_groups())]
        self._cluster_services(cluster, system, agent)
        repository = self._registry()
        identity = self._pod_role(cluster, "serve", spec.name, "serve-app", agent)
        self._budget()
        return Outputs(
            cluster_name=cluster.name,
            endpoint=cluster.endpoint,
            registry=repository.repository_url,
            kubeconfig_command=f"aws eks update-kubeconfig --region {spec.region} --name {spec.name}",
            identity=identity.arn,
            node_groups=[group.node_group_name for group in groups],
        )

    def access(self) -> Access:
        command = ("aws", "eks", "get-token", "--region", self.spec.region, "--cluster-name", self.spec.name)
        return Access(self._eks.endpoint, self._eks.certificate_authority.data, command)

    def child_options(self, **options: Any) -> pulumi.ResourceOptions:
        return super().child_options(provider=self._provider, **options)

    def _cluster(self, network: Vpc) -> aws.eks.Cluster:
        spec = self.spec
        role = self._role(
            "cluster", _trust("eks.amazonaws.com", ["sts:AssumeRole", "sts:TagSession"]), "AmazonEKSClusterPolicy"
        )
        key = aws.kms.Key(
            self.name("secrets"),
            description=f"Envelope encryption of the Kubernetes secrets of {spec.name}",
            enable_key_rotation=True,
            deletion_window_in_days=30,
            tags=self.tags,
            opts=self.protected_options(),
        )
        logs = aws.cloudwatch.LogGroup(
            self.name("logs"),
            name=f"/aws/eks/{spec.name}/cluster",  # otherwise EKS creates it and keeps logs without limit
            retention_in_days=LOG_DAYS,
            tags=self.tags,
            opts=self.child_options(),
        )
        return aws.eks.Cluster(
            self.name("cluster"),
            name=spec.name,
            version=spec.kubernetes_version,
            role_arn=role.arn,
            # When standard support ends, EKS upgrades the cluster instead of charging six times the price.
            upgrade_policy=aws.eks.ClusterUpgradePolicyArgs(support_type="STANDARD"),
            access_config=aws.eks.ClusterAccessConfigArgs(
                authentication_mode="API", bootstrap_cluster_creator_admin_permissions=True
            ),
            bootstrap_self_managed_addons=False,
            deletion_protection=spec.protect,
            enabled_cluster_log_types=LOGS,
            encryption_config=aws.eks.ClusterEncryptionConfigArgs(
                provider=aws.eks.ClusterEncryptionConfigProviderArgs(key_arn=key.arn), resources=["secrets"]
            ),
            kubernetes_network_config=aws.eks.ClusterKubernetesNetworkConfigArgs(
                service_ipv4_cidr=spec.network.services_cidr
            ),
            vpc_config=aws.eks.ClusterVpcConfigArgs(
                subnet_ids=[subnet.id for subnet in network.private.values()],
                endpoint_private_access=True,
                endpoint_public_access=bool(spec.network.api_cidrs),
                public_access_cidrs=list(spec.network.api_cidrs) or None,
            ),
            tags=self.tags,
            opts=self.protected_options(depends_on=[logs, *network.ready, *self.attached["cluster"]]),
        )

    def _allow_api_from_network(self, cluster: aws.eks.Cluster) -> None:
        """Let the whole network reach the API. By default EKS lets only nodes reach it, not a bastion host or a VPN."""
        aws.vpc.SecurityGroupIngressRule(
            self.name("api-from-inside"),
            security_group_id=cluster.vpc_config.cluster_security_group_id,
            description="The Kubernetes API from inside the network",
            cidr_ipv4=self.spec.network.cidr,
            ip_protocol="tcp",
            from_port=443,
            to_port=443,
            tags=self.tags,
            opts=self.child_options(),
        )

    def _administrators(self, cluster: aws.eks.Cluster) -> None:
        for name, arn in self.principals().items():
            entry = aws.eks.AccessEntry(
                self.name("admin", name),
                cluster_name=cluster.name,
                principal_arn=arn,
                type="STANDARD",
                tags=self.tags,
                opts=self.child_options(),
            )
            aws.eks.AccessPolicyAssociation(
                self.name("admin", name, "policy"),
                cluster_name=cluster.name,
                principal_arn=arn,
                policy_arn=f"arn:{self.partition}:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy",
                access_scope=aws.eks.AccessPolicyAssociationAccessScopeArgs(type="cluster"),
                opts=self.child_options(depends_on=[entry]),
            )

    def _role(self, name: str, trust: str, *policies: str) -> aws.iam.Role:
        role = aws.iam.Role(
            self.name(name, "role"), assume_role_policy=trust, tags=self.tags, opts=self.child_options()
        )
        self.attached[name] = [
            aws.iam.RolePolicyAttachment(
                self.name(name, policy.lower().replace("_", "-").rpartition("/")[2]),
                role=role.name,
                policy_arn=f"arn:{self.partition}:iam::aws:policy/{policy}",
                opts=self.child_options(),
            )
            for policy in policies
        ]
        return role

    def _system_group(
        self, cluster: aws.eks.Cluster, network: Vpc, role: aws.iam.Role, after: list[pulumi.Resource]
    ) -> aws.eks.NodeGroup:
        system = self.spec.system
        return aws.eks.NodeGroup(
            self.name("system"),
            cluster_name=cluster.name,
            node_group_name_prefix="system-",
            version=cluster.version,  # an upgrade of the control plane upgrades the nodes too
            node_role_arn=role.arn,
            subnet_ids=[subnet.id for subnet in network.private.values()],
            ami_type=CPU_AMI,
            capacity_type="ON_DEMAND",
            instance_types=[str(system.instance_type)],
            launch_template=self._template(self.name("system"), system.disk_gib),
            scaling_config=_scaling(system.min, system.max),
            labels={"serve-app/pool": "system"},
            update_config=aws.eks.NodeGroupUpdateConfigArgs(max_unavailable=1),
            node_repair_config=aws.eks.NodeGroupNodeRepairConfigArgs(enabled=True),
            tags=self.tags,
            opts=self.child_options(
                depends_on=[*after, *self.attached["nodes"]], ignore_changes=["scalingConfig.desiredSize"]
            ),
        )

    def _gpu_group(
        self,
        cluster: aws.eks.Cluster,
        network: Vpc,
        role: aws.iam.Role,
        group: NodeGroup,
        after: list[pulumi.Resource],
    ) -> aws.eks.NodeGroup:
        node_group = aws.eks.NodeGroup(
            self.pool_name(group),
            cluster_name=cluster.name,
            node_group_name_prefix=f"{group.name}-",
            version=cluster.version,
            node_role_arn=role.arn,
            subnet_ids=[network.private[zone].id for zone in self.zones(group.pool)],
            ami_type=GPU_AMI,
            capacity_type="SPOT" if group.spot else "ON_DEMAND",
            instance_types=list(group.pool.instance_types),
            launch_template=self._template(self.pool_name(group), group.pool.disk_gib),
            scaling_config=_scaling(group.min, group.max),
            labels=self._gpu_labels(group),
            taints=[
                aws.eks.NodeGroupTaintArgs(key=key, value=value, effect=EFFECTS[effect])
                for key, value, effect in self.taints(group)
            ],
            update_config=aws.eks.NodeGroupUpdateConfigArgs(max_unavailable=1),
            node_repair_config=aws.eks.NodeGroupNodeRepairConfigArgs(enabled=True),
            tags=self.tags,
            # The autoscaler sets the number of nodes; an update must not change it.
            opts=self.child_options(
                depends_on=[*after, *self.attached["nodes"]], ignore_changes=["scalingConfig.desiredSize"]
            ),
        )
        self._autoscaler_tags(node_group, group)
        return node_group

    def _gpu_labels(self, group: NodeGroup) -> dict[str, str]:
        """Labels of a GPU node, including the one that makes the autoscaler expect a GPU.

        Without `k8s.amazonaws.com/accelerator` a group scales from zero only once (kubernetes/autoscaler#8799), and the
        autoscaler adds more nodes than needed until the GPU is registered (#3164).
        """
        labels = self.labels(group)
        return {**labels, "k8s.amazonaws.com/accelerator": labels["serve-app/accelerator"]}

    def _autoscaler_tags(self, node_group: aws.eks.NodeGroup, group: NodeGroup) -> None:
        """Tag the EC2 Auto Scaling group with what its nodes would have, so that the autoscaler can scale from zero.

        EKS does not copy a node group's tags to its Auto Scaling group, so each tag is a resource.
        """
        machine = self.machine(group.pool)
        tags = {f"label/{key}": value for key, value in self._gpu_labels(group).items()}
        tags |= {f"taint/{key}": f"{value}:{effect}" for key, value, effect in self.taints(group)}
        tags |= {
            "resources/nvidia.com/gpu": str(machine.gpu_count),
            "resources/ephemeral-storage": f"{group.pool.disk_gib}Gi",
        }
        scaling_group = node_group.resources[0].autoscaling_groups[0].name
        for key, value in sorted(tags.items()):
            aws.autoscaling.Tag(
                self.pool_name(group, "tag", key.replace("/", ".")),
                autoscaling_group_name=scaling_group,
                tag=aws.autoscaling.TagTagArgs(key=f"{TEMPLATE}/{key}", value=value, propagate_at_launch=False),
                opts=self.child_options(),
            )

    def _template(self, name: str, disk_gib: int) -> aws.eks.NodeGroupLaunchTemplateArgs:
        """A launch template with encrypted disks, and instance metadata that pods cannot reach (token, one hop)."""
        template = aws.ec2.LaunchTemplate(
            f"{name}-template",
            block_device_mappings=[
                aws.ec2.LaunchTemplateBlockDeviceMappingArgs(
                    device_name="/dev/xvda",
                    ebs=aws.ec2.LaunchTemplateBlockDeviceMappingEbsArgs(
                        volume_type="gp3",
                        volume_size=disk_gib,
                        throughput=250,  # MiB/s: the disk limits how fast a 10 GiB image is unpacked
                        iops=3000,
                        encrypted="true",
                        delete_on_termination="true",
                    ),
                )
            ],
            metadata_options=aws.ec2.LaunchTemplateMetadataOptionsArgs(
                http_endpoint="enabled", http_tokens="required", http_put_response_hop_limit=1
            ),
            tag_specifications=[
                aws.ec2.LaunchTemplateTagSpecificationArgs(resource_type=kind, tags={**self.tags, "Name": name})
                for kind in ("instance", "volume")
            ],
            update_default_version=True,
            tags=self.tags,
            opts=self.child_options(),
        )
        return aws.eks.NodeGroupLaunchTemplateArgs(
            id=template.id, version=template.latest_version.apply(lambda version: str(version))
        )

    def _addon(
        self, cluster: aws.eks.Cluster, name: str, after: list[pulumi.Resource], values: dict[str, Any] | None = None
    ) -> aws.eks.Addon:
        return aws.eks.Addon(
            self.name(name),
            cluster_name=cluster.name,
            addon_name=name,
            configuration_values=json.dumps(values) if values else None,
            resolve_conflicts_on_create="OVERWRITE",
            resolve_conflicts_on_update="PRESERVE",
            tags=self.tags,
            opts=self.child_options(depends_on=after),
        )

    def _cluster_services(self, cluster: aws.eks.Cluster, system: aws.eks.NodeGroup, agent: aws.eks.Addon) -> None:
        """Add-ons that run on nodes, and therefore need the system node group first."""
        self._addon(cluster, "kube-proxy", [])
        self._addon(cluster, "coredns", [system])
        # Redis and Prometheus store their data on volumes.
        self._pod_role(
            cluster, "disks", "kube-system", "ebs-csi-controller-sa", agent, "service-role/AmazonEBSCSIDriverPolicy"
        )
        self._addon(cluster, "aws-ebs-csi-driver", [system, *self.attached["disks"]])
        if self.spec.addons.cluster_autoscaler:
            role = self._pod_role(cluster, "autoscaler", "kube-system", "cluster-autoscaler", agent)
            aws.iam.RolePolicy(
                self.name("autoscaler", "policy"),
                role=role.name,
                policy=json.dumps(_autoscaler_policy(self.spec.name)),
                opts=self.child_options(),
            )

    def _pod_role(
        self, cluster: aws.eks.Cluster, name: str, namespace: str, account: str, agent: aws.eks.Addon, *policies: str
    ) -> aws.iam.Role:
        """A role for the pods of one service account, by EKS Pod Identity."""
        role = self._role(name, _trust("pods.eks.amazonaws.com", ["sts:AssumeRole", "sts:TagSession"]), *policies)
        self.attached[name].append(
            aws.eks.PodIdentityAssociation(
                self.name(name, "identity"),
                cluster_name=cluster.name,
                namespace=namespace,
                service_account=account,
                role_arn=role.arn,
                tags=self.tags,
                opts=self.child_options(depends_on=[agent]),
            )
        )
        return role

    def _registry(self) -> aws.ecr.Repository:
        return aws.ecr.Repository(
            self.name("images"),
            name=self.spec.name,
            image_tag_mutability="IMMUTABLE",
            image_scanning_configuration=aws.ecr.RepositoryImageScanningConfigurationArgs(scan_on_push=True),
            encryption_configurations=[aws.ecr.RepositoryEncryptionConfigurationArgs(encryption_type="KMS")],
            force_delete=not self.spec.protect,  # otherwise a registry with images cannot be deleted
            tags=self.tags,
            opts=self.protected_options(),
        )

    def _budget(self) -> None:
        """A budget for resources with the tag `cluster`, which must be activated as a cost allocation tag once."""
        budget = self.spec.budget
        if budget is None:
            return
        alerts = [("ACTUAL", threshold) for threshold in budget.thresholds] + [("FORECASTED", 100)]
        aws.budgets.Budget(
            self.name("budget"),
            budget_type="COST",
            limit_amount=f"{budget.monthly_usd:.2f}",
            limit_unit="USD",
            time_unit="MONTHLY",
            cost_filters=[
                aws.budgets.BudgetCostFilterArgs(name="TagKeyValue", values=[f"user:cluster${self.spec.name}"])
            ],
            notifications=[  # AWS refuses a notification without a subscriber
                aws.budgets.BudgetNotificationArgs(
                    comparison_operator="GREATER_THAN",
                    notification_type=kind,
                    threshold=threshold,
                    threshold_type="PERCENTAGE",
                    subscriber_email_addresses=list(budget.emails),
                )
                for kind, threshold in alerts
                if budget.emails
            ],
            tags=self.tags,
            opts=self.child_options(),
        )


def _scaling(minimum: int, maximum: int) -> aws.eks.NodeGroupScalingConfigArgs:
    return aws.eks.NodeGroupScalingConfigArgs(min_size=minimum, max_size=maximum, desired_size=minimum)


def _trust(service: str, actions: list[str]) -> str:
    statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": actions}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _autoscaler_policy(cluster: str) -> dict[str, Any]:
    """An IAM policy: read everything, change only the node groups of this cluster."""
    read_actions = [
        "autoscaling:Describe*",
        "ec2:DescribeImages",
        "ec2:DescribeInstanceTypes",
        "ec2:DescribeLaunchTemplateVersions",
    ]
    read_actions += ["ec2:GetInstanceTypesFromInstanceRequirements", "eks:DescribeNodegroup"]
    write_actions = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    owned = {"StringEquals": {f"aws:ResourceTag/k8s.io/cluster-autoscaler/{cluster}": "owned"}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": read_actions, "Resource": "*"},
            {"Effect": "Allow", "Action": write_actions, "Resource": "*", "Condition": owned},
        ],
    }
