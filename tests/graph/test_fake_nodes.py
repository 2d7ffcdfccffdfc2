"""Ray's autoscaler with nodes that are processes of this machine: a model on GPUs scales from zero nodes and back.

`ray.cluster_utils.AutoscalingCluster` would stop every Ray of the machine, and needs a file that Ray's wheel lacks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.graph.cluster import Head, Ports, node_environment
from tests.graph.service import Config, model_config, model_state, wait_until, zero_scaled_model_config

pytestmark = [pytest.mark.ray, pytest.mark.ci, pytest.mark.timeout(300)]

# The id that the fake provider expects of the head.
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
IDLE_S = 6
# Keys that Ray requires of a configuration, also if nothing has to be set up.
LISTS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)


def autoscaling_config(gcs_address: str) -> Config:
    """Nodes with one GPU each, at most two, which are removed after `IDLE_S` seconds without work."""
    head = {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0}
    gpu = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "provider": {
            # By its class: for the type `fake_multinode` Ray reads a file that its wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "available_node_types": {"ray.head.default": head, "gpu": gpu},
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in LISTS},
    }


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """The nodes are descendants of the head's autoscaler, and end with the head."""
    ports, file = Ports(), tmp_path / "autoscaling.yaml"
    file.write_text(json.dumps(autoscaling_config(f"127.0.0.1:{ports.ray}")))
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with (
        node_environment("haproxy") as environment,
        Head({**environment, **fake}, "--num-cpus=4", f"--autoscaling-config={file}", ports=ports) as head,
    ):
        head.wait_until_started()
        yield head


async def test_a_request_for_a_model_without_replica_and_node_starts_both(head: Head) -> None:
    """A burst waits for the node and the replica; nothing is refused. Without requests both go again."""
    sleepy = zero_scaled_model_config("sleepy", "builtin:toy?load_s=1", downscale_to_zero_delay_s=2)
    sleepy["resources"]["num_gpus"] = 1
    head.deploy(sleepy, model_config("toy"), warm_wait_s=120, heartbeat_s=1)
    body = {"model": "sleepy", "prompt": "abc", "max_tokens": 6}
    async with httpx.AsyncClient(base_url=head.proxy, timeout=150) as client:
        await wait_until(lambda: state(client, "toy", "ready"), seconds=60, every_s=0.5)
        await wait_until(lambda: state(client, "sleepy", "asleep"), seconds=30, every_s=0.5)
        assert raylets(head) == 1
        began = time.monotonic()

        async def stream() -> str:
            async with client.stream("POST", "/generate_stream", json=body) as response:
                return "".join([part async for part in response.aiter_text()])

        texts = asyncio.gather(*(stream() for _ in range(5)))
        answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(15)))
        for text in await texts:
            assert ": warming" in text
            assert '"finished":true' in text
        seconds = time.monotonic() - began
        assert [answer.status_code for answer in answers] == [200] * 15
        assert raylets(head) == 2
        began = time.monotonic()

        async def without_node() -> bool:
            return raylets(head) == 1

        await wait_until(without_node, seconds=120, every_s=0.5)
        gone_s = time.monotonic() - began
        print(f"20 requests were answered {seconds:.1f} s after the first; the node went {gone_s:.1f} s later")
        assert await state(client, "sleepy", "asleep")


def raylets(head: Head) -> int:
    return len(head.find("--raylet_socket_name="))


async def state(client: httpx.AsyncClient, model: str, wanted: str) -> bool:
    try:
        return await model_state(client, model) == wanted
    except (httpx.TransportError, ValueError, KeyError, StopIteration):
        return False
