"""How far the models are, asked of the hub from outside of the graph."""

from __future__ import annotations

from collections.abc import Sequence

from ray import serve

from serve_app.config import Model
from serve_app.deployments.hub import Board, Hub
from serve_app.types import ModelState

_ASK_S = 2.0


def waiting(application: str, models: Sequence[Model]) -> list[str] | None:
    """What the models that cannot answer yet are doing; None while nobody is there to say.

    Unlike `/ready` it is there before a fused replica is.
    """
    try:
        hub = serve.get_deployment_handle(Hub.name, application)  # type: ignore[attr-defined]
        # There is no event loop here for the handle to live on.
        hub._init(_run_router_in_separate_loop=True)
        response = hub.board.remote()
    except Exception:  # noqa: BLE001 - it is asked again
        return None
    try:
        board: Board = response.result(timeout_s=_ASK_S)
    except Exception:  # noqa: BLE001 - likewise
        response.cancel()
        return None
    states = [(model.name, board.status(model)) for model in models]
    return [
        f"{name}: {state.detail if state else 'starting'}"
        for name, state in states
        if state is None or state.state not in (ModelState.READY, ModelState.ASLEEP)
    ]
