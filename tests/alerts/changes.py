"""A live story: the monitor reports that a service and a Ray appear and disappear."""

from __future__ import annotations

import asyncio
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.alerts.live import LiveService
from tests.graph.service import Program, free_port


class Metrics(BaseHTTPRequestHandler):
    """Answers every GET request with one metric."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"serve_app_ready_replicas 1\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


# The port is closed: the monitor must not send requests to loopback addresses through the proxy of the environment.
PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:9")


async def report_changes(live: LiveService) -> str:
    """The output of the monitor. The fake service has a URL with a path, and the environment has a proxy."""
    return await asyncio.to_thread(_report_changes, live.folder("changes"))


def _report_changes(folder: Path) -> str:
    port = free_port()
    ports = [word for name in ("prometheus", "alertmanager", "history") for word in (f"--{name}-port", "0")]
    command = ["alerts", "monitor", "--url", f"http://127.0.0.1:{port}/llm/", "--data", str(folder / "data"), *ports]
    with Program(command, **PROXY) as program:
        program.wait_for_output("the service does not answer: ")
        output = program.wait_for_output("Ray is not found: ")
        assert f"{program.folder}/ray/prom_metrics_service_discovery.json lists no targets yet" in output
        server = ThreadingHTTPServer(("127.0.0.1", port), Metrics)
        Thread(target=server.serve_forever, daemon=True).start()
        (program.folder / "ray").mkdir()
        targets = [{"labels": {"job": "other"}, "targets": [f"127.0.0.1:{port}"]}]
        (program.folder / "ray/prom_metrics_service_discovery.json").write_text(json.dumps(targets))
        try:
            program.wait_for_output(f"the service is up: Prometheus scrapes http://127.0.0.1:{port}/llm/metrics")
            program.wait_for_output("Ray is up: Prometheus scrapes")
        finally:
            server.shutdown()
            server.server_close()
        program.wait_for_output("Ray does not answer at any of the addresses (1)")
        assert program.interrupt() == 0
        return program.output()
