"""Records a Pulumi program: runs it against a monitor that stores every request and creates nothing.

Pulumi's mock monitor stores a resource's inputs only. This monitor also stores parent, dependencies and protection, so
that a recording is a complete plan, without Pulumi's engine, provider plugins or credentials.
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
    """A resource that the program requests. `inputs` are plain data with the provider's names (camelCase).

    Values that only the cloud knows are written as `${name.property}`. `parent` and `dependencies` are resource names.
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
        """The short type name: `aws.eks.NodeGroup` for the type `aws:eks/nodeGroup:NodeGroup`."""
        package, module, name = self.type.split(":")
        return f"{package}.{module.partition('/')[0]}.{name}"


@dataclass(frozen=True, slots=True)
class Recording:
    """Resources in creation order: each one after its parent and its dependencies."""

    resources: tuple[Resource, ...]
    outputs: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> tuple[Resource, ...]:
        """The resources of a kind such as `aws.eks.NodeGroup`."""
        return tuple(resource for resource in self.resources if resource.kind == kind)

    def json(self) -> str:
        """The recording as JSON; the same program gives the same bytes."""
        data = {"outputs": self.outputs, "resources": [asdict(resource) for resource in self.resources]}
        return json.dumps(data, sort_keys=True, indent=2)


class _NoMocks(Mocks):
    """The base class needs mocks; RecordingMonitor answers all requests, so that none is ever called."""

    def new_resource(self, args: MockResourceArgs) -> tuple[str | None, dict[str, Any]]:
        raise AssertionError("the recording monitor answers resource requests itself")

    def call(self, args: pulumi_mocks.MockCallArgs) -> tuple[dict[str, Any], list[tuple[str, str]] | None]:
        raise NotImplementedError(f"{args.token} needs a cloud, which a plan does not have")


class RecordingMonitor(pulumi_mocks.MockMonitor):
    """Stores every request.

    `outputs(kind, name, inputs)` returns a resource's outputs beyond its inputs. For a provider function, `kind` is the
    function's token, `name` is empty, and the result is the function's whole answer.
    """

    def __init__(self, outputs: Callable[[str, str, dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__(_NoMocks())
        self._outputs_of = outputs
        self._lock = threading.Lock()  # Pulumi sends requests from several threads
        self.recorded: dict[str, Resource] = {}  # by URN
        self.stack_outputs: dict[str, Any] = {}

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        if request.type == _STACK:
            return resource_pb2.RegisterResourceResponse(urn=urn)
        resource = _resource(request)
        with self._lock:
            if urn in self.recorded:
                raise ValueError(f"two resources have the URN {urn}")
            self.recorded[urn] = resource
        state = {**resource.inputs, **self._outputs_of(resource.kind, resource.name, resource.inputs)}
        identity = f"${{{resource.name}.id}}" if request.custom else ""
        return resource_pb2.RegisterResourceResponse(urn=urn, id=identity, object=_struct(state))

    def RegisterResourceOutputs(self, request: Any) -> Any:
        if _is_stack(request.urn):
            self.stack_outputs = _to_python(request.outputs)
        return empty_pb2.Empty()

    def Invoke(self, request: Any) -> Any:
        answer = self._outputs_of(request.tok, "", _to_python(request.args))
        return resource_pb2.ResourceInvokeResponse(**{"return": _struct(answer)})


def _resource(request: Any) -> Resource:
    return Resource(
        name=request.name,
        type=request.type,
        parent=_name(request.parent) if request.parent and not _is_stack(request.parent) else None,
        inputs=_to_python(request.object),
        dependencies=tuple(sorted({_name(urn) for urn in request.dependencies} | _provider(request.provider))),
        protect=request.protect,
        ignore_changes=tuple(request.ignoreChanges),
        delete_before_replace=request.deleteBeforeReplace,
        retain_on_delete=request.retainOnDelete,
        custom=request.custom,
    )


def _provider(reference: str) -> set[str]:
    """The name of an explicit provider, from its reference `URN::ID`."""
    return {_name(reference.rpartition("::")[0])} if reference else set()


def _is_stack(urn: str) -> bool:
    return urn.split("::")[2] == _STACK


def _name(urn: str) -> str:
    return str(urn).rpartition("::")[2]


def _to_python(message: Any) -> dict[str, Any]:
    """A protobuf struct as plain data, with integers for whole numbers and secrets replaced by their values."""
    data = _unwrap(json_format.MessageToDict(message))
    assert isinstance(data, dict)
    return data


def _unwrap(value: Any) -> Any:
    match value:
        case {rpc._special_sig_key: rpc._special_secret_sig}:
            return _unwrap(value.get("value"))
        case dict():
            return {key: _unwrap(inner) for key, inner in sorted(value.items()) if inner is not None}
        case list():
            return [_unwrap(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def _struct(value: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(value))
    return struct


def record(program: Callable[[], None], stack: str, monitor: RecordingMonitor) -> Recording:
    """Run a Pulumi program and return its recording. Raises what the program raises."""
    thread = _ProgramThread(program, stack, monitor)
    thread.start()
    thread.join()
    if thread.failure is not None:
        raise thread.failure
    return Recording(_topological_order(monitor.recorded), monitor.stack_outputs)


class _ProgramThread(threading.Thread):
    """Runs the program in a new thread, because Pulumi stores its event loop and settings per thread."""

    def __init__(self, program: Callable[[], None], stack: str, monitor: RecordingMonitor) -> None:
        super().__init__(name="pulumi-program", daemon=True)
        self._program, self._stack, self._monitor = program, stack, monitor
        self.failure: BaseException | None = None

    def run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._main())
        except BaseException as failure:  # noqa: BLE001  re-raised in the caller's thread
            self.failure = failure
        finally:
            _cancel_pending_tasks(loop)
            loop.run_until_complete(loop.shutdown_default_executor())
            asyncio.set_event_loop(None)
            loop.close()

    async def _main(self) -> None:
        # Like Pulumi's set_mocks, but without a root stack, which run_in_stack creates.
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


def _cancel_pending_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """After a failure, tasks still wait for outputs that will never be set."""
    pending = asyncio.all_tasks(loop)
    for task in pending:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))


def _topological_order(recorded: Mapping[str, Resource]) -> tuple[Resource, ...]:
    """Parents and dependencies first, otherwise by name, independent of the threads' timing."""
    by_name: dict[str, Resource] = {}
    for urn, resource in recorded.items():
        if resource.name in by_name:
            raise ValueError(f"{urn} has the name of another resource; names must be unique in a plan")
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
    """Export stack outputs in the order of their names."""
    for name in sorted(outputs):
        pulumi.export(name, outputs[name])
