"""`python -m serve_app`: start, refusals to start, and the end of all its processes.

Each test is a program of its own. The programs run in the background, two at a time, and each test waits for its own.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.graph.service import (
    ROOT,
    SHIPPED_CONFIG,
    Program,
    Service,
    free_port,
    model_config,
    zero_scaled_model_config,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

AT_ONCE = 2
# An address at which nothing listens.
CLOSED = "http://127.0.0.1:9"
SCENARIOS: dict[str, Callable[[], None]] = {}
Results = dict[str, Future[None]]


def in_background(scenario: Callable[[], None]) -> Callable[[Results], None]:
    """The test that returns or raises as `scenario` does, which runs in a thread from the module's first test on."""
    name = scenario.__name__
    SCENARIOS[name] = scenario

    def test(results: Results) -> None:
        results[name].result()

    test.__name__, test.__doc__ = name, scenario.__doc__
    return test


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Runs the scenarios of the selected tests."""
    selected = [item.name for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(SCENARIOS[name]) for name in selected if name in SCENARIOS}


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ended(program: Program) -> bool:
    """Whether all processes of the program end within 10 s after the program itself."""
    end = time.monotonic() + 10
    while program.running() and time.monotonic() < end:
        time.sleep(0.1)
    return not program.running()


def open_to_others(program: Program) -> dict[int, str]:
    """The ports of the program to which other machines can connect, with the name of the process."""
    return {
        connection.laddr.port: process.name()
        for process in program.running()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith(("127.", "::1"))
    }


def folder_of(haproxy: psutil.Process) -> Path:
    """The folder of HAProxy's files."""
    command = haproxy.cmdline()
    return Path(command[command.index("-f") + 1]).parents[1]


def requires_token(port: int) -> bool:
    """Whether the gRPC server refuses a call without the token before it reads the request."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
    return bool(refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED)


def refused(*options: str) -> tuple[str, float]:
    """The output of a program that refuses to start, and the seconds until it ended."""
    began = time.monotonic()
    with Program(["serve_app", *options]) as program:
        assert program.process.wait(timeout=60) == 1
        return program.output(), time.monotonic() - began


@in_background
def test_the_printed_commands_work_and_ctrl_c_ends_all_processes() -> None:
    """With an HTTP proxy in the environment that cannot be reached."""
    environment = {"http_proxy": CLOSED, "HTTP_PROXY": CLOSED, "no_proxy": "", "NO_PROXY": ""}
    models = [model_config("toy"), zero_scaled_model_config("later", "builtin:toy", 60)]
    with Service(models, "--ray-address", "local", environment=environment) as service:
        output = service.wait_for_output("Chat:")
        commands = [line.strip() for line in output.splitlines() if line.strip().startswith("curl")]
        stream, chat = (
            subprocess.run(shlex.split(command), capture_output=True, text=True, check=True, timeout=30).stdout
            for command in commands
        )
        assert stream.startswith("data: ")
        assert stream.count('"finished":true') == 1
        assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
        assert "Models: toy, later" in output
        (dashboard,) = re.findall(r"Ray dashboard: (http://\S+)", output)
        assert "Ray Dashboard" in httpx.get(dashboard, trust_env=False).text
        for stage in ("starting Ray", "starting Ray Serve"):
            assert stage in output

        assert len(service.descendants()) > 8, "the processes of Ray"
        # Ray Serve opens one port per replica on all interfaces, for calls between deployments.
        others = open_to_others(service)
        assert all(name.startswith("ray::ServeReplica") for name in others.values()), others
        assert all(requires_token(port) for port in others)
        # HAProxy's admin socket can redirect the service.
        haproxy = service.haproxy()
        folder = folder_of(haproxy)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert service.interrupt(signal.SIGINT) == 0
        assert service.output().rstrip().endswith("stopped")
        assert ended(service), [process.cmdline() for process in service.running()]
        assert not listening(service.port)
        assert not folder.exists()


@in_background
def test_haproxy_ends_with_a_service_that_is_killed() -> None:
    """HAProxy would keep the port; Ray ends the other processes. `no_proxy` is set here besides the HTTP proxy."""
    environment = {"http_proxy": CLOSED, "HTTP_PROXY": CLOSED, "no_proxy": "localhost", "NO_PROXY": "localhost"}
    with Service([model_config("toy")], environment=environment) as service:
        service.wait_until_ready()
        haproxy = service.haproxy()
        folder = folder_of(haproxy)
        service.process.kill()
        psutil.wait_procs([haproxy], timeout=20)
        assert not haproxy.is_running()
        assert not listening(service.port)
        shutil.rmtree(folder)


@in_background
def test_the_service_answers_while_its_models_load() -> None:
    """`/ready` has the stage, and requests get 503 with Retry-After, or wait if the model wakes from zero replicas."""
    models = [
        model_config("loading", "builtin:toy?load_s=1000"),
        zero_scaled_model_config("waking", "builtin:toy?load_s=1000", 60),
    ]
    with Service(models, warm_wait_s=2, heartbeat_s=0.5) as service, httpx.Client(base_url=service.url) as client:
        ready = first_answer(client, "/ready?model=loading", service)
        print(f"/ready answered after {time.monotonic() - service.started:.1f} s: {ready.text}")
        assert ready.status_code == 503
        assert ready.json()["models"][0]["state"] == "loading"
        service.wait_for_output("loading: starting")
        assert client.get("/health").status_code == 200
        ready = client.get("/ready", params={"model": "loading"})
        assert ready.status_code == 503
        assert ready.json()["models"][0]["detail"] == "starting"
        end = time.monotonic() + 10
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end, "the model that can be woken counts as available"
            time.sleep(0.1)

        for path in ("/v1/completions", "/generate"):
            early = client.post(path, json={"model": "loading", "prompt": "x"})
            assert early.status_code == 503
            assert int(early.headers["retry-after"]) >= 1
            error = early.json()["error"]
            assert "not_ready" in (error["code"], error.get("type"))

        began = time.monotonic()
        late = client.post("/generate", json={"model": "waking", "prompt": "x"}, timeout=30)
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) >= 1
        assert 1.5 < time.monotonic() - began < 10

        beats = []
        with client.stream("POST", "/generate_stream", json={"model": "waking", "prompt": "x"}) as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                beats.append(time.monotonic())
                assert line in (": warming", "")
                if len(beats) >= 6:
                    break
        assert max(after - before for before, after in itertools.pairwise(beats)) < 2

        assert service.interrupt(signal.SIGTERM) in (0, 130)
        assert ended(service), [process.cmdline() for process in service.running()]


def first_answer(client: httpx.Client, path: str, service: Service) -> httpx.Response:
    """The first answer that is the service's own. Before, nothing listens or the proxy answers."""
    while True:
        assert service.process.poll() is None, service.output()
        assert time.monotonic() < service.started + 90
        try:
            answer = client.get(path)
            if answer.headers.get("content-type") == "application/json":
                return answer
        except httpx.TransportError:
            pass
        time.sleep(0.1)


@in_background
def test_a_model_that_cannot_be_loaded_ends_the_program_with_the_reason() -> None:
    with Service([model_config("good"), model_config("lost", "/nowhere/at/all")]) as service:
        assert service.process.wait(timeout=120) == 1
        last = service.output().rstrip().splitlines()[-1]
        assert last.startswith("serve_app: ")
        assert "lost: SourceError: /nowhere/at/all" in last
        assert "builtin:smollm2-135m" in last
        assert ended(service)


def without_exporter(folder: Path) -> dict[str, str]:
    """An environment in which OpenTelemetry's exporter is not installed."""
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry.exporter'] = None\n")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@in_background
def test_tracing_without_its_packages_ends_the_program_with_the_command_that_installs_them() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = without_exporter(Path(folder))
        with Service([model_config("toy")], environment=environment, telemetry={"tracing": {}}) as service:
            assert service.process.wait(timeout=90) == 1
            assert "pip install 'serve_app[tracing]'" in service.output().rstrip().splitlines()[-1]


@pytest.mark.perf
def test_a_port_in_use_is_refused_within_10_s() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output, seconds = refused("--config", str(SHIPPED_CONFIG), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in output
    assert "--port" in output
    assert seconds < 10


@pytest.mark.perf
def test_a_missing_file_is_refused_within_10_s() -> None:
    output, seconds = refused("--config", "nowhere.yaml")
    assert output.startswith("serve_app: nowhere.yaml: no such file")
    assert seconds < 10


def test_a_cluster_that_does_not_answer_is_refused() -> None:
    output, _ = refused("--config", str(SHIPPED_CONFIG), "--port", str(free_port()), "--ray-address", "127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in output


def interrupt_start(after_s: float) -> None:
    with Service([model_config("loading", "builtin:toy?load_s=1000")]) as service:
        time.sleep(after_s)
        # A program that has not installed its handler yet ends by the signal, which a shell reports as 130 too.
        assert service.interrupt(signal.SIGINT) in (0, 130, -signal.SIGINT)
        assert ended(service), [process.cmdline() for process in service.running()]
        assert "Traceback" not in service.output()


MOMENTS = [0.3, 1.0, 2.0, 3.5, 5.5, 7.5]
FOR_A_RELEASE = [0.3, 1.0, 2.0, 5.5]
INTERRUPTED = "test_ctrl_c_during_the_start_ends_all_processes"
SCENARIOS |= {f"{INTERRUPTED}[{moment}]": partial(interrupt_start, moment) for moment in MOMENTS}


@pytest.mark.parametrize(
    "after_s", [pytest.param(s, marks=pytest.mark.long) if s in FOR_A_RELEASE else s for s in MOMENTS]
)
def test_ctrl_c_during_the_start_ends_all_processes(results: Results, after_s: float) -> None:
    results[f"{INTERRUPTED}[{after_s}]"].result()
