"""The page's parser of server-sent events with chunks of every size."""

from __future__ import annotations

import pytest

from tests.browser.playground import Playground

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

STREAM = 'data: {"a": "é🌍"}\n\n: warming\n\nevent: error\r\ndata:one\r\ndata: two\r\n\r\nid\rdata: last\r\rdata: cut'
EVENTS = [
    {"event": "message", "data": '{"a": "é🌍"}'},
    {"comment": "warming"},
    {"event": "error", "data": "one\ntwo"},
    {"event": "message", "data": "last"},
]
READ = """async ([bytes, sizes]) => {
    const { events } = await import("/playground/stream.js");
    const all = [];
    for (const size of sizes) {
        const pieces = [];
        for (let at = 0; at < bytes.length; at += size) pieces.push(new Uint8Array(bytes.slice(at, at + size)));
        const body = new ReadableStream({
            start(controller) {
                pieces.forEach((piece) => controller.enqueue(piece));
                controller.close();
            },
        });
        const found = [];
        for await (const event of events(body)) found.push(event);
        all.push(found);
    }
    return all;
}"""


async def test_the_events_do_not_depend_on_the_size_of_the_chunks(playground: Playground) -> None:
    await playground.open()
    data = STREAM.encode()
    sizes = list(range(1, len(data) + 1))
    found = await playground.page.evaluate(READ, [list(data), sizes])
    assert len(found) == len(sizes)
    assert [events for events in found if events != EVENTS] == []
