"""Bounds each HTTP connection before any ASGI application runs: the head of a request, its time, and unread answers.

uvicorn's own parser bounds neither the number nor the size of headers, nor the time in which they arrive.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve_app.errors import HeadersTooLarge, MalformedHttp, RequestTimeout, ServeAppError, UriTooLong

# Real clients send up to 30 headers with at most 6 kB. HAProxy allows 101 headers and about 15 kB for the whole head.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16_384
MAX_URI_BYTES = 8_192
# HAProxy has the same limit (`haproxy.py`).
_HEAD_S = 10.0
# After a refusal the connection reads for this time and discards what it reads. If it was closed at once, the kernel
# would reset it, and the client would lose the answer.
_LINGER_S = 1.0


def _ignore(error: ServeAppError) -> None:
    """No metric counts the refusals of Ray's own proxy, whose process has no registry."""


@dataclass(slots=True)
class ServerLimits:
    """Bounds of the HTTP server of this process, and what it calls with each of its refusals.

    The process of an ingress sets them to the `limits` of the configuration. The defaults are for Ray Serve's Python
    proxy, which does not know the configuration.
    """

    max_body_bytes: int = 64 * 2**20
    stalled_client_s: float = 60.0
    refused: Callable[[ServeAppError], None] = _ignore


LIMITS = ServerLimits()


def install() -> None:
    """Make every uvicorn server of this process that starts from now on use the protocol.

    Ray Serve creates uvicorn's configuration itself and leaves its option `http` at `auto`.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedProtocol"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds.

    - A head with more than MAX_HEADERS headers, MAX_HEADER_BYTES bytes of headers or MAX_URI_BYTES bytes of path and
      query is refused with status 431 or 414. At most one read of the socket, 256 KiB, is buffered beyond the bounds.
    - A head that is not complete within 10 s is refused with status 408. A connection that sends nothing in this time
      is closed.
    - A client that takes no byte of an answer for `LIMITS.stalled_client_s` is disconnected.
    - WebSockets are not accepted.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _head_bytes = 0
    _error: ServeAppError | None = None
    _refused = False
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._refused or self.transport.is_closing():
            return
        if self._in_head:
            # The parser reports a header when it is complete. Until then only its size is known.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES + MAX_URI_BYTES:
                self._refuse(_too_large())
        elif self._idle():  # empty lines before a request
            self._start_head_timer()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._start_head_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URI_BYTES:
            raise self._fault(
                UriTooLong(f"The path and the query have more than {MAX_URI_BYTES} bytes. Send data in the body.")
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise self._fault(HeadersTooLarge(f"The request has more than {MAX_HEADERS} headers. Send fewer."))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            raise self._fault(_too_large())
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for every error of the parser, also for one of the callbacks above."""
        self._refuse(self._error or MalformedHttp("The request is not valid HTTP/1.1. Send it with an HTTP library."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._untaken()
        self._start_stall_timer()

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """A request for an upgrade is answered without it, and needs no warning in the log."""

    def _fault(self, error: ServeAppError) -> ServeAppError:
        """Keep the error: the parser replaces an exception of a callback by its own."""
        self._error = error
        return error

    def _refuse(self, error: ServeAppError) -> None:
        """Answer with an error, unless an earlier answer of the connection is not complete, and close."""
        self._refused = True
        self._stop_head_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._in_head or cycle.response_started:
                self.transport.close()  # an answer here would look like a part of the earlier one
                return
            cycle.disconnected = True  # the error is in the body of the request that `cycle` answers
            cycle.message_event.set()
        LIMITS.refused(error)
        self.transport.write(_answer(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def _idle(self) -> bool:
        return (self.cycle is None or self.cycle.response_complete) and self.timeout_keep_alive_task is None

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self._refused:
            return
        if self._in_head and self.flow.read_paused:
            self._start_head_timer()  # a request before this one is in progress, and the head waits in the socket
        elif self._in_head:
            self._refuse(RequestTimeout(f"The headers did not arrive within {_HEAD_S:g} s. Send them without pauses."))
        elif self._idle():
            self.transport.close()

    def _start_stall_timer(self) -> None:
        self._stall_timer = self.loop.call_later(LIMITS.stalled_client_s, self._check_stall)

    def _check_stall(self) -> None:
        """Disconnect the client if it has taken no byte since the timer was started."""
        before, self._unsent = self._unsent, self._untaken()
        if self._unsent >= before:
            self.transport.abort()
        else:
            self._start_stall_timer()

    def _untaken(self) -> int:
        """The bytes that the client's system has not accepted: those of the transport, and of the kernel's buffer.

        The kernel asks for more only when a third of its buffer, which can have 4 MB, is empty.
        """
        connection = self.transport.get_extra_info("socket")
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        return self.transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])


def _too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"The headers have more than {MAX_HEADER_BYTES} bytes. Send shorter ones.")


def error_body(error: ServeAppError) -> bytes:
    """The error as the clients of every dialect read it: the dialect is not known before the head is."""
    details = {"type": "invalid_request_error", "code": error.code, "message": error.message, "param": None}
    return json.dumps({"type": "error", "error": details}, separators=(",", ":")).encode()


def _answer(error: ServeAppError) -> bytes:
    body = error_body(error)
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[error.status] + head.encode() + body
