"""Validates data with Ray's own code, in a separate process, because Ray is slow to import and prints warnings.

Reads a JSON object from stdin that maps the name of a validator below to a list of subjects. Writes the same object
with each subject replaced by the validator's result, or by {"refused": reason}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any], Any]


def serve(config: Any) -> Any:
    """Validate a Ray Serve config like `serve deploy`."""
    from ray.serve.schema import ServeDeploySchema

    return json.loads(ServeDeploySchema.model_validate(config).model_dump_json(exclude_unset=True))


def groups(cluster: Any) -> Any:
    """The configuration that Ray's autoscaler derives from a RayCluster on Kubernetes."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    return _derive_autoscaling_config_from_ray_cr(cluster)


def ray_up(config: Any) -> Any:
    """Validate a file like `ray up`."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def drain(options: Any) -> Any:
    """Parse the arguments of `ray drain-node`."""
    from ray.scripts.scripts import drain_node

    return drain_node.make_context("drain-node", options).params


def options(words: Any) -> Any:
    """The options of a subcommand of `ray` or `serve`, given as [program, subcommand]."""
    import ray.scripts.scripts
    import ray.serve.scripts

    command = {"ray": ray.scripts.scripts.cli, "serve": ray.serve.scripts.cli}[words[0]].commands[words[1]]
    return [name for each in command.params for name in each.opts]


def bootstrap(config: Any) -> Any:
    """Run a `ray up` file of AWS in a simulated account. Returns the file, security groups, roles and instances."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with mock_aws():
        region = config["provider"]["region"]
        ec2, iam = boto3.resource("ec2", region), boto3.client("iam", region)
        network = ec2.create_vpc(CidrBlock="10.1.0.0/16")
        zone = config["provider"]["availability_zone"].split(",")[0]
        public, private = (network.create_subnet(CidrBlock=f"10.1.{n}.0/24", AvailabilityZone=zone) for n in (0, 1))
        ec2.meta.client.modify_subnet_attribute(SubnetId=public.id, MapPublicIpOnLaunch={"Value": True})
        group = network.create_security_group(GroupName="ray", Description="ray")
        for profile in ("head", "worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        image = ec2.meta.client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for each in config["available_node_types"].values():
            each["node_config"] |= {"SecurityGroupIds": [group.id], "ImageId": image, "SubnetIds": [private.id]}

        bootstrapped = bootstrap_aws(config)
        provider = AWSNodeProvider(
            {**bootstrapped["provider"], "cache_stopped_nodes": False}, bootstrapped["cluster_name"]
        )
        for name, each in bootstrapped["available_node_types"].items():
            provider.create_node(each["node_config"], {"ray-user-node-type": name}, 1)
        groups = [{"name": each.group_name, "rules": each.ip_permissions} for each in network.security_groups.all()]
        return {
            "config": bootstrapped,
            "groups": groups,
            "roles": [role["RoleName"] for role in iam.list_roles()["Roles"]],
            "instances": {
                next(tag["Value"] for tag in each.tags if tag["Key"] == "ray-user-node-type"): {
                    "type": each.instance_type,
                    "spot": each.instance_lifecycle == "spot",
                    "public": each.public_ip_address,
                    "private": each.subnet_id == private.id,
                    "tokens": each.metadata_options["HttpTokens"],
                    "encrypted": [disk.encrypted for disk in each.volumes.all()],
                }
                for each in network.instances.all()
            },
        }


VALIDATORS: dict[str, Validator] = {each.__name__: each for each in (serve, groups, ray_up, drain, options, bootstrap)}


def validate(validator: Validator, subject: Any) -> Any:
    try:
        return validator(subject)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any error of Ray is a refusal
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr
    results = {
        name: [validate(VALIDATORS[name], subject) for subject in subjects]
        for name, subjects in json.load(sys.stdin).items()
    }
    json.dump(results, output)
