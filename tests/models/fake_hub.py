"""A fake model hub on the loopback interface that serves one repository at one commit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Response = tuple[int, bytes, dict[str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`requests` holds the path of each request."""

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def respond(self, path: str) -> Response:
        self.requests.append(path)
        parts = path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._repository(*parts[2:])
        file = self.folder.joinpath(*parts[4:])
        if "resolve" not in parts or not file.is_file():
            return _missing("Entry")
        body = file.read_bytes()
        return 200, body, {"etag": f'"{hashlib.sha1(body).hexdigest()}"', "x-repo-commit": COMMIT}

    def _repository(self, owner: str, name: str, what: str = "", revision: str = "main") -> Response:
        if revision not in ("main", COMMIT):
            return _missing("Revision")
        paths = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*")]
        document: object = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in paths]}
        if what == "tree":
            sizes = [(self.folder / path).stat().st_size for path in paths]
            document = [
                {"type": "file", "path": path, "size": size, "oid": COMMIT}
                for path, size in zip(paths, sizes, strict=True)
            ]
        return 200, json.dumps(document).encode(), {"content-type": "application/json"}


def _missing(what: str) -> Response:
    return 404, b"", {"x-error-code": f"{what}NotFound", "x-repo-commit": COMMIT}


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serves the files of `folder` under the name of any requested repository."""
    hub = FakeHub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, body, headers = hub.respond(self.path)
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
