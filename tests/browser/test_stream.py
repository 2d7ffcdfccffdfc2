"""The page's reader of server-sent events, by itself: networks cut a stream wherever they like."""

from __future__ import annotations

import pytest

from tests.browser.visitor import Visitor

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


async def test_events_are_the_same_however_the_stream_is_cut(visitor: Visitor) -> None:
    await visitor.open()
    data = STREAM.encode()
    sizes = list(range(1, len(data) + 1))
    found = await visitor.page.evaluate(READ, [list(data), sizes])
    assert len(found) == len(sizes)
    assert [events for events in found if events != EVENTS] == []
