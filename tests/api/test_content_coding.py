"""Compressed request bodies: decoded within `max_body_bytes`, or refused in the dialect of the path."""

from __future__ import annotations

import gzip
import json
import sys
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import httpx
import pytest

from serve_app.core.requests import TextPrompt

from .scripted import (
    POSTS,
    Connection,
    ScriptedEngine,
    ScriptedTelemetry,
    assert_invalid,
    check_error,
    error_of,
    serve,
    tgi_error_of,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

every_post = pytest.mark.parametrize("path", POSTS)
# Without the time, so that the names of tests do not change.
GZIP = partial(gzip.compress, mtime=0)
_CHECKSUM: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": GZIP,
    "zstd": partial(zstd.compress, options=_CHECKSUM),
}
every_coding = pytest.mark.parametrize("coding", COMPRESS)
LIMIT = 20_000  # of the fixture `client`
HI = b'{"prompt": "hi"}'
TEN_GB = 10 * 2**30


def coded(coding: str) -> dict[str, str]:
    return {"content-encoding": coding}


@every_post
@every_coding
async def test_a_compressed_body_is_decoded(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str, coding: str
) -> None:
    body = COMPRESS[coding](json.dumps(POSTS[path]).encode())
    answer = await client.post(path, content=body, headers=coded(coding))
    assert answer.status_code == 200
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("identity", HI),
        ("", HI),
        ("GZIP", GZIP(HI)),
        ("x-gzip", GZIP(HI)),
        ("identity, gzip", GZIP(HI)),
        ("gzip", GZIP(HI[:5]) + GZIP(HI[5:])),
        ("gzip", GZIP(HI) + GZIP(b"")),
        ("zstd", zstd.compress(HI[:5]) + zstd.compress(HI[5:])),
    ],
)
async def test_other_forms_of_the_codings_are_decoded(
    client: httpx.AsyncClient, engine: ScriptedEngine, header: str, body: bytes
) -> None:
    assert (await client.post("/generate", content=body, headers=coded(header))).status_code == 200
    assert engine.requests[0].prompt == TextPrompt("hi")


@every_coding
async def test_a_body_may_arrive_in_parts_of_any_size(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, coding: str
) -> None:
    parts = [bytes([byte]) for byte in COMPRESS[coding](HI) + COMPRESS[coding](b"  ")]
    connection = Connection(
        "/generate", None, parts=[b"", *parts, b""], headers=[(b"content-encoding", coding.encode())]
    )
    await serve(engine, telemetry, connection)
    assert connection.status == 200
    assert engine.requests[0].prompt == TextPrompt("hi")


@every_coding
async def test_the_bound_holds_for_the_decoded_body(
    client: httpx.AsyncClient, engine: ScriptedEngine, coding: str
) -> None:
    for size, status in ((LIMIT, 200), (LIMIT + 1, 413)):
        body = COMPRESS[coding](HI.ljust(size))
        assert len(body) < 100
        answer = await client.post("/generate", content=body, headers=coded(coding))
        assert answer.status_code == status
    assert error_of(answer)["code"] == "body_too_large"
    assert "decoded body is larger than 20000 bytes" in error_of(answer)["message"]
    assert len(engine.requests) == 1


@every_coding
async def test_the_bound_holds_for_the_compressed_body(client: httpx.AsyncClient, coding: str) -> None:
    """Random digits are stored almost as they are."""
    noise = b"".join(zlib.crc32(bytes([i % 256, i // 256])).to_bytes(4, "big") for i in range(LIMIT))
    answer = await client.post("/generate", content=COMPRESS[coding](noise), headers=coded(coding))
    assert answer.status_code == 413
    assert error_of(answer)["message"].startswith("The body is larger")


def gzip_bomb() -> bytes:
    """10 GiB of zeros in 10 MB: a block that ends at a byte can be repeated."""
    compress = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = compress.compress(bytes(2**20)) + compress.flush(zlib.Z_FULL_FLUSH)
    return GZIP(b"")[:10] + block * (TEN_GB // 2**20)


def zstd_bomb() -> bytes:
    """10 GiB of zeros in 330 kB: one frame with a window of 128 KiB, whose blocks repeat one byte (RFC 8878)."""
    block = ((2**17 << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\0\x38" + block * (TEN_GB // 2**17)


@pytest.mark.parametrize(("coding", "make"), [("gzip", gzip_bomb), ("zstd", zstd_bomb)], ids=COMPRESS)
async def test_a_bomb_of_zeros_is_refused_without_being_decoded(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry, coding: str, make: Callable[[], bytes]
) -> None:
    bomb, limit = make(), 12 * 2**20
    assert len(bomb) < limit
    connection = Connection("/generate", None, parts=[bomb], headers=[(b"content-encoding", coding.encode())])
    tracemalloc.start()
    began = time.monotonic()
    await serve(engine, telemetry, connection, max_body_bytes=limit)
    seconds, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{coding}: {seconds * 1000:.0f} ms, {peak / 2**20:.1f} MiB")
    assert connection.status == 413
    assert peak < 4 * limit
    assert seconds < 2, "to decode 10 GiB takes longer"


async def test_a_body_of_countless_parts_is_refused(client: httpx.AsyncClient) -> None:
    """To decode 2,000 empty members would copy the rest of the body 2,000 times."""
    for coding, compress in COMPRESS.items():
        answer = await client.post("/generate", content=compress(b"") * 900, headers=coded(coding))
        assert_invalid(answer)
        assert f"The {coding} data has more than 64 parts" in error_of(answer)["message"]


@every_post
@pytest.mark.parametrize("coding", ["br", "deflate", "gzip, gzip", "zstd,gzip", "compress", "x" * 500])
async def test_another_coding_is_a_415_with_the_known_ones(
    client: httpx.AsyncClient, engine: ScriptedEngine, telemetry: ScriptedTelemetry, path: str, coding: str
) -> None:
    answer = await client.post(path, content=b"?", headers=coded(coding))
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "gzip, zstd"
    error = error_of(answer)
    assert error["code"] == "unsupported_encoding"
    assert coding[:4] in error["message"]
    assert len(error["message"]) < 200
    assert len(telemetry.errors) == 1
    assert engine.requests == []


async def test_codings_in_several_headers_are_one_list(client: httpx.AsyncClient) -> None:
    headers = [("content-encoding", "gzip"), ("content-encoding", "gzip")]
    assert (await client.post("/generate", content=GZIP(HI), headers=headers)).status_code == 415


async def test_another_coding_is_refused_before_the_body_arrives(
    engine: ScriptedEngine, telemetry: ScriptedTelemetry
) -> None:
    connection = Connection("/generate", None, parts=[], headers=[(b"content-encoding", b"br")])
    await serve(engine, telemetry, connection)
    assert connection.status == 415


async def test_a_refused_coding_in_the_dialect_of_tgi(client: httpx.AsyncClient) -> None:
    answer = await client.post("/", content=b"?", headers=coded("br"))
    assert (answer.status_code, tgi_error_of(answer)[1]) == (415, "validation")


@every_post
@every_coding
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda body: HI, "is not {} data, but its header content-encoding says so"),
        (lambda body: body[:-1], "ends in the middle of its {} data"),
        (lambda body: body[:10], "ends in the middle of its {} data"),
        (lambda body: b"", "ends in the middle of its {} data"),
        (lambda body: body + b"more", "is not {} data"),
        (lambda body: body[:-4] + bytes(4), "is not {} data"),
    ],
)
async def test_a_broken_body_is_an_error_that_names_the_coding(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    path: str,
    coding: str,
    change: Callable[[bytes], bytes],
    expected: str,
) -> None:
    whole = COMPRESS[coding](json.dumps(POSTS[path]).encode())
    answer = await client.post(path, content=change(whole), headers=coded(coding))
    assert_invalid(answer)
    assert error_of(answer)["code"] == "invalid_request"
    assert expected.format(coding) in error_of(answer)["message"]
    assert engine.requests == []


async def test_a_large_zstd_window_is_refused(client: httpx.AsyncClient) -> None:
    """RFC 9659 allows 8 MB. The header of a frame can ask for gigabytes."""
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 24}
    compressor = zstd.ZstdCompressor(options=options)
    body = compressor.compress(HI) + compressor.flush()
    assert_invalid(await client.post("/generate", content=body, headers=coded("zstd")))


async def test_the_header_without_a_body_is_no_error(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers=coded("br"))).status_code == 200


async def test_an_endless_compressed_body_is_refused_while_it_arrives(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        compressor = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
        while True:
            yield compressor.compress(b" " * 1000) + compressor.flush(zlib.Z_SYNC_FLUSH)

    answer = await client.post("/v1/completions", content=endless(), headers=coded("gzip"))
    assert answer.status_code == 413
    assert check_error("/v1/completions", answer.json(), "")["code"] == "body_too_large"
