"""How far the models are, asked of the hub from outside of the graph."""

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
    """Unlike `/ready` it says something before a fused replica, which answers HTTP, is there."""

    def __init__(self, application: str, models: Sequence[Model]) -> None:
        self._application = application
        self._models = models
        self._hub: DeploymentHandle | None = None

    def waiting(self) -> list[str] | None:
        """What the models that cannot answer yet are doing; None while nobody is there to say."""
        board = self._board()
        if board is None:
            return None
        states = [(model.name, board.status(model)) for model in self._models]
        return [
            f"{name}: {state.detail if state else 'starting'}"
            for name, state in states
            if state is None or state.state not in (ModelState.READY, ModelState.ASLEEP)
        ]

    def _board(self) -> RegistrySnapshot | None:
        try:
            if self._hub is None:
                hub = serve.get_deployment_handle(Hub.name, self._application)  # type: ignore[attr-defined]
                hub._init(_run_router_in_separate_loop=True)  # here is no event loop for it to live on
                self._hub = hub
            response = self._hub.board.remote()
        except Exception:  # noqa: BLE001 - it is not there yet
            return None
        try:
            board: RegistrySnapshot = response.result(timeout_s=_ASK_S)
            return board
        except Exception:  # noqa: BLE001 - it starts, or moves
            response.cancel()
            return None
