"""HTTP/1.1 connections: limits, deadlines and order, so that no client can hold up the others.

A connection reads requests and hands each whole one over; answers may come in any order and leave in that of the
requests. A sweep closes what is past its deadline: whoever sends a request byte by byte, or never reads its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, Protocol, cast

import httptools
import orjson

from streamcl.services import Serve

log = logging.getLogger(__name__)

SWEEP_S = 0.25
LINGER_S = 2.0
"""How long what a refused client still sends is read and dropped: closed at once, it would not see why."""
DRAIN_S = 5.0
"""How long a stop waits for answers under way."""
BACKLOG = 2048
"""Connections that wait to be accepted (count)."""
JSON = b"application/json"


class Request(NamedTuple):
    """A whole request; the names of headers are in lower case. `arrived_s` is of the loop's clock."""

    method: bytes
    path: bytes
    headers: Mapping[bytes, bytes]
    body: bytes
    arrived_s: float


class Answer(NamedTuple):
    status: int
    body: bytes
    media_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


Reply = Callable[[Answer], None]


class Handler(Protocol):
    """Who answers. Both are called on the loop's thread, and `handle` calls `reply` once, then or later."""

    def handle(self, request: Request, reply: Reply) -> None: ...

    def refused(self, status: int) -> None:
        """A connection was answered with this without a whole request having come."""

    def tick(self) -> None:
        """Called four times a second."""


def refusal(status: int, reason: str, text: str, *headers: tuple[bytes, bytes]) -> Answer:
    """`{"error": {"reason", "message"}}`."""
    return Answer(status, orjson.dumps({"error": {"reason": reason, "message": text}}), headers=headers)


BUSY = refusal(503, "overloaded", "too many requests at once; try again", (b"retry-after", b"1"))


BROKEN = refusal(500, "internal", "a fault of the server; its log says more")


@dataclass(slots=True)
class Slot:
    """The place of one answer in a connection's order."""

    keep_alive: bool
    body: bool  # false for HEAD
    answer: Answer | None = None


class Connection(asyncio.Protocol):
    """One client's connection.

    Attributes:
        deadline: When the sweep closes it (s, of the loop's clock); infinite while only an answer of ours is due.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.limits = server.limits
        self.clock = server.loop.time
        self.parser = httptools.HttpRequestParser(self)
        self.slots: deque[Slot] = deque()
        self.deadline = self.clock() + self.limits.request_timeout_s
        self.reading = False  # a request has begun and isn't whole
        self.seen_bytes = 0  # of the request under way, as they came
        self.allowed_bytes = self.limits.max_header_bytes
        self.body_bytes = 0
        self.paused = False  # the client doesn't read its answers
        self.half = False  # the client has said that it sends no more
        self.ended = False  # nothing more is taken in: an answer that closes the connection is written or due

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        held, most = len(self.server.connections), self.limits.max_connections
        self.server.connections.add(self)
        if held >= 2 * most:  # not even the refused have room to read why
            self.transport.abort()
        elif held >= most:
            self._refuse(BUSY)

    def connection_lost(self, _: Exception | None) -> None:
        self.server.connections.discard(self)
        self.ended = True

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        self.seen_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError:
            log.exception("while taking a request in")
            self._refuse(BROKEN)
        except httptools.HttpParserError:
            self._refuse(refusal(400, "http", "not an HTTP/1.1 request"))
        else:
            if self.reading and self.seen_bytes > self.allowed_bytes:
                self._head_too_large()

    def eof_received(self) -> bool:
        """Half a connection stays open as long as answers are due; with TLS there are no halves."""
        if self.slots and self.transport.can_write_eof():
            self.ended = self.half = True
            self.slots[-1].keep_alive = False
            return True
        return False

    def pause_writing(self) -> None:
        self.paused = True
        self.transport.pause_reading()
        self.deadline = self.clock() + self.limits.request_timeout_s

    def resume_writing(self) -> None:
        self.paused = False
        self.transport.resume_reading()
        self._rest()

    # the parser's side

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers: dict[bytes, bytes] = {}
        self.header_bytes = 0
        self.body: list[bytes] = []
        self.body_bytes = 0
        self.reading, self.allowed_bytes = True, self.limits.max_header_bytes
        if not self.ended:
            self.deadline = self.clock() + self.limits.request_timeout_s

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value
        self.header_bytes += len(name) + len(value)
        if self.header_bytes > self.limits.max_header_bytes:  # those behind a body in chunks too
            self._head_too_large()

    def on_headers_complete(self) -> None:
        # Chunks have heads of their own, whose number is the client's to choose.
        self.allowed_bytes += len(self.url) + 4 * self.limits.max_body_bytes
        if len(self.url) > self.limits.max_header_bytes:
            self._head_too_large()
        elif int(self.headers.get(b"content-length", b"0")) > self.limits.max_body_bytes:
            self._body_too_large()
        elif self.headers.get(b"expect", b"").lower() == b"100-continue" and not self.slots:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.body.append(body)
        self.body_bytes += len(body)
        if self.body_bytes > self.limits.max_body_bytes:
            self._body_too_large()

    def on_message_complete(self) -> None:
        if self.ended or self.parser.should_upgrade():
            return
        self.seen_bytes, self.reading = 0, False
        self.deadline = float("inf")
        method, keep = self.parser.get_method(), self.parser.should_keep_alive() and not self.server.stopping
        slot = Slot(keep, method != b"HEAD")
        self.slots.append(slot)
        self.ended = not keep
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        request = Request(method, _path(self.url), self.headers, body, self.clock())
        try:
            self.server.handler.handle(request, lambda answer: self._answered(slot, answer))
        except Exception:  # whatever it is, the others are still answered
            log.exception("while answering %r", request.path)
            self._answered(slot, BROKEN)

    # ours

    def _stay(self, rest: bytes) -> None:
        """A client asks for another protocol, and may be answered in this one: as if it had not asked.

        The parser has left the body alone, so it reads the head again, without the wish.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(refusal(405, "method", "no proxy"))
            return
        fields = b"".join(b"%b: %b\r\n" % each for each in self.headers.items() if each[0] != b"upgrade")
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, fields, rest))

    def _head_too_large(self) -> None:
        most = self.limits.max_header_bytes
        self._refuse(refusal(431, "too_large", f"the head of a request may have {most} bytes"))

    def _body_too_large(self) -> None:
        self._refuse(refusal(413, "too_large", f"a body may have {self.limits.max_body_bytes} bytes"))

    def _refuse(self, answer: Answer) -> None:
        """The last answer of this connection, to something that is not a whole request."""
        if self.ended:
            return
        self.server.handler.refused(answer.status)
        self.ended = True
        slot = Slot(keep_alive=False, body=True)
        self.slots.append(slot)
        self._answered(slot, answer)

    def _answered(self, slot: Slot, answer: Answer) -> None:
        slot.answer = answer
        if self.transport.is_closing():
            return
        while self.slots and (ready := self.slots[0].answer):
            head = self.slots.popleft()
            self.transport.write(_encoded(ready, head, self.server.date))
            if not head.keep_alive:
                self._linger()
                return
        self._rest()

    def _rest(self) -> None:
        """Set the deadline anew once nothing is due from us."""
        if not self.slots and not self.reading and not self.ended:
            self.deadline = self.clock() + (self.limits.request_timeout_s if self.paused else self.limits.keep_alive_s)

    def _linger(self) -> None:
        """No more answers: close as soon as the client does, for then it has read the last one."""
        self.ended = True
        self.slots.clear()
        self.deadline = self.clock() + LINGER_S
        if self.half:
            self.transport.close()
        elif self.transport.can_write_eof():
            self.transport.write_eof()

    def late(self) -> None:
        """The deadline has passed."""
        if self.reading and not self.ended:
            most = self.limits.request_timeout_s
            self._refuse(refusal(408, "timeout", f"a request must be whole within {most:g} s"))
        elif self.ended or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()
            self.deadline = self.clock() + LINGER_S
            self.ended = True

    def stop(self) -> None:
        """Answer what has come, and nothing more."""
        if self.slots:
            self.ended = True
            self.slots[-1].keep_alive = False
        elif not self.ended:
            self.ended = True
            self.transport.close()


def _path(url: bytes) -> bytes:
    """Without the query; of a proxy's absolute form, what follows the host."""
    if not url.startswith(b"/") and b"://" in url:
        _, slash, rest = url.partition(b"://")[2].partition(b"/")
        url = slash + rest
    return url.partition(b"?")[0]


_STATUS = {int(status): f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def _encoded(answer: Answer, slot: Slot, date: bytes) -> bytes:
    extra = b"".join(b"%b: %b\r\n" % header for header in answer.headers)
    return b"%bdate: %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
        *(_STATUS[answer.status], date, answer.media_type, len(answer.body), extra),
        *(b"" if slot.keep_alive else b"connection: close\r\n", answer.body if slot.body else b""),
    )


class Server:
    """Listens until its `stopped` is set, then answers what it has and leaves.

    Args:
        handler: Who answers.
        limits: Of each connection and of all.
    """

    def __init__(self, handler: Handler, limits: Serve) -> None:
        self.handler = handler
        self.limits = limits
        self.connections: set[Connection] = set()
        self.stopping = False
        self.date = b""
        self.loop: asyncio.AbstractEventLoop

    async def run(self, listener: socket.socket, tls: ssl.SSLContext | None, stopped: Awaitable[object]) -> None:
        self.loop = asyncio.get_running_loop()
        self.date = formatdate(usegmt=True).encode()
        patience_s = self.limits.request_timeout_s if tls else None
        listening = await self.loop.create_server(
            lambda: Connection(self), sock=listener, ssl=tls, backlog=BACKLOG, ssl_handshake_timeout=patience_s
        )
        sweeping = asyncio.create_task(self._sweep())
        try:
            await stopped
        finally:
            self.stopping = True
            listening.close()
            for connection in list(self.connections):
                connection.stop()
            deadline = self.loop.time() + DRAIN_S
            while self.connections and self.loop.time() < deadline:
                await asyncio.sleep(0.02)
            for connection in list(self.connections):
                connection.transport.abort()
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.date = formatdate(usegmt=True).encode()
            now = self.loop.time()
            for connection in [each for each in self.connections if each.deadline < now]:
                connection.late()
            self.handler.tick()
