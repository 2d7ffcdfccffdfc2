"""Parses the command line of `python -m infra_pulumi` and builds the cluster description from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from infra_pulumi import cold_start, model_sizing
from infra_pulumi.sizing_facts import Dtype
from infra_pulumi.spec import ClusterSpec, Provider, parse, read
from infra_pulumi.vllm_sizing import VllmSetup

_ABOUT = """\
Make a Kubernetes cluster with GPU nodes for the service on AWS, GCP or Azure from one description.

plan, cost, catalogue, policy and render need no cloud, no credentials, no network and no Pulumi CLI.

  catalogue   list machines and prices; --fits 7b --dtype int8 lists machines that hold a model, and their token cost
  plan        list every resource in creation order, the policy's findings, the monthly cost and warnings
  cost        list idle, expected and maximum monthly cost, with the source of each price
  policy      list the policy's findings; --rules lists the rules and their reasons
  render      write Kubernetes manifests, Helm values, `ray up` files and a diagram
  doctor      list installed packages and programs, and those that deploy still needs
  deploy      run plan and, if the policy finds no errors, Pulumi's update
  outputs     print the outputs of a deployed cluster
  destroy     delete all resources of a deployed cluster
"""

_EPILOG = """\
examples:
  python -m infra_pulumi catalogue --fits 7b --dtype int8
  python -m infra_pulumi catalogue --fits 70b --dtype fp8 --engine vllm --context 8192
  python -m infra_pulumi plan --provider aws --instance-type g5.xlarge --spot --min 0 --max 4 --budget 500
  python -m infra_pulumi plan --spec cluster.yaml --json > plan.json
  python -m infra_pulumi deploy --spec cluster.yaml

exit codes: 0 success; 1 the policy found errors, Pulumi failed, or a file cannot be written; 2 the description or the
arguments are invalid; 3 a required package or program is not installed.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="python -m infra_pulumi",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = _add_spec_command(commands, "plan", "list resources, findings, costs and warnings")
    cold = plan.add_argument_group("cold start")
    cold.add_argument(
        "--image-gb",
        type=_number_up_to(1000),
        default=cold_start.IMAGE_GB,
        help="image size in GB (default: %(default)s)",
    )
    cold.add_argument(
        "--weights-gib",
        type=_number_up_to(10_000),
        default=cold_start.WEIGHTS_GIB,
        help="weights in GiB (default: %(default)s)",
    )
    cold.add_argument(
        "--engine",
        choices=get_args(cold_start.Engine),
        help="the engine that starts (default: that of the models in serve.config)",
    )
    _add_spec_command(commands, "cost", "list the monthly cost")
    checks = _add_spec_command(commands, "policy", "list the policy's findings")
    checks.add_argument("--rules", action="store_true", help="list the rules and their reasons")
    files = _add_spec_command(commands, "render", "write files for kubectl, helm and ray, and a diagram")
    files.add_argument("--output", type=Path, default=Path("rendered"), help="target folder (default: %(default)s)")
    _catalogue(commands)
    doctor = commands.add_parser("doctor", help="list installed packages and programs")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    for name, text in (
        ("deploy", "create or update"),
        ("outputs", "print the outputs"),
        ("destroy", "delete everything"),
    ):
        command = _add_spec_command(commands, name, text)
        command.add_argument("--backend", default="", help="URL of Pulumi's state backend (default: files in --state)")
        command.add_argument(
            "--state", type=Path, default=Path(".pulumi-state"), help="folder of Pulumi's state (default: %(default)s)"
        )
        if name != "outputs":
            command.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    return root


def _add_spec_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command that takes a description: a file, flags, or a file with flags that override it."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    group = command.add_argument_group("description")
    group.add_argument("--spec", type=Path, metavar="FILE", help="YAML file; flags override its values")
    group.add_argument("--provider", choices=get_args(Provider))
    group.add_argument("--name", help="cluster name (default: serve-app)")
    group.add_argument("--region", help="default: us-west-2 (AWS), us-central1 (GCP), eastus (Azure)")
    group.add_argument("--zone", action="append", metavar="ZONE", help="repeat for several zones")
    group.add_argument("--instance-type", action="append", metavar="TYPE", help="repeat for alternatives (AWS only)")
    group.add_argument("--min", type=int, metavar="N", help="minimum number of GPU nodes (default: 0)")
    group.add_argument("--max", type=int, metavar="N", help="maximum number of GPU nodes (default: 4)")
    group.add_argument("--spot", action="store_true", default=None, help="use spot machines")
    group.add_argument("--on-demand-base", type=int, metavar="N", help="how many of --min are on demand (default: 0)")
    group.add_argument(
        "--api-cidr", action="append", metavar="CIDR", help="addresses allowed to call the Kubernetes API"
    )
    group.add_argument("--budget", type=float, metavar="USD", help="monthly budget; alerts at 50, 80 and 100 percent")
    group.add_argument("--email", action="append", metavar="ADDRESS", help="recipient of budget alerts")
    group.add_argument(
        "--production", action="store_true", default=None, help="protect resources and apply stricter rules"
    )
    group.add_argument(
        "--allow-refused", action="store_true", default=None, help="allow machines that the catalogue refuses"
    )
    prices = command.add_argument_group("prices")
    prices.add_argument("--prices", type=Path, metavar="FILE", help="replaces infra_pulumi/catalogue.yaml")
    prices.add_argument(
        "--busy-share", type=_share, metavar="SHARE", help="share of time with all nodes running (default: 0.25)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _catalogue(commands: Any) -> None:
    command = commands.add_parser("catalogue", help="list machines and prices", description="List machines and prices.")
    command.add_argument(
        "--fits", type=_size, metavar="SIZE", help="list machines that hold a model of this size, such as 7b"
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="float16",
        help="data type of the weights (default: float16); fp8 is for vLLM; awq and gptq with 4 bits are int4",
    )
    command.add_argument("--streams", type=_count, default=32, help="concurrent sequences (default: 32)")
    command.add_argument("--context", type=_count, default=2048, help="tokens of each sequence (default: 2048)")
    command.add_argument(
        "--measured", type=_measured, action="append", metavar="TYPE=N", help="measured tokens per second of a machine"
    )
    _vllm(command.add_argument_group("engine"))
    command.add_argument("--provider", choices=get_args(Provider), help="list one provider's machines")
    command.add_argument("--prices", type=Path, metavar="FILE", help="replaces infra_pulumi/catalogue.yaml")
    command.add_argument("--json", action="store_true", help="print JSON")


def _vllm(group: Any) -> None:
    """Flags of vLLM without defaults, so that one of them without `--engine vllm` is an error."""
    group.add_argument("--engine", choices=("native", "vllm"), default="native", help="default: native")
    group.add_argument("--tensor-parallel", type=_count, metavar="N", help="default: as few as hold the model")
    group.add_argument("--pipeline-parallel", type=_count, metavar="N", help="default: 1")
    group.add_argument("--gpu-memory-utilization", type=_positive_share, metavar="SHARE", help="default: 0.9")
    group.add_argument("--fp8-kv-cache", action="store_true", default=None, help="kv_cache_dtype: fp8")
    group.add_argument("--enforce-eager", action="store_true", default=None, help="without CUDA graphs")


def vllm_setup(args: argparse.Namespace) -> VllmSetup | None:
    """The setup of vLLM that the flags of `catalogue` give; None for the native engine. Raises ValueError."""
    given = {field.name: value for field in fields(VllmSetup) if (value := getattr(args, field.name)) is not None}
    if args.engine == "vllm":
        return VllmSetup(**given)
    if given:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --engine vllm")
    if args.dtype == "fp8":
        raise ValueError("--dtype fp8 needs --engine vllm")
    return None


def _size(text: str) -> float:
    try:
        return model_sizing.parameters(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number_up_to(maximum: int) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} must be a number above 0 and at most {maximum}")
        return value

    return number


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1 to 1000000")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number from 0 to 1, such as 0.25")
    return share


def _positive_share(text: str) -> float:
    share = _share(text)
    if share == 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return share


def _measured(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} must have the form TYPE=TOKENS_PER_S, such as g5.xlarge=900")
    return name, value


def spec_from_args(args: argparse.Namespace) -> ClusterSpec:
    """The description that a command's file and flags give. Raises SpecError."""
    document = read(args.spec) if args.spec else {}
    for key in ("provider", "name", "region", "production", "allow_refused"):
        if (value := getattr(args, key)) is not None:
            document[key] = value
    if args.zone:
        document["zones"] = args.zone
    if args.production:
        document["protect"] = True
    _merge(document, "network", {"api_cidrs": args.api_cidr})
    _merge(document, "budget", {"monthly_usd": args.budget, "emails": args.email})
    pool = {"instance_types": args.instance_type, "min": args.min, "max": args.max, "spot": args.spot}
    _change_pool(document, {**pool, "on_demand_base": args.on_demand_base})
    return parse(document, str(args.spec or "the description"))


def _merge(document: dict[str, Any], key: str, flags: dict[str, Any]) -> None:
    given = {name: value for name, value in flags.items() if value is not None}
    if given and isinstance(document.get(key, {}), dict | None):
        document[key] = {**(document.get(key) or {}), **given}


def _change_pool(document: dict[str, Any], flags: dict[str, Any]) -> None:
    """Flags change the first pool. Without a pool in the file they create one."""
    given = {name: value for name, value in flags.items() if value is not None}
    if not given:
        return
    pools = document.setdefault("gpu_pools", [{}])
    if isinstance(pools, list) and pools and isinstance(pools[0], dict):
        pools[0] = {**pools[0], **given}
