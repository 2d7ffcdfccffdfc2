"""The cluster description, one schema for three clouds: frozen models, no unknown keys, all numbers bounded."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from infra_pulumi import provider_names

Provider: TypeAlias = Literal["aws", "gcp", "azure"]
Effect: TypeAlias = Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]

SYSTEM_TYPES: dict[str, str] = {"aws": "m7i.2xlarge", "gcp": "n2-standard-8", "azure": "Standard_D8s_v5"}
POOL_LABEL = "serve-app/pool"  # a node's pool name; worker groups select nodes by it


@dataclass(frozen=True, slots=True)
class Fault:
    """`path` is a key of the description (`gpu_pools.0.max`); `message` states the fault and a remedy."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or '(top)'}: {self.message}"


class SpecError(Exception):
    """The description is invalid. `faults` has all faults, and the message lists them."""

    def __init__(self, faults: list[Fault], source: str = "") -> None:
        self.faults = faults
        self.source = source
        super().__init__("\n".join([f"{source or 'the description'} is invalid:", *(f"  {each}" for each in faults)]))


class _Faults(ValueError):
    """Several faults of one validator, with paths relative to the validated field."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(map(str, faults)))


def _raise_faults(faults: list[Fault]) -> None:
    if faults:
        raise _Faults(faults)


def _network(text: str) -> str:
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"{error}; write an IPv4 range such as 10.40.0.0/16") from None
    return str(network)


def _private(text: str) -> str:
    ranges = map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
    if not any(ipaddress.IPv4Network(text).subnet_of(each) for each in ranges):
        raise ValueError(f"{text} is not a private range; take one inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")
    return text


def _api_cidr(text: str) -> str:
    if ipaddress.IPv4Network(text).prefixlen < 8:
        raise ValueError(
            f"{text} allows most of the internet to call the Kubernetes API; list the administrators' addresses"
        )
    return text


def _mail(text: str) -> str:
    if not re.fullmatch(r"[^@\s,<>]+@[^@\s,<>]+\.[^@\s,<>]+", text):
        raise ValueError(f"{text!r} is not an e-mail address; write it like team@host.org, and several as a list")
    return text


def _label_key(text: str) -> str:
    prefix, slash, name = text.rpartition("/")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name) or (
        slash and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", prefix)
    ):
        raise ValueError(f"{text!r} is not a label key of Kubernetes; write it like team or example.org/team")
    return text


def _label_value(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", text):
        raise ValueError(f"{text!r} is not a label value of Kubernetes; use up to 63 letters, digits, - _ and .")
    return text


def _pinned(text: str) -> str:
    name, _, tag = text.rpartition("/")[2].partition(":")
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}", text) or ("@" not in name and tag in ("", "latest")):
        raise ValueError(
            f"{text!r} does not identify one image; state a tag other than latest, or a digest: serve-app:0.1.0-cuda"
        )
    return text


PrivateNetwork: TypeAlias = Annotated[str, AfterValidator(_network), AfterValidator(_private)]
ApiCidr: TypeAlias = Annotated[str, AfterValidator(_network), AfterValidator(_api_cidr)]
Mail: TypeAlias = Annotated[str, Field(max_length=254), AfterValidator(_mail)]  # RFC 5321's limit
LabelKey: TypeAlias = Annotated[str, AfterValidator(_label_key)]
LabelValue: TypeAlias = Annotated[str, AfterValidator(_label_value)]
# The characters that AWS, GCP and Azure all accept; GCP accepts the fewest.
TagKey: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
TagValue: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _at_least_min(max: int, info: ValidationInfo) -> int:
    if "min" in info.data and max < info.data["min"]:
        raise ValueError(f"{max} is below min {info.data['min']}; raise max or lower min")
    return max


RESERVED_TAGS = ("app", "cluster", "managed-by")
_PREFIX_LENGTHS = {"cidr": (16, 20), "pods_cidr": (10, 18), "services_cidr": (16, 24)}


class Network(Section):
    """Address ranges. Nodes have private addresses only; outbound traffic uses NAT.

    `nat: one` is cheaper, but fails with its zone; `per-zone` has a NAT gateway in each zone on AWS. GCP's NAT is
    always regional. Azure has one NAT gateway: in the first zone, or with `per-zone` without a fixed zone. `api_cidrs`
    are the addresses outside the network that may call the Kubernetes API; without them the API is private. `pods_cidr`
    is for GCP and Azure: on AWS pods have addresses of `cidr`.
    """

    cidr: PrivateNetwork = "10.40.0.0/16"
    pods_cidr: PrivateNetwork = Field("100.64.0.0/14", validate_default=True)
    services_cidr: PrivateNetwork = Field("172.20.0.0/20", validate_default=True)
    nat: Literal["one", "per-zone"] = "one"
    api_cidrs: tuple[ApiCidr, ...] = Field((), max_length=40)

    @field_validator("cidr", "pods_cidr", "services_cidr")
    @classmethod
    def _valid_size_without_overlap(cls, text: str, info: ValidationInfo) -> str:
        network, (widest, narrowest) = ipaddress.IPv4Network(text), _PREFIX_LENGTHS[str(info.field_name)]
        if not widest <= network.prefixlen <= narrowest:
            raise ValueError(f"{text} is a /{network.prefixlen}; take a range from /{widest} to /{narrowest}")
        for other in set(_PREFIX_LENGTHS) & set(info.data):
            if network.overlaps(ipaddress.IPv4Network(info.data[other])):
                raise ValueError(f"{text} overlaps {other} {info.data[other]}; take another range")
        return text


class Taint(Section):
    """A taint of a pool's nodes."""

    key: LabelKey
    value: LabelValue = ""
    effect: Effect = "NoSchedule"


class SystemPool(Section):
    """CPU nodes for Ray's head, the addons and other pods that must not be interrupted; always on demand."""

    instance_type: str | None = Field(None, max_length=63, description="Default: 8 vCPU and 32 GiB.")
    min: int = Field(2, ge=1, le=20)
    max: int = Field(4, ge=1, le=50, validate_default=True)
    disk_gib: int = Field(100, ge=30, le=2048)

    _min_max = field_validator("max")(_at_least_min)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """One node group of a cloud. A pool has one, or two if a part of a spot pool is on demand."""

    name: str
    pool: GpuPool
    spot: bool
    min: int
    max: int


class GpuPool(Section):
    """GPU nodes that the autoscaler adds for pending pods and removes when they are idle.

    `min` and `max` count nodes. With `spot`, `on_demand_base` nodes are on demand and always run; they form a separate
    node group with the same label. Several `instance_types` are alternatives with the same GPU (AWS only). `zones` is a
    subset of the cluster's zones; the default is all. `labels` and `taints` are added to those of every GPU pool: the
    label `serve-app/pool` and the taint `nvidia.com/gpu`.
    """

    name: str = Field(
        "gpu",
        pattern=r"^[a-z][a-z0-9]{0,8}$",
        description="At most 9 characters: Azure allows 12, and a node group's name adds 2.",
    )
    instance_types: tuple[Annotated[str, Field(min_length=1, max_length=63)], ...] = Field(min_length=1, max_length=10)
    min: int = Field(0, ge=0, le=100)
    max: int = Field(4, ge=1, le=100, validate_default=True)
    spot: bool = False
    on_demand_base: int = Field(0, ge=0, le=100)
    disk_gib: int = Field(200, ge=100, le=4096)
    zones: tuple[str, ...] = Field((), max_length=6)
    labels: dict[LabelKey, LabelValue] = Field({}, max_length=20)
    taints: tuple[Taint, ...] = Field((), max_length=10)

    _min_max = field_validator("max")(_at_least_min)

    @field_validator("instance_types")
    @classmethod
    def _unique_types(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if duplicates := _duplicates(list(types)):
            raise ValueError(f"{', '.join(duplicates)} is listed twice; list each type once")
        return types

    @field_validator("on_demand_base")
    @classmethod
    def _below_min_and_max(cls, base: int, info: ValidationInfo) -> int:
        known = info.data
        if base and known.get("spot") is False:
            raise ValueError("without spot every node is on demand; set spot: true, or remove on_demand_base")
        if base > known.get("min", base):
            raise ValueError(f"{base} on-demand nodes exceed min {known['min']}; raise min to {base}")
        if base and base >= known.get("max", base + 1):
            raise ValueError(f"{base} on-demand nodes of max {known['max']} leave none for spot; lower on_demand_base")
        return base

    @field_validator("labels")
    @classmethod
    def _no_reserved_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        reserved = sorted(
            key for key in labels if key == POOL_LABEL or re.search(r"(^|[./])(kubernetes|k8s)\.io/", key)
        )
        if reserved:
            raise ValueError(f"{', '.join(reserved)} is reserved for the cluster; choose another key")
        return labels

    @field_validator("taints")
    @classmethod
    def _no_gpu_taint(cls, taints: tuple[Taint, ...]) -> tuple[Taint, ...]:
        if any(taint.key == "nvidia.com/gpu" for taint in taints):
            raise ValueError(
                "every GPU pool already has the taint nvidia.com/gpu, and a duplicate is an error; remove it"
            )
        return taints

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """One node group, or two with `on_demand_base`: first the on-demand group, which always runs."""
        if not self.on_demand_base:
            return (NodeGroup(self.name, self, self.spot, self.min, self.max),)
        base = self.on_demand_base
        return (
            NodeGroup(f"{self.name}od", self, False, base, base),
            NodeGroup(f"{self.name}sp", self, True, self.min - base, self.max - base),
        )


class Serve(Section):
    """The service. An image without a registry is in the registry that is created with the cluster.

    `config` is the path of a Ray Serve config file. Workers on which a model with vLLM can run have `vllm_image`, all
    other pods have `image`.
    """

    image: Annotated[str, AfterValidator(_pinned)] = "serve-app:0.1.0-cuda"
    vllm_image: Annotated[str, AfterValidator(_pinned)] = "serve-app:0.1.0-cuda-vllm"
    config: Path = Path("serve_config.yaml")


class Addons(Section):
    """What runs in the cluster besides the service. `device_plugin` is for AWS and Azure; GKE includes one.

    With `by_pulumi` the deployment creates the addons and the service; otherwise kubectl and helm install them.
    """

    kuberay: bool = True
    device_plugin: bool = True
    dcgm_exporter: bool = True
    prometheus: bool = True
    cluster_autoscaler: bool = Field(True, description="For AWS; GKE and AKS include one.")
    network_policy: bool = True
    disruption_budget: bool = True
    image_prepull: bool = Field(True, description="A pod on each GPU node, which pulls the workers' image early.")
    by_pulumi: bool = Field(False, description="Needs pulumi-kubernetes (requirements-infra.lock).")


class Budget(Section):
    """Alerts at each of `thresholds` (percent of `monthly_usd`), and one when the forecast exceeds `monthly_usd`.

    A budget sends alerts and stops nothing. Azure accepts at most five alerts.
    """

    monthly_usd: float = Field(gt=0, le=10_000_000)
    emails: tuple[Mail, ...] = Field((), max_length=10)
    thresholds: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((50, 80, 100), min_length=1, max_length=4)

    @field_validator("thresholds")
    @classmethod
    def _increasing(cls, thresholds: tuple[int, ...]) -> tuple[int, ...]:
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"{list(thresholds)} are not increasing; write them like [50, 80, 100]")
        return thresholds


class ClusterSpec(Section):
    """One cluster. `tags` are added to all resources with tags, besides `app`, `cluster` and `managed-by`.

    `administrators` have all rights in the cluster: ARNs of users or roles on AWS; `user:`, `group:` or
    `serviceAccount:` with an address on GCP (Google's roles apply to all clusters of the project); object ids on Azure.
    The user who creates the cluster is an administrator already; do not list it: AWS and Azure refuse duplicates.

    `production` enables stricter rules and needs `protect`, which prevents the deletion of the cluster and its keys.
    `allow_refused` allows machines on which the service does not run unchanged (the catalogue states the reason).
    """

    # The order matters: a field's validator sees the valid fields before it, so that one pass finds all faults.
    provider: Provider
    name: str = Field("serve-app", pattern=r"^[a-z][a-z0-9-]{1,18}[a-z0-9]$")
    region: str = Field("", max_length=32, validate_default=True)
    zones: tuple[str, ...] = Field((), max_length=6, validate_default=True)
    kubernetes_version: str = Field(provider_names.KUBERNETES_VERSION, max_length=8)
    network: Network = Network()
    system: SystemPool = Field(SystemPool(), validate_default=True)
    allow_refused: bool = False
    gpu_pools: tuple[GpuPool, ...] = Field(min_length=1, max_length=8)
    serve: Serve = Serve()
    addons: Addons = Addons()
    budget: Budget | None = None
    administrators: tuple[Annotated[str, Field(max_length=256)], ...] = Field((), max_length=20)
    tags: dict[TagKey, TagValue] = Field({}, max_length=20)
    protect: bool = False
    production: bool = Field(False, validate_default=True)

    @field_validator("region")
    @classmethod
    def _valid_region(cls, region: str, info: ValidationInfo) -> str:
        provider = info.data.get("provider")
        if provider is None:
            return region
        region = region or provider_names.DEFAULT_REGION[provider]
        if not re.fullmatch(provider_names.REGION[provider], region):
            raise ValueError(
                f"{region!r} is not a region of {provider}; write it like {provider_names.DEFAULT_REGION[provider]}"
            )
        return region

    @field_validator("zones")
    @classmethod
    def _valid_zones(cls, zones: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        provider, region = info.data.get("provider"), info.data.get("region")
        if provider is None or region is None:
            return zones
        zones = zones or provider_names.default_zones(provider, region)
        pattern, example = (
            provider_names.zone_pattern(provider, region),
            provider_names.default_zones(provider, region)[0],
        )
        faults = [
            Fault(
                str(index),
                f"{zone!r} is not a zone of {region}; write it like {example}",
            )
            for index, zone in enumerate(zones)
            if not re.fullmatch(pattern, zone)
        ]
        if len(set(zones)) < len(zones):
            faults.append(Fault("", "a zone is listed twice; list each once"))
        if provider == "aws" and len(zones) < 2:
            faults.append(Fault("", "EKS needs subnets in at least two zones; list two"))
        _raise_faults(faults)
        return zones

    @field_validator("kubernetes_version")
    @classmethod
    def _supported(cls, version: str) -> str:
        if not re.fullmatch(r"1\.\d\d", version):
            raise ValueError(
                f"{version!r} is not a minor version; write it like '{provider_names.KUBERNETES_VERSION}', in quotes"
            )
        if version < provider_names.OLDEST_KUBERNETES:
            newest, oldest = provider_names.KUBERNETES_VERSION, provider_names.OLDEST_KUBERNETES
            raise ValueError(f"{version} is too old; take {newest} (minimum {oldest})")
        return version

    @field_validator("network")
    @classmethod
    def _valid_network(cls, network: Network, info: ValidationInfo) -> Network:
        if info.data.get("provider") == "aws" and network.services_cidr.startswith("100."):
            message = f"EKS does not accept {network.services_cidr} for services; take a range inside 172.16.0.0/12"
            _raise_faults([Fault("services_cidr", message)])
        return network

    @field_validator("system")
    @classmethod
    def _system_type(cls, system: SystemPool, info: ValidationInfo) -> SystemPool:
        provider = info.data.get("provider")
        if provider is None:
            return system
        system = system.model_copy(update={"instance_type": system.instance_type or SYSTEM_TYPES[provider]})
        _raise_faults(
            [Fault("instance_type", text) for text in provider_names.type_faults(provider, str(system.instance_type))]
        )
        return system

    @field_validator("gpu_pools")
    @classmethod
    def _valid_pools(cls, pools: tuple[GpuPool, ...], info: ValidationInfo) -> tuple[GpuPool, ...]:
        names = [group.name for pool in pools for group in pool.node_groups()]
        faults = [
            Fault("", f"two node groups would have the name {name}; rename a pool") for name in _duplicates(names)
        ]
        if "system" in names:
            faults.append(Fault("", "the name system is reserved for the CPU pool; rename this pool"))
        for index, pool in enumerate(pools):
            faults += [Fault(f"{index}.{each.path}", each.message) for each in _pool_faults(pool, info.data)]
        _raise_faults(faults)
        return pools

    @field_validator("budget")
    @classmethod
    def _valid_emails(cls, budget: Budget | None, info: ValidationInfo) -> Budget | None:
        if budget and info.data.get("provider") == "gcp" and len(budget.emails) > 5:
            _raise_faults(
                [Fault("emails", f"Google notifies at most 5 addresses, not {len(budget.emails)}; use a mailing list")]
            )
        return budget

    @field_validator("administrators")
    @classmethod
    def _valid_principals(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        provider = info.data.get("provider")
        if provider is not None:
            pattern, example = provider_names.PRINCIPAL[provider]
            invalid = [(index, name) for index, name in enumerate(names) if not re.fullmatch(pattern, name)]
            _raise_faults(
                [
                    Fault(str(n), f"{name!r} is not a principal of {provider}; write it like {example}")
                    for n, name in invalid
                ]
            )
        if duplicates := _duplicates(list(names)):
            raise ValueError(f"{', '.join(duplicates)} is listed twice; list each once")
        return names

    @field_validator("tags")
    @classmethod
    def _no_reserved_tags(cls, tags: dict[str, str]) -> dict[str, str]:
        if reserved := sorted(set(tags) & set(RESERVED_TAGS)):
            raise ValueError(
                f"{', '.join(reserved)} is reserved: every resource has it, and budgets filter by it; choose another"
            )
        return tags

    @field_validator("production")
    @classmethod
    def _needs_protect(cls, production: bool, info: ValidationInfo) -> bool:
        if production and info.data.get("protect") is False:
            raise ValueError(
                "production needs protect, so that one wrong command cannot delete the cluster; set protect: true"
            )
        return production

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """The node groups of all GPU pools, in order."""
        return tuple(group for pool in self.gpu_pools for group in pool.node_groups())

    def all_tags(self) -> dict[str, str]:
        """The tags of every resource that can have tags."""
        return {**dict(zip(RESERVED_TAGS, ("serve-app", self.name, "pulumi"), strict=True)), **self.tags}


def _duplicates(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _pool_faults(pool: GpuPool, known: dict[str, Any]) -> Iterator[Fault]:
    provider, zones = known.get("provider"), known.get("zones")
    if provider is None:
        return
    yield from _type_faults(provider, pool.instance_types)
    if provider != "aws" and len(pool.instance_types) > 1:
        yield Fault("instance_types", f"a node pool of {provider} has one type; define a pool for each type")
    if zones is not None and (foreign := sorted(set(pool.zones) - set(zones))):
        yield Fault("zones", f"{', '.join(foreign)} are not zones of the cluster, which has {', '.join(zones)}")


def _type_faults(provider: str, types: Iterable[Any]) -> Iterator[Fault]:
    for index, name in enumerate(types):
        if isinstance(name, str):
            yield from (Fault(f"instance_types.{index}", text) for text in provider_names.type_faults(provider, name))


_NO_MAPPING = "not a mapping; a description begins like `provider: aws`"


def parse(document: Any, source: str = "") -> ClusterSpec:
    """Validate plain data. `source` names the data in error messages. Raises SpecError with all faults."""
    if not isinstance(document, dict):
        raise SpecError([Fault("", _NO_MAPPING)], source)
    try:
        return ClusterSpec.model_validate(document)
    except ValidationError as error:
        faults = list(_faults(error))
        raise SpecError(faults + list(_skipped_type_faults(document, faults)), source) from None


def _skipped_type_faults(document: dict[Any, Any], faults: list[Fault]) -> Iterator[Fault]:
    """Faults of machine names in pools whose other faults prevented that check."""
    provider, pools = document.get("provider"), document.get("gpu_pools")
    if provider not in get_args(Provider) or not isinstance(pools, list) or not all(isinstance(p, dict) for p in pools):
        return
    reported = {fault.path for fault in faults}
    for index, pool in enumerate(pools):
        types = pool.get("instance_types")
        for fault in _type_faults(str(provider), types if isinstance(types, list | tuple) else ()):
            if (path := f"gpu_pools.{index}.{fault.path}") not in reported:
                yield Fault(path, fault.message)


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file without validating its keys. Raises SpecError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError([Fault("", "no such file; pass the path of a description")], str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise SpecError([Fault("", " ".join(str(error).split()))], str(path)) from None
    if not isinstance(document, dict):
        raise SpecError([Fault("", _NO_MAPPING)], str(path))
    return document


def load(path: Path) -> ClusterSpec:
    """Read and validate a YAML file. Raises SpecError."""
    return parse(read(path), str(path))


def _faults(error: ValidationError) -> Iterator[Fault]:
    paths = [".".join(map(str, fault["loc"])) for fault in error.errors()]
    for place, fault in zip(paths, error.errors(), strict=True):
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, _Faults):
            yield from (Fault(".".join(filter(None, (place, each.path))), each.message) for each in cause.faults)
        # Pydantic also reports a list with an invalid member as too short.
        elif fault["type"] != "too_short" or not any(other.startswith(f"{place}.") for other in paths):
            yield Fault(place, _sentence(fault))


def _sentence(fault: Any) -> str:
    match fault["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            return f"unknown key; known keys: {', '.join(_keys(fault['loc'][:-1]))}"
        case "string_type":  # YAML reads 1.30 without quotes as the number 1.3
            return f"{fault['input']!r} is not a string; put it in quotes"
        case "string_pattern_mismatch":
            return f"{fault['input']!r} does not match {fault['ctx']['pattern']}"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ")


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a location."""
    section: type[BaseModel] = ClusterSpec
    for name in location:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        inner = (annotation, *get_args(annotation))
        section = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)
