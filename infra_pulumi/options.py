"""What can be said on the command line of `python -m infra_pulumi`, and the description that it comes to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from infra_pulumi import coldstart, sizing
from infra_pulumi.spec import ClusterSpec, Provider, parse, read

_ABOUT = """\
A Kubernetes cluster with GPU nodes for the service, on AWS, GCP or Azure, from one description.

plan, cost, catalogue, policy and render need no cloud, no credentials, no network and no Pulumi CLI.

  catalogue   the machines and their prices; --fits 7b --dtype int8: which hold a model, and what its tokens cost
  plan        every resource in its order, what the policy finds, cost a month, warnings
  cost        idle, expected and maximum cost a month, with the source of each price
  policy      the findings alone, or --rules: what is looked for and why
  render      manifests, Helm values, a `ray up` file and a picture, for kubectl, helm and ray
  doctor      what is installed here, and what deploy still needs
  deploy      plan, and if nothing is wrong with it Pulumi's update
  outputs     what a deployed cluster tells of itself
  destroy     take everything down
"""

_EPILOG = """\
examples:
  python -m infra_pulumi catalogue --fits 7b --dtype int8
  python -m infra_pulumi plan --provider aws --instance-type g5.xlarge --spot --min 0 --max 4 --budget 500
  python -m infra_pulumi plan --spec cluster.yaml --json > plan.json
  python -m infra_pulumi deploy --spec cluster.yaml

exit codes: 0 all well; 1 the policy found errors, or Pulumi failed; 2 the description or the arguments cannot be used;
3 something that is needed is not installed.
"""


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="python -m infra_pulumi",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = _described(commands, "plan", "what would be made, what it costs and what is wrong with it")
    cold = plan.add_argument_group("the cold start")
    cold.add_argument("--image-gb", type=_size_in(1000), default=coldstart.IMAGE_GB, help="default: %(default)s")
    cold.add_argument(
        "--weights-gib", type=_size_in(10_000), default=coldstart.WEIGHTS_GIB, help="default: %(default)s"
    )
    _described(commands, "cost", "what it costs a month")
    checks = _described(commands, "policy", "what is wrong with it")
    checks.add_argument("--rules", action="store_true", help="list what is looked for, and why")
    files = _described(commands, "render", "its files for kubectl, helm and ray, and a picture")
    files.add_argument("--output", type=Path, default=Path("rendered"), help="folder (default: %(default)s)")
    _catalogue(commands)
    doctor = commands.add_parser("doctor", help="what is installed here")
    doctor.add_argument("--json", action="store_true")
    for name, text in (("deploy", "make it"), ("outputs", "what it tells of itself"), ("destroy", "take it down")):
        command = _described(commands, name, text)
        command.add_argument("--backend", default="", help="where Pulumi keeps its state (default: files in --state)")
        command.add_argument(
            "--state", type=Path, default=Path(".pulumi-state"), help="folder of the state (default: %(default)s)"
        )
        if name != "outputs":
            command.add_argument("--yes", action="store_true", help="do not ask")
    return whole


def _described(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command that takes a description: a file, flags, or a file and flags that change it."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    where = command.add_argument_group("the description")
    where.add_argument("--spec", type=Path, metavar="FILE", help="YAML; flags change what it says")
    where.add_argument("--provider", choices=get_args(Provider))
    where.add_argument("--name", help="of the cluster (default: serve-app)")
    where.add_argument("--region", help="default: us-west-2, us-central1, eastus")
    where.add_argument("--zone", action="append", metavar="ZONE", help="may be given several times")
    where.add_argument("--instance-type", action="append", metavar="TYPE", help="several are alternatives (AWS)")
    where.add_argument("--min", type=int, metavar="N", help="GPU nodes that are always there (default: 0)")
    where.add_argument("--max", type=int, metavar="N", help="GPU nodes at most (default: 4)")
    where.add_argument("--spot", action="store_true", default=None, help="machines that may be reclaimed, for less")
    where.add_argument("--on-demand-base", type=int, metavar="N", help="of --min, so many are not spot (default: 0)")
    where.add_argument("--api-cidr", action="append", metavar="CIDR", help="who may call the Kubernetes API")
    where.add_argument("--budget", type=float, metavar="USD", help="a month; an alarm at 50, 80 and 100 percent")
    where.add_argument("--email", action="append", metavar="ADDRESS", help="whom the alarm tells")
    where.add_argument("--production", action="store_true", default=None, help="protected, and judged more strictly")
    where.add_argument("--allow-refused", action="store_true", default=None, help="machines the catalogue refuses")
    prices = command.add_argument_group("prices")
    prices.add_argument("--prices", type=Path, metavar="FILE", help="in place of infra_pulumi/catalogue.yaml")
    prices.add_argument(
        "--busy-share", type=_share, metavar="SHARE", help="of the time all nodes are there (default: 0.25)"
    )
    command.add_argument("--json", action="store_true", help="everything as JSON, for programs")
    return command


def _catalogue(commands: Any) -> None:
    command = commands.add_parser("catalogue", help="machines and prices", description="Machines and their prices.")
    command.add_argument("--fits", type=_size, metavar="SIZE", help="only those that hold a model such as 7b")
    command.add_argument(
        "--dtype", choices=get_args(sizing.Dtype), default="float16", help="of its weights (default: float16)"
    )
    command.add_argument("--streams", type=_count, default=32, help="sequences at a time (default: 32)")
    command.add_argument("--context", type=_count, default=2048, help="tokens of each (default: 2048)")
    command.add_argument(
        "--measured", type=_measured, action="append", metavar="TYPE=N", help="tokens a second that were measured there"
    )
    command.add_argument("--provider", choices=get_args(Provider), help="only this one's")
    command.add_argument("--prices", type=Path, metavar="FILE", help="in place of infra_pulumi/catalogue.yaml")
    command.add_argument("--json", action="store_true")


def _size(text: str) -> float:
    try:
        return sizing.parameters(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size_in(most: int) -> Callable[[str], float]:
    def size(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is no number above 0, up to {most}")
        return value

    return size


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to 1000000")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; write a number from 0 to 1, such as 0.25")
    return share


def _measured(text: str) -> tuple[str, float]:
    name, _, rate = text.rpartition("=")
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} says nothing; write it like g5.xlarge=900")
    return name, value


def described(asked: argparse.Namespace) -> ClusterSpec:
    """The description that a command was given. Raises SpecError."""
    document = read(asked.spec) if asked.spec else {}
    for key in ("provider", "name", "region", "production", "allow_refused"):
        if (value := getattr(asked, key)) is not None:
            document[key] = value
    if asked.zone:
        document["zones"] = asked.zone
    if asked.production:
        document["protect"] = True
    _merge(document, "network", {"api_cidrs": asked.api_cidr})
    _merge(document, "budget", {"monthly_usd": asked.budget, "emails": asked.email})
    pool = {"instance_types": asked.instance_type, "min": asked.min, "max": asked.max, "spot": asked.spot}
    _change_pool(document, {**pool, "on_demand_base": asked.on_demand_base})
    return parse(document, str(asked.spec or "the description"))


def _merge(document: dict[str, Any], key: str, given: dict[str, Any]) -> None:
    said = {name: value for name, value in given.items() if value is not None}
    if said and isinstance(document.get(key, {}), dict | None):
        document[key] = {**(document.get(key) or {}), **said}


def _change_pool(document: dict[str, Any], given: dict[str, Any]) -> None:
    """Flags are about the first pool, which they make if there is none."""
    said = {name: value for name, value in given.items() if value is not None}
    if not said:
        return
    pools = document.setdefault("gpu_pools", [{}])
    if isinstance(pools, list) and pools and isinstance(pools[0], dict):
        pools[0] = {**pools[0], **said}
