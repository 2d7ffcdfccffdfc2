"""`python -m serve_app`: what it says, what it refuses, and that nothing of it stays."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.graph.house import SHIPPED, Program, Service, free_port, model, sleeper

pytestmark = pytest.mark.ray


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def gone(program: Program) -> bool:
    """Whether no process of it is left, after the moment that the last ones take to end."""
    end = time.monotonic() + 10
    while program.left() and time.monotonic() < end:
        time.sleep(0.1)
    return not program.left()


def open_to_others(program: Program) -> dict[int, str]:
    """The ports of it on which another machine could knock, and whose they are."""
    return {
        connection.laddr.port: process.name()
        for process in program.left()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith(("127.", "::1"))
    }


def folder_of(front: psutil.Process) -> Path:
    """Where HAProxy's files are."""
    command = front.cmdline()
    return Path(command[command.index("-f") + 1]).parents[1]


def turned_away(port: int) -> bool:
    """Whether a gRPC server there refuses a caller without the token before it looks at what it is sent."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
    return bool(refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED)


def refused(*options: str) -> tuple[str, float]:
    """What the program says as it refuses to start, and how long that took."""
    began = time.monotonic()
    with Program(["serve_app", *options]) as program:
        assert program.process.wait(timeout=60) == 1
        return program.said(), time.monotonic() - began


def test_the_commands_it_prints_work_and_ctrl_c_leaves_nothing() -> None:
    with Service([model("toy"), sleeper("later", "builtin:toy", 60)]) as service:
        said = service.wait_for("Chat:")
        commands = [line.strip() for line in said.splitlines() if line.strip().startswith("curl")]
        stream, chat = (
            subprocess.run(shlex.split(command), capture_output=True, text=True, check=True, timeout=30).stdout
            for command in commands
        )
        assert stream.startswith("data: ")
        assert stream.count('"finished":true') == 1
        assert json.loads(chat)["choices"][0]["message"]["role"] == "assistant"
        assert "Models: toy, later" in said
        for stage in ("starting Ray", "starting Ray Serve"):
            assert stage in said

        family = service.family()
        assert len(family) > 8, "Ray has many processes; were they seen?"
        # Ray Serve gives every replica a port on all interfaces for calls between deployments; only that one.
        others = open_to_others(service)
        assert all(name.startswith("ray::ServeReplica") for name in others.values()), others
        assert all(turned_away(port) for port in others)
        # HAProxy stands in front; whoever reaches its admin socket may redirect the service.
        (front,) = service.find("haproxy.cfg")
        folder = folder_of(front)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert service.interrupt(signal.SIGINT) == 0
        assert service.said().rstrip().endswith("stopped")
        assert gone(service), [process.cmdline() for process in service.left()]
        assert not listening(service.port)
        assert not folder.exists()


def test_haproxy_ends_with_a_service_that_is_killed() -> None:
    """It would keep the port. Of the others Ray itself takes care."""
    with Service([model("toy")]) as service:
        service.wait_for("answers on")
        (front,) = service.find("haproxy.cfg")
        folder = folder_of(front)
        service.process.kill()
        psutil.wait_procs([front], timeout=20)
        assert not front.is_running()
        assert not listening(service.port)
        shutil.rmtree(folder)


def test_a_model_that_still_loads_is_waited_for_with_reasons() -> None:
    models = [model("loading", "builtin:toy?load_s=1000"), sleeper("waking", "builtin:toy?load_s=1000", 60)]
    with Service(models, warm_wait_s=2, heartbeat_s=0.5) as service, httpx.Client(base_url=service.url) as client:
        service.wait_for("loading: starting")
        assert client.get("/health").status_code == 200
        ready = client.get("/ready", params={"model": "loading"})
        assert ready.status_code == 503
        assert ready.json()["models"][0]["state"] == "loading"
        end = time.monotonic() + 10
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end, "the other one can be woken"
            time.sleep(0.1)

        early = client.post("/v1/completions", json={"model": "loading", "prompt": "x"})
        assert early.status_code == 503
        assert int(early.headers["retry-after"]) >= 1
        assert "is being loaded" in early.json()["error"]["message"]

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
        assert gone(service), [process.cmdline() for process in service.left()]


def test_a_model_that_cannot_be_loaded_ends_the_program_with_its_reason() -> None:
    with Service([model("good"), model("lost", "/nowhere/at/all")]) as service:
        assert service.process.wait(timeout=90) == 1
        last = service.said().rstrip().splitlines()[-1]
        assert last.startswith("serve_app: the deployment failed: lost: SourceError: /nowhere/at/all: nothing there")
        assert "builtin:smollm2-135m" in last
        assert gone(service)


def test_a_port_in_use_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said, seconds = refused("--config", str(SHIPPED), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "--port" in said
    assert seconds < 10


def test_a_missing_file_is_refused_at_once() -> None:
    said, seconds = refused("--config", "nowhere.yaml")
    assert said.startswith("serve_app: nowhere.yaml: no such file")
    assert seconds < 10


def test_a_cluster_that_does_not_answer_is_said() -> None:
    said, _ = refused("--config", str(SHIPPED), "--port", str(free_port()), "--ray-address", "127.0.0.1:1")
    assert "no Ray cluster answers at 127.0.0.1:1" in said


@pytest.mark.parametrize("after_s", [0.3, 1.0, 2.0, 3.5, 5.5, 7.5])
def test_ctrl_c_at_any_moment_of_the_start_leaves_nothing(after_s: float) -> None:
    with Service([model("loading", "builtin:toy?load_s=1000")]) as service:
        time.sleep(after_s)
        # Before it can do anything about it, it ends by the signal as any program: 130 to a shell as well.
        assert service.interrupt(signal.SIGINT) in (0, 130, -signal.SIGINT)
        assert gone(service), [process.cmdline() for process in service.left()]
        assert "Traceback" not in service.said()
