"""EKS: managed GPU node groups on private subnets, in plain resources that a plan can see into."""

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
# NoSchedule as EKS's API writes it.
EFFECTS = {"NoSchedule": "NO_SCHEDULE", "PreferNoSchedule": "PREFER_NO_SCHEDULE", "NoExecute": "NO_EXECUTE"}


def promised(kind: str, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What AWS adds to a resource that somebody here reads, for a plan."""
    told: dict[str, Any] = {"arn": f"${{{name}.arn}}"}
    match kind:
        case "aws.eks.Cluster":
            told |= {
                "name": inputs["name"],
                "endpoint": f"${{{name}.endpoint}}",
                "certificateAuthority": {"data": f"${{{name}.certificateAuthority}}"},
                "vpcConfig": {**inputs["vpcConfig"], "clusterSecurityGroupId": f"${{{name}.securityGroup}}"},
            }
        case "aws.eks.NodeGroup":
            told["resources"] = [{"autoscalingGroups": [{"name": f"${{{name}.autoscalingGroup}}"}]}]
            told["nodeGroupName"] = f"${{{name}.nodeGroupName}}"
        case "aws.ecr.Repository":
            told["repositoryUrl"] = f"${{{name}.repositoryUrl}}"
        case "aws.iam.Role":
            told["name"] = f"${{{name}.name}}"
        case "aws.ec2.LaunchTemplate":
            told["latestVersion"] = f"${{{name}.latestVersion}}"
    return told


class AwsCluster(GpuCluster):
    def create(self) -> Outputs:
        spec = self.spec
        self.tags = spec.all_tags()
        self.attached: dict[str, list[pulumi.Resource]] = {}  # a role's policies and pods, by its name
        self.partition = "aws-us-gov" if "-gov-" in spec.region else "aws"
        provider = aws.Provider(self.name("aws"), region=spec.region, opts=pulumi.ResourceOptions(parent=self))
        self._provider = provider
        network = vpc(self, self.tags)
        self._eks = cluster = self._cluster(network)
        nodes = self._role("nodes", _trust("ec2.amazonaws.com", ["sts:AssumeRole"]), *NODE_POLICIES)
        agent = self._addon(cluster, "eks-pod-identity-agent", [])
        self._api_from_inside(cluster)
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

    def under(self, **options: Any) -> pulumi.ResourceOptions:
        return super().under(provider=self._provider, **options)

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
            opts=self.kept(),
        )
        logs = aws.cloudwatch.LogGroup(
            self.name("logs"),
            name=f"/aws/eks/{spec.name}/cluster",  # EKS would make it itself, and keep logs for ever
            retention_in_days=LOG_DAYS,
            tags=self.tags,
            opts=self.under(),
        )
        return aws.eks.Cluster(
            self.name("cluster"),
            name=spec.name,
            version=spec.kubernetes_version,
            role_arn=role.arn,
            # Out of standard support EKS upgrades the cluster by itself, and does not cost six times as much.
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
            opts=self.kept(depends_on=[logs, *network.ready, *self.attached["cluster"]]),
        )

    def _api_from_inside(self, cluster: aws.eks.Cluster) -> None:
        """EKS lets nodes reach the API's private address and nobody else: no bastion of the network, and no VPN."""
        aws.vpc.SecurityGroupIngressRule(
            self.name("api-from-inside"),
            security_group_id=cluster.vpc_config.cluster_security_group_id,
            description="The Kubernetes API from inside the network",
            cidr_ipv4=self.spec.network.cidr,
            ip_protocol="tcp",
            from_port=443,
            to_port=443,
            tags=self.tags,
            opts=self.under(),
        )

    def _administrators(self, cluster: aws.eks.Cluster) -> None:
        for name, arn in self.principals().items():
            entry = aws.eks.AccessEntry(
                self.name("admin", name),
                cluster_name=cluster.name,
                principal_arn=arn,
                type="STANDARD",
                tags=self.tags,
                opts=self.under(),
            )
            aws.eks.AccessPolicyAssociation(
                self.name("admin", name, "policy"),
                cluster_name=cluster.name,
                principal_arn=arn,
                policy_arn=f"arn:{self.partition}:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy",
                access_scope=aws.eks.AccessPolicyAssociationAccessScopeArgs(type="cluster"),
                opts=self.under(depends_on=[entry]),
            )

    def _role(self, name: str, trust: str, *policies: str) -> aws.iam.Role:
        role = aws.iam.Role(self.name(name, "role"), assume_role_policy=trust, tags=self.tags, opts=self.under())
        self.attached[name] = [
            aws.iam.RolePolicyAttachment(
                self.name(name, policy.lower().replace("_", "-").rpartition("/")[2]),
                role=role.name,
                policy_arn=f"arn:{self.partition}:iam::aws:policy/{policy}",
                opts=self.under(),
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
            version=cluster.version,  # the control plane's: an upgrade takes the nodes along
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
            opts=self.under(depends_on=[*after, *self.attached["nodes"]], ignore_changes=["scalingConfig.desiredSize"]),
        )

    def _gpu_group(
        self,
        cluster: aws.eks.Cluster,
        network: Vpc,
        role: aws.iam.Role,
        group: NodeGroup,
        after: list[pulumi.Resource],
    ) -> aws.eks.NodeGroup:
        made = aws.eks.NodeGroup(
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
            # The autoscaler decides how many there are; an update must not decide otherwise.
            opts=self.under(depends_on=[*after, *self.attached["nodes"]], ignore_changes=["scalingConfig.desiredSize"]),
        )
        self._autoscaler_tags(made, group)
        return made

    def _gpu_labels(self, group: NodeGroup) -> dict[str, str]:
        """By `k8s.amazonaws.com/accelerator` the autoscaler knows that a node which shows no GPU yet will have one.

        Without it a group scales from zero once and never again (kubernetes/autoscaler#8799), and while the GPU is not
        there yet more nodes are added than are needed (#3164).
        """
        labels = self.labels(group)
        return {**labels, "k8s.amazonaws.com/accelerator": labels["serve-app/accelerator"]}

    def _autoscaler_tags(self, made: aws.eks.NodeGroup, group: NodeGroup) -> None:
        """What a node would be, for a group that has none. EKS does not pass a node group's tags on to its group of
        EC2's autoscaling, so each is put there by itself."""
        machine = self.machine(group.pool)
        wanted = {f"label/{key}": value for key, value in self._gpu_labels(group).items()}
        wanted |= {f"taint/{key}": f"{value}:{effect}" for key, value, effect in self.taints(group)}
        wanted |= {
            "resources/nvidia.com/gpu": str(machine.gpu_count),
            "resources/ephemeral-storage": f"{group.pool.disk_gib}Gi",
        }
        scaled = made.resources[0].autoscaling_groups[0].name
        for key, value in sorted(wanted.items()):
            aws.autoscaling.Tag(
                self.pool_name(group, "tag", key.replace("/", ".")),
                autoscaling_group_name=scaled,
                tag=aws.autoscaling.TagTagArgs(key=f"{TEMPLATE}/{key}", value=value, propagate_at_launch=False),
                opts=self.under(),
            )

    def _template(self, name: str, disk_gib: int) -> aws.eks.NodeGroupLaunchTemplateArgs:
        """Encrypted disks, and instance metadata that a pod cannot reach: a token, and one hop."""
        template = aws.ec2.LaunchTemplate(
            f"{name}-template",
            block_device_mappings=[
                aws.ec2.LaunchTemplateBlockDeviceMappingArgs(
                    device_name="/dev/xvda",
                    ebs=aws.ec2.LaunchTemplateBlockDeviceMappingEbsArgs(
                        volume_type="gp3",
                        volume_size=disk_gib,
                        throughput=250,  # MiB/s: an image of 10 GiB is unpacked at the speed of the disk
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
            opts=self.under(),
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
            opts=self.under(depends_on=after),
        )

    def _cluster_services(self, cluster: aws.eks.Cluster, system: aws.eks.NodeGroup, agent: aws.eks.Addon) -> None:
        """What has to run on nodes: so after there are some."""
        self._addon(cluster, "kube-proxy", [])
        self._addon(cluster, "coredns", [system])
        # Ray's memory is on a disk, and so is Prometheus' history.
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
                opts=self.under(),
            )

    def _pod_role(
        self, cluster: aws.eks.Cluster, name: str, namespace: str, account: str, agent: aws.eks.Addon, *policies: str
    ) -> aws.iam.Role:
        """A role that the pods of one service account have, by EKS Pod Identity."""
        role = self._role(name, _trust("pods.eks.amazonaws.com", ["sts:AssumeRole", "sts:TagSession"]), *policies)
        self.attached[name].append(
            aws.eks.PodIdentityAssociation(
                self.name(name, "identity"),
                cluster_name=cluster.name,
                namespace=namespace,
                service_account=account,
                role_arn=role.arn,
                tags=self.tags,
                opts=self.under(depends_on=[agent]),
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
            force_delete=not self.spec.protect,  # or it could not be taken down with an image in it
            tags=self.tags,
            opts=self.kept(),
        )

    def _budget(self) -> None:
        """Of what is tagged with the cluster's name; `cluster` has to be activated as a cost allocation tag once."""
        budget = self.spec.budget
        if budget is None:
            return
        alarms = [("ACTUAL", threshold) for threshold in budget.thresholds] + [("FORECASTED", 100)]
        aws.budgets.Budget(
            self.name("budget"),
            budget_type="COST",
            limit_amount=f"{budget.monthly_usd:.2f}",
            limit_unit="USD",
            time_unit="MONTHLY",
            cost_filters=[
                aws.budgets.BudgetCostFilterArgs(name="TagKeyValue", values=[f"user:cluster${self.spec.name}"])
            ],
            notifications=[  # one without a subscriber is refused by AWS
                aws.budgets.BudgetNotificationArgs(
                    comparison_operator="GREATER_THAN",
                    notification_type=kind,
                    threshold=threshold,
                    threshold_type="PERCENTAGE",
                    subscriber_email_addresses=list(budget.emails),
                )
                for kind, threshold in alarms
                if budget.emails
            ],
            tags=self.tags,
            opts=self.under(),
        )


def _scaling(least: int, most: int) -> aws.eks.NodeGroupScalingConfigArgs:
    return aws.eks.NodeGroupScalingConfigArgs(min_size=least, max_size=most, desired_size=least)


def _trust(service: str, actions: list[str]) -> str:
    statement = {"Effect": "Allow", "Principal": {"Service": service}, "Action": actions}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _autoscaler_policy(cluster: str) -> dict[str, Any]:
    """It may look at everything, and change the groups of this cluster only."""
    looks = [
        "autoscaling:Describe*",
        "ec2:DescribeImages",
        "ec2:DescribeInstanceTypes",
        "ec2:DescribeLaunchTemplateVersions",
    ]
    looks += ["ec2:GetInstanceTypesFromInstanceRequirements", "eks:DescribeNodegroup"]
    acts = ["autoscaling:SetDesiredCapacity", "autoscaling:TerminateInstanceInAutoScalingGroup"]
    owned = {"StringEquals": {f"aws:ResourceTag/k8s.io/cluster-autoscaler/{cluster}": "owned"}}
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": looks, "Resource": "*"},
            {"Effect": "Allow", "Action": acts, "Resource": "*", "Condition": owned},
        ],
    }
