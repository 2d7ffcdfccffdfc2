"""Web pages of other origins in a browser: only those of configured origins can use the service."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser, Error

from serve_app.config import Cors
from tests.api.scripted import ScriptedEngine
from tests.browser.conftest import served
from tests.graph.service import free_port

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

# A request that needs a preflight, as OpenAI's JavaScript client sends it. Returns a header and the text of the stream.
ASK = """async (url) => {
  const headers = {"content-type": "application/json", "authorization": "Bearer none", "x-stainless-lang": "js"};
  const body = JSON.stringify({prompt: "some words", stream: true});
  const response = await fetch(url + "/v1/completions", {method: "POST", headers, body});
  return [response.headers.get("x-request-id"), await response.text()];
}"""


async def test_a_page_of_a_listed_origin_can_use_the_service(chromium: Browser, engine: ScriptedEngine) -> None:
    """The pages are those of two more services, on ports of their own."""
    port, listed, other = free_port(), free_port(), free_port()
    service, cors = f"http://127.0.0.1:{port}", Cors(allow_origins=(f"http://127.0.0.1:{listed}",))
    async with served(engine, port, cors), served(engine, listed), served(engine, other):
        page = await chromium.new_page()
        await page.goto(f"http://127.0.0.1:{listed}/health")
        request_id, text = await page.evaluate(ASK, service)
        assert request_id
        assert text.endswith("data: [DONE]\n\n")
        assert len(engine.requests) == 1
        await page.goto(f"http://127.0.0.1:{other}/health")
        with pytest.raises(Error, match="Failed to fetch"):
            await page.evaluate(ASK, service)
        assert len(engine.requests) == 1, "the preflight was refused"
        await page.close()
