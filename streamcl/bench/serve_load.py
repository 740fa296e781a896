"""A closed loop of HTTP clients, in a process of its own: each sends its next request once it has the answer.

    python serve_load.py PORT PATH CONNECTIONS SECONDS < bodies.jsonl

Connections are kept. The first fifth of the time warms up and is not counted. It prints one JSON object: requests,
seconds, p50_ms, p99_ms, p999_ms, non_2xx, errors.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import httptools
import orjson
import uvloop


class Load:
    """What all clients have seen."""

    def __init__(self, requests: list[bytes], seconds: float) -> None:
        self.requests: Iterator[bytes] = itertools.cycle(requests)
        self.begin = time.perf_counter() + 0.2 * seconds
        self.end = time.perf_counter() + 1.2 * seconds
        self.times: list[float] = []
        self.non_2xx = 0
        self.errors = 0


class Client(asyncio.Protocol):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.parser = httptools.HttpResponseParser(self)
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self.sent = time.perf_counter()
        self.waiting = self.sent < self.load.end
        if self.waiting:
            self.transport.write(next(self.load.requests))

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        if not 200 <= self.parser.get_status_code() < 300:
            self.load.non_2xx += 1
        elif self.sent >= self.load.begin:
            self.load.times.append(now - self.sent)
        self._ask()

    def connection_lost(self, _: Exception | None) -> None:
        self.load.errors += self.waiting


def quantile(times: list[float], share: float) -> float:
    """Of sorted times; NaN of none."""
    return times[min(int(share * len(times)), len(times) - 1)] if times else float("nan")


async def run(port: int, path: str, connections: int, seconds: float, bodies: list[bytes]) -> dict[str, Any]:
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\ncontent-length: "
    load = Load([b"%b%d\r\n\r\n%b" % (head.encode(), len(body), body) for body in bodies], seconds)
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(load), "127.0.0.1", port) for _ in range(connections)]
    await asyncio.sleep(load.end - time.perf_counter())
    deadline = time.perf_counter() + 5.0
    while any(client.waiting for _, client in made) and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    load.errors += sum(client.waiting for _, client in made)  # no answer at all
    load.times.sort()
    p50, p99, p999 = (quantile(load.times, q) * 1e3 for q in (0.5, 0.99, 0.999))
    seen = {"requests": len(load.times), "seconds": seconds, "p50_ms": p50, "p99_ms": p99}
    return {**seen, "p999_ms": p999, "non_2xx": load.non_2xx, "errors": load.errors}


if __name__ == "__main__":
    port, path, connections, seconds = sys.argv[1:]
    bodies = sys.stdin.buffer.read().splitlines()
    print(orjson.dumps(uvloop.run(run(int(port), path, int(connections), float(seconds), bodies))).decode())
