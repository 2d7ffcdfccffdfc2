"""The one description of a cluster, the same for the three clouds. Frozen, no unknown keys, every number bounded."""

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

from infra_pulumi import places

Provider: TypeAlias = Literal["aws", "gcp", "azure"]
Effect: TypeAlias = Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]

SYSTEM_TYPES: dict[str, str] = {"aws": "m7i.2xlarge", "gcp": "n2-standard-8", "azure": "Standard_D8s_v5"}
POOL_LABEL = "serve-app/pool"  # on every node of a GPU pool, with the pool's name; what a worker group selects by


@dataclass(frozen=True, slots=True)
class Fault:
    """`path` is the place in the description (`gpu_pools.0.max`); `message` says what is wrong and what would work."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or '(top)'}: {self.message}"


class SpecError(Exception):
    """The description cannot be used; `faults` has every fault, the text lists them."""

    def __init__(self, faults: list[Fault], source: str = "") -> None:
        self.faults = faults
        self.source = source
        super().__init__(
            "\n".join([f"{source or 'the description'} cannot be used:", *(f"  {each}" for each in faults)])
        )


class _Faults(ValueError):
    """Several faults from one validator, with places below its own."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(map(str, faults)))


def _refuse(faults: list[Fault]) -> None:
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
        raise ValueError(f"{text} is not private; take a range inside 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16")
    return text


def _callers(text: str) -> str:
    if ipaddress.IPv4Network(text).prefixlen < 8:
        raise ValueError(f"{text} opens the Kubernetes API to the world; name the addresses of those who administer it")
    return text


def _mail(text: str) -> str:
    if not re.fullmatch(r"[^@\s,<>]+@[^@\s,<>]+\.[^@\s,<>]+", text):
        raise ValueError(f"{text!r} is no mail address; write it like team@host.org, and several as a list")
    return text


def _label_key(text: str) -> str:
    prefix, slash, name = text.rpartition("/")
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name) or (
        slash and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", prefix)
    ):
        raise ValueError(f"{text!r} is no key of a Kubernetes label; write it like team or example.org/team")
    return text


def _label_value(text: str) -> str:
    if not re.fullmatch(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?", text):
        raise ValueError(f"{text!r} is no value of a Kubernetes label; letters, digits, - _ . make one of up to 63")
    return text


def _pinned(text: str) -> str:
    name, _, tag = text.rpartition("/")[2].partition(":")
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}", text) or ("@" not in name and tag in ("", "latest")):
        raise ValueError(
            f"{text!r} may be another image tomorrow; name its tag or digest, such as serve-app:0.1.0-cuda"
        )
    return text


PrivateNetwork: TypeAlias = Annotated[str, AfterValidator(_network), AfterValidator(_private)]
Callers: TypeAlias = Annotated[str, AfterValidator(_network), AfterValidator(_callers)]
Mail: TypeAlias = Annotated[str, Field(max_length=254), AfterValidator(_mail)]  # RFC 5321's limit
LabelKey: TypeAlias = Annotated[str, AfterValidator(_label_key)]
LabelValue: TypeAlias = Annotated[str, AfterValidator(_label_value)]
# What AWS, GCP and Azure all take, of which GCP takes least.
TagKey: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
TagValue: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _ordered(max: int, info: ValidationInfo) -> int:
    if "min" in info.data and max < info.data["min"]:
        raise ValueError(f"{max} is below min {info.data['min']}; raise it, or lower min")
    return max


HOUSE_TAGS = ("app", "cluster", "managed-by")
_WIDTHS = {"cidr": (16, 20), "pods_cidr": (10, 18), "services_cidr": (16, 24)}


class Network(Section):
    """Addresses. Nodes have private ones only and reach out through NAT.

    `nat: one` is cheap and falls with its zone; `per-zone` does not. GCP's NAT is regional,
    and Azure's is one for the one subnet, in the first zone or (`per-zone`) where Azure puts it.
    `api_cidrs` are those who may call the Kubernetes API from outside; without any it is private. `pods_cidr` is for
    GCP and Azure: on AWS pods have addresses of `cidr`.
    """

    cidr: PrivateNetwork = "10.40.0.0/16"
    pods_cidr: PrivateNetwork = Field("100.64.0.0/14", validate_default=True)
    services_cidr: PrivateNetwork = Field("172.20.0.0/20", validate_default=True)
    nat: Literal["one", "per-zone"] = "one"
    api_cidrs: tuple[Callers, ...] = Field((), max_length=40)

    @field_validator("cidr", "pods_cidr", "services_cidr")
    @classmethod
    def _wide_enough_and_apart(cls, text: str, info: ValidationInfo) -> str:
        network, (least, most) = ipaddress.IPv4Network(text), _WIDTHS[str(info.field_name)]
        if not least <= network.prefixlen <= most:
            raise ValueError(f"{text} is a /{network.prefixlen}; take one from /{least} to /{most}")
        for other in set(_WIDTHS) & set(info.data):
            if network.overlaps(ipaddress.IPv4Network(info.data[other])):
                raise ValueError(f"{text} overlaps {other} {info.data[other]}; take another range")
        return text


class Taint(Section):
    key: LabelKey
    value: LabelValue = ""
    effect: Effect = "NoSchedule"


class SystemPool(Section):
    """CPU nodes for Ray's head, the addons and everything that must not be reclaimed: always on demand."""

    instance_type: str | None = Field(None, max_length=63, description="By default one of 8 vCPU and 32 GiB.")
    min: int = Field(2, ge=1, le=20)
    max: int = Field(4, ge=1, le=50, validate_default=True)
    disk_gib: int = Field(100, ge=30, le=2048)

    _min_max = field_validator("max")(_ordered)


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """What one node group of a cloud is: a pool is one, or two where a part of it is on demand."""

    name: str
    pool: GpuPool
    spot: bool
    min: int
    max: int


class GpuPool(Section):
    """GPU nodes that the cluster adds when pods ask for them, and removes when they do not.

    `min` and `max` count nodes. With `spot`, `on_demand_base` of them are on demand and always there: they go into a
    node group of their own, with the same label. Several `instance_types` are alternatives of the same GPU (AWS only).
    `zones` are some of the cluster's, all by default. `labels` and `taints` are added to the ones that every GPU pool
    has: the label `serve-app/pool`, and the taint `nvidia.com/gpu`.
    """

    name: str = Field("gpu", pattern=r"^[a-z][a-z0-9]{0,8}$", description="With two letters more it is Azure's 12.")
    instance_types: tuple[Annotated[str, Field(min_length=1, max_length=63)], ...] = Field(min_length=1, max_length=10)
    min: int = Field(0, ge=0, le=100)
    max: int = Field(4, ge=1, le=100, validate_default=True)
    spot: bool = False
    on_demand_base: int = Field(0, ge=0, le=100)
    disk_gib: int = Field(200, ge=100, le=4096)
    zones: tuple[str, ...] = Field((), max_length=6)
    labels: dict[LabelKey, LabelValue] = Field({}, max_length=20)
    taints: tuple[Taint, ...] = Field((), max_length=10)

    _min_max = field_validator("max")(_ordered)

    @field_validator("instance_types")
    @classmethod
    def _each_once(cls, types: tuple[str, ...]) -> tuple[str, ...]:
        if twice := _twice(list(types)):
            raise ValueError(f"{', '.join(twice)} is there twice; name each type once")
        return types

    @field_validator("on_demand_base")
    @classmethod
    def _leaves_some_for_spot(cls, base: int, info: ValidationInfo) -> int:
        known = info.data
        if base and known.get("spot") is False:
            raise ValueError("without spot every node is on demand; set spot: true, or leave it out")
        if base > known.get("min", base):
            raise ValueError(f"{base} always run, which is above min {known['min']}; raise min to it")
        if base and base >= known.get("max", base + 1):
            raise ValueError(f"{base} of at most {known['max']} leave none for spot; lower it")
        return base

    @field_validator("labels")
    @classmethod
    def _none_of_the_clusters(cls, labels: dict[str, str]) -> dict[str, str]:
        ours = sorted(key for key in labels if key == POOL_LABEL or re.search(r"(^|[./])(kubernetes|k8s)\.io/", key))
        if ours:
            raise ValueError(f"{', '.join(ours)} is the cluster's to set; choose another key")
        return labels

    @field_validator("taints")
    @classmethod
    def _no_second_one(cls, taints: tuple[Taint, ...]) -> tuple[Taint, ...]:
        if any(taint.key == "nvidia.com/gpu" for taint in taints):
            raise ValueError("nvidia.com/gpu is on every GPU pool already, and twice is an error; leave it out")
        return taints

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """One, or two with `on_demand_base`: first the part on demand, which is always there."""
        if not self.on_demand_base:
            return (NodeGroup(self.name, self, self.spot, self.min, self.max),)
        base = self.on_demand_base
        return (
            NodeGroup(f"{self.name}od", self, False, base, base),
            NodeGroup(f"{self.name}sp", self, True, self.min - base, self.max - base),
        )


class Serve(Section):
    """The service. An `image` without a registry is one in the registry that is made with the cluster.

    `config` is a Ray Serve config file.
    """

    image: Annotated[str, AfterValidator(_pinned)] = "serve-app:0.1.0-cuda"
    config: Path = Path("serve_config.yaml")


class Addons(Section):
    """What runs in the cluster besides the service. `device_plugin` is for AWS and Azure; GKE brings its own.

    With `by_pulumi` a deployment makes all of them and the service too, which otherwise are for kubectl and helm.
    """

    kuberay: bool = True
    device_plugin: bool = True
    dcgm_exporter: bool = True
    prometheus: bool = True
    cluster_autoscaler: bool = Field(True, description="For AWS; GKE and AKS bring their own.")
    network_policy: bool = True
    disruption_budget: bool = True
    by_pulumi: bool = Field(False, description="Needs pulumi-kubernetes, which is in requirements-infra.lock.")


class Budget(Section):
    """An alarm at each of `thresholds` (percent of `monthly_usd`), and one when a forecast says it will be all of it.

    It tells; it stops nothing. Azure takes five alarms at most.
    """

    monthly_usd: float = Field(gt=0, le=10_000_000)
    emails: tuple[Mail, ...] = Field((), max_length=10)
    thresholds: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field((50, 80, 100), min_length=1, max_length=4)

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, thresholds: tuple[int, ...]) -> tuple[int, ...]:
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"{list(thresholds)} do not rise; write them like [50, 80, 100]")
        return thresholds


class ClusterSpec(Section):
    """One cluster. `tags` are on everything that can have some, besides `app`, `cluster` and `managed-by`.

    `administrators` may do everything in the cluster, besides whoever makes it, who is not to be among them (AWS and
    Azure take nobody twice): users or roles by their ARN on AWS, `user:`, `group:` or `serviceAccount:` and an address
    on GCP (for all clusters of the project, as Google's roles are), object ids on Azure.

    `production` asks for more of the policy; it needs `protect`, with which neither the cluster nor its keys can be
    deleted. `allow_refused` takes machines on which the service does not run as it is (the catalogue says why).
    """

    # The order matters: a field is judged with the valid ones before it, so that all faults are found at once.
    provider: Provider
    name: str = Field("serve-app", pattern=r"^[a-z][a-z0-9-]{1,18}[a-z0-9]$")
    region: str = Field("", max_length=32, validate_default=True)
    zones: tuple[str, ...] = Field((), max_length=6, validate_default=True)
    kubernetes_version: str = Field(places.KUBERNETES_VERSION, max_length=8)
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
    def _region_of_the_provider(cls, region: str, info: ValidationInfo) -> str:
        provider = info.data.get("provider")
        if provider is None:
            return region
        region = region or places.DEFAULT_REGION[provider]
        if not re.fullmatch(places.REGION[provider], region):
            raise ValueError(f"{region!r} is no region of {provider}; write it like {places.DEFAULT_REGION[provider]}")
        return region

    @field_validator("zones")
    @classmethod
    def _zones_of_the_region(cls, zones: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        provider, region = info.data.get("provider"), info.data.get("region")
        if provider is None or region is None:
            return zones
        zones = zones or places.default_zones(provider, region)
        pattern = places.zone_pattern(provider, region)
        faults = [
            Fault(
                str(index),
                f"{zone!r} is no zone of {region}; write it like {places.default_zones(provider, region)[0]}",
            )
            for index, zone in enumerate(zones)
            if not re.fullmatch(pattern, zone)
        ]
        if len(set(zones)) < len(zones):
            faults.append(Fault("", "the same zone is there twice; name each once"))
        if provider == "aws" and len(zones) < 2:
            faults.append(Fault("", "EKS needs subnets in at least two zones; name two"))
        _refuse(faults)
        return zones

    @field_validator("kubernetes_version")
    @classmethod
    def _supported(cls, version: str) -> str:
        if not re.fullmatch(r"1\.\d\d", version):
            raise ValueError(f"{version!r} is no minor version; write it like '{places.KUBERNETES_VERSION}', in quotes")
        if version < places.OLDEST_KUBERNETES:
            raise ValueError(
                f"{version} is too old; take {places.KUBERNETES_VERSION}, and at least {places.OLDEST_KUBERNETES}"
            )
        return version

    @field_validator("network")
    @classmethod
    def _addresses_of_the_provider(cls, network: Network, info: ValidationInfo) -> Network:
        if info.data.get("provider") == "aws" and network.services_cidr.startswith("100."):
            message = f"EKS does not take {network.services_cidr} for services; take a range inside 172.16.0.0/12"
            _refuse([Fault("services_cidr", message)])
        return network

    @field_validator("system")
    @classmethod
    def _system_type(cls, system: SystemPool, info: ValidationInfo) -> SystemPool:
        provider = info.data.get("provider")
        if provider is None:
            return system
        system = system.model_copy(update={"instance_type": system.instance_type or SYSTEM_TYPES[provider]})
        _refuse([Fault("instance_type", text) for text in places.misnamed(provider, str(system.instance_type))])
        return system

    @field_validator("gpu_pools")
    @classmethod
    def _pools_of_the_provider(cls, pools: tuple[GpuPool, ...], info: ValidationInfo) -> tuple[GpuPool, ...]:
        names = [group.name for pool in pools for group in pool.node_groups()]
        faults = [
            Fault("", f"two node groups would be called {name}; name the pools otherwise") for name in _twice(names)
        ]
        if "system" in names:
            faults.append(Fault("", "system is the name of the pool without GPUs; name this one otherwise"))
        for index, pool in enumerate(pools):
            faults += [Fault(f"{index}.{each.path}", each.message) for each in _pool_faults(pool, info.data)]
        _refuse(faults)
        return pools

    @field_validator("budget")
    @classmethod
    def _as_many_as_are_told(cls, budget: Budget | None, info: ValidationInfo) -> Budget | None:
        if budget and info.data.get("provider") == "gcp" and len(budget.emails) > 5:
            _refuse([Fault("emails", f"Google tells five at most, and these are {len(budget.emails)}; take a list's")])
        return budget

    @field_validator("administrators")
    @classmethod
    def _known_to_the_provider(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        provider = info.data.get("provider")
        if provider is not None:
            pattern, example = places.PRINCIPAL[provider]
            strange = [(index, name) for index, name in enumerate(names) if not re.fullmatch(pattern, name)]
            _refuse([Fault(str(n), f"{name!r} is nobody to {provider}; it takes {example}") for n, name in strange])
        if twice := _twice(list(names)):
            raise ValueError(f"{', '.join(twice)} is there twice; name each once")
        return names

    @field_validator("tags")
    @classmethod
    def _none_of_the_house(cls, tags: dict[str, str]) -> dict[str, str]:
        if ours := sorted(set(tags) & set(HOUSE_TAGS)):
            raise ValueError(f"{', '.join(ours)} is set on everything already, and budgets look for it; choose another")
        return tags

    @field_validator("production")
    @classmethod
    def _protected(cls, production: bool, info: ValidationInfo) -> bool:
        if production and info.data.get("protect") is False:
            raise ValueError("production without protect can be deleted by one wrong command; set protect: true")
        return production

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """Of all GPU pools, in their order."""
        return tuple(group for pool in self.gpu_pools for group in pool.node_groups())

    def all_tags(self) -> dict[str, str]:
        """What every resource that can have tags has."""
        return {**dict(zip(HOUSE_TAGS, ("serve-app", self.name, "pulumi"), strict=True)), **self.tags}


def _twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _pool_faults(pool: GpuPool, known: dict[str, Any]) -> Iterator[Fault]:
    provider, zones = known.get("provider"), known.get("zones")
    if provider is None:
        return
    yield from _type_faults(provider, pool.instance_types)
    if provider != "aws" and len(pool.instance_types) > 1:
        yield Fault("instance_types", f"a node pool of {provider} has one type; make a pool of each")
    if zones is not None and (strange := sorted(set(pool.zones) - set(zones))):
        yield Fault("zones", f"{', '.join(strange)} are none of the cluster's; they are {', '.join(zones)}")


def _type_faults(provider: str, types: Iterable[Any]) -> Iterator[Fault]:
    for index, name in enumerate(types):
        if isinstance(name, str):
            yield from (Fault(f"instance_types.{index}", text) for text in places.misnamed(provider, name))


_NO_MAPPING = "not a mapping of keys; it begins like `provider: aws`"


def parse(document: Any, source: str = "") -> ClusterSpec:
    """A description from plain data. `source` names it in errors. Raises SpecError with every fault."""
    if not isinstance(document, dict):
        raise SpecError([Fault("", _NO_MAPPING)], source)
    try:
        return ClusterSpec.model_validate(document)
    except ValidationError as error:
        faults = list(_faults(error))
        raise SpecError(faults + list(_unseen(document, faults)), source) from None


def _unseen(document: dict[Any, Any], faults: list[Fault]) -> Iterator[Fault]:
    """Names of machines, which nothing looked at where a pool has other faults."""
    provider, pools = document.get("provider"), document.get("gpu_pools")
    if provider not in get_args(Provider) or not isinstance(pools, list) or not all(isinstance(p, dict) for p in pools):
        return
    seen = {fault.path for fault in faults}
    for index, pool in enumerate(pools):
        types = pool.get("instance_types")
        for fault in _type_faults(str(provider), types if isinstance(types, list | tuple) else ()):
            if (path := f"gpu_pools.{index}.{fault.path}") not in seen:
                yield Fault(path, fault.message)


def read(path: Path) -> dict[str, Any]:
    """What a YAML file says, not judged yet. Raises SpecError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError([Fault("", "no such file; give the path of a description")], str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise SpecError([Fault("", " ".join(str(error).split()))], str(path)) from None
    if not isinstance(document, dict):
        raise SpecError([Fault("", _NO_MAPPING)], str(path))
    return document


def load(path: Path) -> ClusterSpec:
    """A description from a YAML file. Raises SpecError."""
    return parse(read(path), str(path))


def _faults(error: ValidationError) -> Iterator[Fault]:
    paths = [".".join(map(str, fault["loc"])) for fault in error.errors()]
    for place, fault in zip(paths, error.errors(), strict=True):
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, _Faults):
            yield from (Fault(".".join(filter(None, (place, each.path))), each.message) for each in cause.faults)
        # A list with a faulty member is also reported as too short.
        elif fault["type"] != "too_short" or not any(other.startswith(f"{place}.") for other in paths):
            yield Fault(place, _sentence(fault))


def _sentence(fault: Any) -> str:
    match fault["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            return f"no such key; there are {', '.join(_keys(fault['loc'][:-1]))}"
        case "string_type":  # 1.30 without quotes is 1.3 to YAML
            return f"{fault['input']!r} is no text; put it in quotes"
        case "string_pattern_mismatch":
            return f"{fault['input']!r} does not match {fault['ctx']['pattern']}"
        case _:
            return str(fault["msg"]).removeprefix("Value error, ")


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section there."""
    section: type[BaseModel] = ClusterSpec
    for name in location:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        inner = (annotation, *get_args(annotation))
        section = next(kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)
