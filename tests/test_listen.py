"""Connections: no client holds up the others, and each sees why it was refused."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.serving import Fixed, listening

EVENT = b'{"user": 3, "price": 1.5}'


def post(body: bytes = EVENT, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = [b"POST /v1/predict HTTP/" + version, b"host: here", b"content-type: application/json"]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), *headers, b"", body])


GET = b"GET /livez HTTP/1.1\r\nhost: here\r\n\r\n"


class Client:
    """A socket, and the answers that come back on it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.file = self.socket.makefile("rb")

    def send(self, *parts: bytes, pause_s: float = 0.0) -> Client:
        for part in parts:
            self.socket.sendall(part)
            time.sleep(pause_s)
        return self

    def answer(self, body: bool = True) -> tuple[int, dict[str, str], Any]:
        status = self.file.readline().split(b" ")
        if not status[0]:
            raise EOFError
        headers: dict[str, str] = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name] = value.strip()
        content = self.file.read(int(headers.get("content-length", 0))) if body else b""
        return int(status[1]), headers, json.loads(content) if content else None

    def refused(self) -> tuple[int, str]:
        """Status and reason of the last answer, after which the connection is closed."""
        status, headers, body = self.answer()
        assert headers["connection"] == "close"
        assert self.file.read() == b""
        return status, body["error"]["reason"]

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@contextmanager
def serving(models: Fixed | None = None, **limits: Any) -> Iterator[Callable[[], Client]]:
    """A function that connects; at the end the endpoint must still answer."""
    clients: list[Client] = []

    with listening(models or Fixed(), **limits) as endpoint:

        def connect() -> Client:
            clients.append(Client(endpoint.port))
            return clients[-1]

        yield connect
        for client in clients:
            client.close()
        deadline = time.monotonic() + 10
        while True:
            with closing(Client(endpoint.port)) as last:
                status = last.send(post()).answer()[0]
            if status == 200 or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        assert status == 200


def test_requests_sent_at_once_are_answered_in_their_order() -> None:
    with serving() as connect:
        client = connect().send(post() + GET + post(b"[]") + GET + post())
        assert [client.answer()[0] for _ in range(5)] == [200, 200, 400, 200, 200]


def test_a_request_in_pieces_is_one_request() -> None:
    with serving() as connect:
        client = connect().send(*(post()[i : i + 7] for i in range(0, len(post()), 7)), pause_s=0.002)
        assert client.answer()[0] == 200


def test_a_body_in_chunks_is_one_body() -> None:
    head = b"POST /v1/predict HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with serving() as connect:
        client = connect().send(head + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n" + GET)
        assert client.answer()[0] == client.answer()[0] == 200


def test_a_head_request_has_no_body_and_the_next_is_read() -> None:
    with serving() as connect:
        client = connect().send(GET.replace(b"GET", b"HEAD"))
        status, headers, _ = client.answer(body=False)
        assert (status, int(headers["content-length"]) > 0) == (200, True)
        assert client.send(GET).answer()[0] == 200


def test_who_waits_for_continue_is_told_to_and_who_asks_for_an_upgrade_stays_with_http_1() -> None:
    with serving() as connect:
        client = connect().send(post(EVENT, b"expect: 100-continue")[: -len(EVENT)])
        assert client.answer()[0] == 100
        assert client.send(EVENT).answer()[0] == 200
        upgrade = post(EVENT, b"connection: upgrade, http2-settings", b"upgrade: h2c", b"http2-settings: AAMAAABk")
        client.send(upgrade + GET)
        assert [client.answer()[0] for _ in range(2)] == [200, 200]


def test_http_1_0_and_connection_close_end_after_the_answer() -> None:
    with serving() as connect:
        for request in (post(version=b"1.0"), post(EVENT, b"connection: close")):
            client = connect().send(request)
            assert client.answer()[0] == 200
            assert client.file.read() == b""


def test_half_a_connection_is_still_answered() -> None:
    with serving() as connect:
        client = connect().send(post())
        client.socket.shutdown(socket.SHUT_WR)
        assert client.answer()[0] == 200
        assert client.file.read() == b""


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"GET /livez HTTP/1.1\r\n: nothing\r\n\r\n",
    ],
)
def test_what_is_no_http_is_a_400_in_json(rubbish: bytes) -> None:
    with serving() as connect:
        assert connect().send(rubbish).refused() == (400, "http")


def test_a_head_too_large_is_a_431_however_it_comes() -> None:
    with serving(max_header_bytes=1000) as connect:
        long = b"GET /livez HTTP/1.1\r\nx: " + b"y" * 2000
        assert connect().send(long + b"\r\n\r\n").refused() == (431, "too_large")
        assert connect().send(long).refused() == (431, "too_large")
        assert connect().send(b"GET /" + b"y" * 2000).refused() == (431, "too_large")
        many = b"GET /livez HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(500))
        assert connect().send(many).refused() == (431, "too_large")


def test_a_body_too_large_is_a_413_before_it_has_been_read() -> None:
    with serving(max_body_bytes=1000) as connect:
        head = b"POST /v1/predict HTTP/1.1\r\ncontent-type: application/json\r\n"
        assert connect().send(head + b"content-length: 1000000000\r\n\r\n").refused() == (413, "too_large")
        chunks = (b"100\r\n" + b" " * 256 + b"\r\n") * 10
        assert connect().send(head + b"transfer-encoding: chunked\r\n\r\n" + chunks).refused() == (413, "too_large")
        trailers = b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 100_000
        client = connect().send(head + b"transfer-encoding: chunked\r\n\r\n" + trailers)
        assert client.refused() == (431, "too_large")


def test_a_slow_request_is_a_408_and_others_are_answered_meanwhile() -> None:
    with serving(request_timeout_s=0.6) as connect:
        slow = [connect().send(post()[:n]) for n in (10, 60)]
        slow.append(connect().send(post(b" " * 1000)[:-900]))
        began = time.monotonic()
        while time.monotonic() - began < 0.4:
            for client in slow:
                client.send(b"x")  # a byte now and then is no excuse
            assert connect().send(post()).answer()[0] == 200
            time.sleep(0.05)
        for client in slow:
            assert client.refused() == (408, "timeout")
        assert time.monotonic() - began < 3.0


def test_a_silent_connection_is_closed_before_and_after_its_requests() -> None:
    with serving(request_timeout_s=0.4, keep_alive_s=0.4) as connect:
        silent, served = connect(), connect().send(post())
        assert served.answer()[0] == 200
        assert silent.file.read() == served.file.read() == b""


def test_who_never_reads_its_answers_is_cut_off() -> None:
    with serving(request_timeout_s=0.5, max_queued_instances=100_000) as connect:
        client = connect()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ask = b"GET /openapi.json HTTP/1.1\r\n\r\n" * 500
        client.socket.settimeout(5)
        with pytest.raises(OSError):
            for _ in range(10_000):
                client.socket.sendall(ask)


def test_more_connections_than_allowed_are_told_so() -> None:
    with serving(max_connections=3) as connect:
        held = [connect().send(post()) for _ in range(3)]
        assert [client.answer()[0] for client in held] == [200] * 3
        over = connect()
        status, headers, body = over.answer()
        assert (status, headers["retry-after"], body["error"]["reason"]) == (503, "1", "overloaded")
        for client in held:
            assert client.send(post()).answer()[0] == 200
            client.close()


def test_what_is_queued_beyond_the_bound_is_shed_at_once_and_the_rest_answered() -> None:
    with serving(max_instances=2, max_queued_instances=6) as connect:
        client = connect().send(post() * 20)
        statuses = [client.answer() for _ in range(20)]
        assert [status for status, _, _ in statuses].count(200) >= 6
        shed = [(headers["retry-after"], body["error"]["reason"]) for code, headers, body in statuses if code == 503]
        assert shed
        assert set(shed) == {("1", "overloaded")}
        client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
        head = client.file.readline()
        assert b"200" in head


def test_a_fault_of_the_model_is_a_500_in_json_and_the_connection_goes_on() -> None:
    with serving(Fixed(broken=True)) as connect:
        client = connect().send(post(b'{"user": 666}'))
        status, _, body = client.answer()
        assert (status, body["error"]["reason"]) == (500, "internal")
        assert client.send(GET).answer()[0] == 200


def test_a_stop_answers_what_has_come_and_closes_idle_connections() -> None:
    with listening(Fixed()) as endpoint:
        idle, asking = Client(endpoint.port), Client(endpoint.port)
        idle.send(GET).answer()
        asking.send(post()).answer()
        endpoint.stop()
        assert idle.file.read() == asking.file.read() == b""
        idle.close()
        asking.close()


def test_nobody_is_tunnelled() -> None:
    with serving() as connect:
        assert connect().send(b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: elsewhere\r\n\r\n").refused() == (405, "method")
