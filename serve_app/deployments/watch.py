"""How far the models are, read from the hub by a process outside of the application."""

from __future__ import annotations

from collections.abc import Sequence

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config import Model
from serve_app.core.queries import ModelState
from serve_app.deployments.hub import Hub
from serve_app.deployments.registry import RegistrySnapshot

_ASK_S = 2.0


class Watch:
    """The stages of the models of `application`, also before its ingress answers HTTP."""

    def __init__(self, application: str, models: Sequence[Model]) -> None:
        self._application = application
        self._models = models
        self._hub: DeploymentHandle | None = None

    def waiting(self) -> list[str] | None:
        """The stages of the models that cannot serve yet; None while the hub does not answer."""
        state = self._snapshot()
        if state is None:
            return None
        states = [(model.name, state.status(model)) for model in self._models]
        return [
            f"{name}: {state.detail if state else 'starting'}"
            for name, state in states
            if state is None or state.state not in (ModelState.READY, ModelState.ASLEEP)
        ]

    def _snapshot(self) -> RegistrySnapshot | None:
        try:
            if self._hub is None:
                hub = serve.get_deployment_handle(Hub.name, self._application)  # type: ignore[attr-defined]
                hub._init(_run_router_in_separate_loop=True)  # this process has no event loop for the router
                self._hub = hub
            response = self._hub.snapshot.remote()
        except Exception:  # noqa: BLE001 - it is not there yet
            return None
        try:
            snapshot: RegistrySnapshot = response.result(timeout_s=_ASK_S)
            return snapshot
        except Exception:  # noqa: BLE001 - it starts, or moves
            response.cancel()
            return None
