"""The Pulumi program run for real, against a monitor that writes down what it is asked for and makes nothing.

Pulumi's own mock monitor keeps what a resource is given, and drops the rest of the request: parent, dependencies,
protection. This one keeps all of it, which is a whole plan, with no engine, no provider plugin and no credentials.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pulumi
from google.protobuf import empty_pb2, json_format, struct_pb2
from pulumi.runtime import (
    MockResourceArgs,
    Mocks,
    mocks as pulumi_mocks,
    rpc,
    settings as pulumi_settings,
    stack as pulumi_stack,
)
from pulumi.runtime.proto import resource_pb2

PROJECT = "serve-app"
_STACK = "pulumi:pulumi:Stack"


@dataclass(frozen=True, slots=True)
class Resource:
    """What the engine would be asked to make. `inputs` are plain data with the provider's own names (camelCase).

    What only the cloud can know is written `${name.property}`. `parent` and `dependencies` are names of others.
    """

    name: str
    type: str
    parent: str | None
    inputs: dict[str, Any]
    dependencies: tuple[str, ...] = ()
    protect: bool = False
    ignore_changes: tuple[str, ...] = ()
    delete_before_replace: bool = False
    retain_on_delete: bool = False
    custom: bool = True

    @property
    def kind(self) -> str:
        """`aws:eks/nodeGroup:NodeGroup` is an `aws.eks.NodeGroup`."""
        package, module, name = self.type.split(":")
        return f"{package}.{module.partition('/')[0]}.{name}"


@dataclass(frozen=True, slots=True)
class Recording:
    """Resources in an order in which they can be made: each after its parent and its dependencies."""

    resources: tuple[Resource, ...]
    outputs: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> tuple[Resource, ...]:
        """Those of a kind such as `aws.eks.NodeGroup`."""
        return tuple(resource for resource in self.resources if resource.kind == kind)

    def json(self) -> str:
        """The same program gives the same bytes."""
        whole = {"outputs": self.outputs, "resources": [asdict(resource) for resource in self.resources]}
        return json.dumps(whole, sort_keys=True, indent=2)


class _NoMocks(Mocks):
    """What a function of a provider answers with. Nothing is invented: see RecordingMonitor for resources."""

    def new_resource(self, args: MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        raise AssertionError("the recording monitor answers by itself")

    def call(self, args: pulumi_mocks.MockCallArgs) -> tuple[dict[str, Any], list[tuple[str, str]] | None]:
        raise NotImplementedError(f"{args.token} asks the cloud, which a plan without one cannot")


class RecordingMonitor(pulumi_mocks.MockMonitor):
    """Keeps every request.

    `outputs(kind, name, inputs)` says what else a resource has once it is there. For a function of a provider `kind` is
    its token, and the answer is whole.
    """

    def __init__(self, outputs: Callable[[str, str, dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(_NoMocks())
        self._outputs_of = outputs
        self._lock = threading.Lock()  # requests come from several threads
        self.recorded: dict[str, Resource] = {}  # by URN
        self.stack_outputs: dict[str, Any] = {}

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type == _STACK:
            return resource_pb2.RegisterResourceResponse(urn=urn)
        resource = _resource(request)
        with self._lock:
            if urn in self.recorded:
                raise ValueError(f"two resources would be {urn}")
            self.recorded[urn] = resource
        state = {**resource.inputs, **self._outputs_of(resource.kind, resource.name, resource.inputs)}
        identity = f"${{{resource.name}.id}}" if request.custom else ""
        return resource_pb2.RegisterResourceResponse(urn=urn, id=identity, object=_struct(state))

    def RegisterResourceOutputs(self, request: Any) -> Any:
        if _is_stack(request.urn):
            self.stack_outputs = _plain(request.outputs)
        return empty_pb2.Empty()

    def Invoke(self, request: Any) -> Any:
        answer = self._outputs_of(request.tok, "", _plain(request.args))
        return resource_pb2.ResourceInvokeResponse(**{"return": _struct(answer)})


def _resource(request: Any) -> Resource:
    return Resource(
        name=request.name,
        type=request.type,
        parent=_name(request.parent) if request.parent and not _is_stack(request.parent) else None,
        inputs=_plain(request.object),
        dependencies=tuple(sorted({_name(urn) for urn in request.dependencies} | _provider(request.provider))),
        protect=request.protect,
        ignore_changes=tuple(request.ignoreChanges),
        delete_before_replace=request.deleteBeforeReplace,
        retain_on_delete=request.retainOnDelete,
        custom=request.custom,
    )


def _provider(reference: str) -> set[str]:
    """The name of an explicit provider: its reference is a URN, and its id behind another `::`."""
    return {_name(reference.rpartition("::")[0])} if reference else set()


def _is_stack(urn: str) -> bool:
    return urn.split("::")[2] == _STACK


def _name(urn: str) -> str:
    return str(urn).rpartition("::")[2]


def _plain(message: Any) -> dict[str, Any]:
    """A protobuf struct as plain data, whole numbers as such, and secrets as what they hold."""
    whole = _unwrapped(json_format.MessageToDict(message))
    assert isinstance(whole, dict)
    return whole


def _unwrapped(value: Any) -> Any:
    match value:
        case {rpc._special_sig_key: rpc._special_secret_sig}:
            return _unwrapped(value.get("value"))
        case dict():
            return {key: _unwrapped(inner) for key, inner in sorted(value.items()) if inner is not None}
        case list():
            return [_unwrapped(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(value))
    return struct


def record(program: Callable[[], None], stack: str, monitor: RecordingMonitor) -> Recording:
    """Run a Pulumi program. What it raises is raised here; nothing is left behind for the next run."""
    worker = _Worker(program, stack, monitor)
    worker.start()
    worker.join()
    if worker.failure is not None:
        raise worker.failure
    return Recording(_ordered(monitor.recorded), monitor.stack_outputs)


class _Worker(threading.Thread):
    """Pulumi keeps its event loop and its settings in the thread: so each run has a thread of its own."""

    def __init__(self, program: Callable[[], None], stack: str, monitor: RecordingMonitor) -> None:
        super().__init__(name="pulumi-program", daemon=True)
        self._program, self._stack, self._monitor = program, stack, monitor
        self.failure: BaseException | None = None

    def run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._main())
        except BaseException as failure:  # noqa: BLE001  handed to the caller's thread
            self.failure = failure
        finally:
            _cancel_rest(loop)
            loop.run_until_complete(loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            loop.close()

    async def _main(self) -> None:
        # As set_mocks does it, but for the root stack, which run_in_stack makes.
        features = set(self._monitor.GetDeploymentInfo(empty_pb2.Empty()).supportedFeatures)
        pulumi_settings.configure(
            pulumi_mocks.MockSettings(
                monitor=self._monitor,
                monitor_features=features,
                engine=pulumi_mocks.MockEngine(None),
                project=PROJECT,
                stack=self._stack,
                dry_run=False,
                organization=None,
                callbacks=None,
            )
        )
        pulumi_settings.set_root_resource(None)
        await pulumi_stack.run_in_stack(self._program)


def _cancel_rest(loop: asyncio.AbstractEventLoop) -> None:
    """After a failure others still wait for what will not come."""
    rest = asyncio.all_tasks(loop)
    for task in rest:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))


def _ordered(recorded: Mapping[str, Resource]) -> tuple[Resource, ...]:
    """Parents and dependencies first, otherwise by name: the same whatever thread was first."""
    by_name: dict[str, Resource] = {}
    for urn, resource in recorded.items():
        if resource.name in by_name:
            raise ValueError(f"{urn} has another's name, so that a plan could not tell them apart")
        by_name[resource.name] = resource
    done: dict[str, Resource] = {}

    def put(resource: Resource) -> None:
        if resource.name not in done:
            for name in (*filter(None, [resource.parent]), *resource.dependencies):
                if name in by_name and name != resource.name:
                    put(by_name[name])
            done.setdefault(resource.name, resource)

    for name in sorted(by_name):
        put(by_name[name])
    return tuple(done.values())


def export(outputs: Mapping[str, Any]) -> None:
    """What a stack tells of itself, in the order of names."""
    for name in sorted(outputs):
        pulumi.export(name, outputs[name])
