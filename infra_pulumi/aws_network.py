"""The VPC of an EKS cluster: private subnets for nodes, public subnets for load balancers and NAT only."""

from __future__ import annotations

from dataclasses import dataclass

import pulumi
import pulumi_aws as aws

from infra_pulumi.base import GpuCluster, private_blocks, public_blocks

ANYWHERE = "0.0.0.0/0"


@dataclass(frozen=True, slots=True)
class Vpc:
    """`private` has the private subnets by zone; nodes reach the internet once the resources in `ready` exist."""

    vpc: aws.ec2.Vpc
    private: dict[str, aws.ec2.Subnet]
    ready: list[pulumi.Resource]


def vpc(cluster: GpuCluster, tags: dict[str, str]) -> Vpc:
    """Create the VPC, its subnets, routes and NAT gateways."""
    spec = cluster.spec
    network = aws.ec2.Vpc(
        cluster.name("vpc"),
        cidr_block=spec.network.cidr,
        enable_dns_hostnames=True,
        enable_dns_support=True,
        tags={**tags, "Name": spec.name},
        opts=cluster.protected_options(),
    )
    # The default security group lets its members reach each other; managing it without rules removes that access.
    aws.ec2.DefaultSecurityGroup(cluster.name("default"), vpc_id=network.id, tags=tags, opts=cluster.child_options())
    gateways = _gateways(cluster, network, tags)
    private = {
        zone: _subnet(cluster, network, zone, block, "private", "internal-elb", tags)
        for zone, block in zip(spec.zones, private_blocks(spec.network.cidr, len(spec.zones)), strict=True)
    }
    routes = []
    tables = []
    for index, (zone, subnet) in enumerate(private.items()):
        nat = gateways[index % len(gateways)]
        table, route = _table(cluster, network, f"private-{zone}", [subnet], tags, nat_gateway_id=nat.id)
        tables.append(table)
        routes.append(route)
    # Image layers of ECR and weights in S3 then bypass NAT, which costs per GB.
    aws.ec2.VpcEndpoint(
        cluster.name("s3"),
        vpc_id=network.id,
        service_name=f"com.amazonaws.{spec.region}.s3",
        vpc_endpoint_type="Gateway",
        route_table_ids=[table.id for table in tables],
        tags=tags,
        opts=cluster.child_options(),
    )
    return Vpc(network, private, list(routes))


def _gateways(cluster: GpuCluster, network: aws.ec2.Vpc, tags: dict[str, str]) -> list[aws.ec2.NatGateway]:
    """Create the public subnets with their internet route, and a NAT gateway in the first subnet or in each."""
    spec = cluster.spec
    internet = aws.ec2.InternetGateway(
        cluster.name("internet"), vpc_id=network.id, tags=tags, opts=cluster.child_options()
    )
    public = [
        _subnet(cluster, network, zone, block, "public", "elb", tags)
        for zone, block in zip(spec.zones, public_blocks(spec.network.cidr, len(spec.zones)), strict=True)
    ]
    _, route = _table(cluster, network, "public", public, tags, gateway_id=internet.id)
    return [
        _nat(cluster, zone, subnet, route, tags)
        for zone, subnet in list(zip(spec.zones, public, strict=True))[: 1 if spec.network.nat == "one" else None]
    ]


def _nat(
    cluster: GpuCluster, zone: str, subnet: aws.ec2.Subnet, route: aws.ec2.Route, tags: dict[str, str]
) -> aws.ec2.NatGateway:
    address = aws.ec2.Eip(cluster.name("nat-ip", zone), domain="vpc", tags=tags, opts=cluster.child_options())
    return aws.ec2.NatGateway(
        cluster.name("nat", zone),
        allocation_id=address.id,
        subnet_id=subnet.id,
        tags=tags,
        opts=cluster.child_options(depends_on=[route]),
    )


def _subnet(
    cluster: GpuCluster, network: aws.ec2.Vpc, zone: str, block: str, kind: str, role: str, tags: dict[str, str]
) -> aws.ec2.Subnet:
    return aws.ec2.Subnet(
        cluster.name(kind, zone),
        vpc_id=network.id,
        availability_zone=zone,
        cidr_block=block,
        map_public_ip_on_launch=False,
        tags={**tags, "Name": cluster.name(kind, zone), f"kubernetes.io/role/{role}": "1"},
        opts=cluster.child_options(),
    )


def _table(
    cluster: GpuCluster,
    network: aws.ec2.Vpc,
    name: str,
    subnets: list[aws.ec2.Subnet],
    tags: dict[str, str],
    **target: pulumi.Input[str],
) -> tuple[aws.ec2.RouteTable, aws.ec2.Route]:
    """A route table with the default route `target`, associated with `subnets`."""
    table = aws.ec2.RouteTable(cluster.name("routes", name), vpc_id=network.id, tags=tags, opts=cluster.child_options())
    route = aws.ec2.Route(
        cluster.name("route", name),
        route_table_id=table.id,
        destination_cidr_block=ANYWHERE,
        opts=cluster.child_options(),
        **target,
    )
    for index, subnet in enumerate(subnets):
        aws.ec2.RouteTableAssociation(
            cluster.name("route", name, str(index)),
            route_table_id=table.id,
            subnet_id=subnet.id,
            opts=cluster.child_options(),
        )
    return table, route
