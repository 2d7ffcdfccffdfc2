"""A service with API keys and TLS: keys that change while it runs, and secrets that are nowhere."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.deployments.test_tls import write_certificate
from tests.graph.service import ROOT, Service, free_port, model_config, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

PASSWORD = "canary-of-the-database-password"
# The files that Ray, HAProxy and the service write texts to.
_TEXTS = ("", ".log", ".out", ".err", ".json", ".cfg")
PROMPT = {"prompt": "abc", "max_tokens": 3}


class Secured:
    """A service that demands keys, and the commands that change them."""

    def __init__(self, service: Service, database: str, certificate: Path) -> None:
        self.service = service
        self.url = service.url.replace("http://127.0.0.1", "https://localhost")
        self.certificate = str(certificate)
        self._database = database

    def command(self, *words: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "serve_app", *words, "--database-url", self._database, "--json"],
            capture_output=True,
            text=True,
            check=True,
            env=self.service.environment,
            cwd=ROOT,
        )
        return json.loads(done.stdout)

    def client(self, key: str = "") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(
            base_url=self.url, verify=ssl.create_default_context(cafile=self.certificate), headers=headers, timeout=30
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    certificate, database = folder / "tls.pem", f"sqlite:///{folder / 'keys.db'}"
    write_certificate(certificate)
    with Service(
        [model_config("toy", "builtin:toy"), model_config("second", "builtin:toy")],
        auth={"refresh_s": 0.2},
        database={"url": database},
        telemetry={"log_format": "json"},
        environment={"SERVE_APP_TLS_CERTIFICATE": str(certificate), "SERVE_APP_DATABASE_PASSWORD": PASSWORD},
    ) as service:
        service.wait_for_output("answers on", seconds=300)  # a busy machine
        yield Secured(service, database, certificate)


async def status(secured: Secured, key: str, path: str = "/v1/models") -> int:
    async with secured.client(key) as client:
        return (await client.get(path)).status_code


async def test_keys_change_while_the_service_runs(secured: Secured) -> None:
    assert await status(secured, "") == 401
    assert await status(secured, "", "/ready") == 200
    made = secured.command("keys", "create", "--models", "second")
    key: str = made["key"]

    async def known() -> bool:
        return await status(secured, key) == 200

    await wait_until(known, seconds=30)
    async with secured.client(key) as client:
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["second"]
        assert (await client.post("/generate", json=PROMPT)).json()["text"] == "abc"
        assert (await client.post("/generate", json={**PROMPT, "model": "toy"})).status_code == 404
        assert (await client.get("/metrics")).status_code == 403
    http = openai.DefaultAsyncHttpxClient(verify=ssl.create_default_context(cafile=secured.certificate))
    async with openai.AsyncOpenAI(base_url=f"{secured.url}/v1", api_key=key, http_client=http) as official:
        stream = await official.completions.create(model="second", prompt="abc", max_tokens=3, stream=True)
        assert "".join([part.choices[0].text async for part in stream]) == "abc"
    rotated = secured.command("keys", "rotate", made["id"], "--grace", "1h")["key"]
    secured.command("keys", "revoke", made["id"])

    async def replaced() -> bool:
        return (await status(secured, key), await status(secured, rotated)) == (401, 200)

    await wait_until(replaced, seconds=30)


async def test_secrets_are_in_no_log_and_no_metric(secured: Secured) -> None:
    """Not those of right keys, and not those of wrong ones."""
    made = secured.command("keys", "create", "--scopes", "inference,metrics,admin")
    right, wrong = made["key"], f"{made['key'][:-8]}CANARY77"

    async def known() -> bool:
        return await status(secured, right) == 200

    await wait_until(known, seconds=30)
    answers = []
    for key in (right, wrong):
        async with secured.client(key) as client:
            answers += [await client.get(path) for path in ("/metrics", "/v1/models", "/nothing", "/v1/messages/x")]
            answers.append(await client.post("/generate", json={**PROMPT, "user": 3}))
            answers.append(await client.post("/v1/messages", json={}))
            answers.append(await client.get("/v1/models", headers={"x-api-key": wrong}))
    assert {answer.status_code for answer in answers} >= {200, 401, 404}
    shown = "".join(answer.text + str(answer.headers) for answer in answers)
    files = [path for path in secured.service.folder.rglob("*") if path.is_file() and path.suffix in _TEXTS]
    texts = {str(path): path.read_text(errors="replace") for path in files}
    assert any("GET /v1/models" in text for text in texts.values()), "the access log is among them"
    for secret in (right.rpartition("-")[2], wrong.rpartition("-")[2], "CANARY77", PASSWORD):
        assert secret not in shown
        assert [name for name, text in texts.items() if secret in text] == []


def test_the_address_needs_keys_or_a_word(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text((ROOT / "serve_config.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "serve_app", "--config", str(config), "--host", "0.0.0.0", "--port", str(free_port())],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "without authentication" in done.stderr
