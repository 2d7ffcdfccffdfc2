"""Opens the URL of a service without the proxies of the environment if the service is on this machine."""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

from serve_app.auth_config import is_loopback


def opener(url: str) -> urllib.request.OpenerDirector:
    """A proxy of the environment cannot reach the loopback interface of this machine."""
    handlers = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    return urllib.request.build_opener(*handlers)
