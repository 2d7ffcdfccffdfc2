"""How far the models of a service on this machine are, read from its `/ready`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence

_TIMEOUT_S = 2.0
# The service is on this machine: a proxy from the environment must not be asked for it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def waiting_models(url: str, models: Sequence[str]) -> list[str] | None:
    """The models that cannot serve yet, each with what it does; None while the service does not answer."""
    states = _states(url)
    if states is None or not set(models) <= set(states):
        return None
    return [
        f"{name}: {detail or state}"
        for name, (state, detail) in states.items()
        if name in models and state not in ("ready", "asleep")
    ]


def _states(url: str) -> dict[str, tuple[str, str]] | None:
    """State and detail by model."""
    try:
        with _answer(f"{url}/ready") as answer:
            models = json.load(answer)["models"]
            return {model["name"]: (model["state"], model["detail"]) for model in models}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing listens yet, or the answer is the proxy's own


def _answer(url: str) -> urllib.error.HTTPError:
    """The answer, whatever its status."""
    try:
        return _DIRECT.open(url, timeout=_TIMEOUT_S)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        return error
