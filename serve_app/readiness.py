"""Reads the state of the models of a service on this machine from its `/ready`."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence

_TIMEOUT_S = 2.0
# urllib uses the proxies of the environment by default. A proxy cannot reach the loopback interface of this machine.
# With TLS the certificate has the name by which clients reach the service, and not that of the loopback interface.
_TLS = ssl.create_default_context()
_TLS.check_hostname, _TLS.verify_mode = False, ssl.CERT_NONE
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_TLS))


def waiting_models(url: str, models: Sequence[str]) -> list[str] | None:
    """The models that cannot serve yet, each as `name: detail`. None if the service does not answer for all `models`.

    A model that is scaled to zero can serve: the first request starts it.
    """
    states = _states(url)
    if states is None or not set(models) <= set(states):
        return None
    return [
        f"{name}: {detail or state}"
        for name, (state, detail) in states.items()
        if name in models and state not in ("ready", "asleep")
    ]


def _states(url: str) -> dict[str, tuple[str, str]] | None:
    """State and detail by model name; None without a valid answer."""
    try:
        with _answer(f"{url}/ready") as answer:
            models = json.load(answer)["models"]
            return {model["name"]: (model["state"], model["detail"]) for model in models}
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None  # nothing listens yet, or Ray Serve's proxy answers because no ingress runs


def _answer(url: str) -> urllib.error.HTTPError:
    """The response, with any status."""
    try:
        return _DIRECT.open(url, timeout=_TIMEOUT_S)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        return error
