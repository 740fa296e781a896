"""A TCP proxy that breaks a network on demand: brokers advertise its port, and all a client says goes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

Mode = Literal["ok", "refuse", "stall", "delay"]

_CHUNK_BYTES = 64 << 10


class Proxy:
    """From `port` to `target`, both on loopback; starts in mode "ok".

    - refuse: nobody listens, connections are gone.
    - stall: connections stay open, and new ones are taken, but nothing comes through: a cut cable.
    - delay: everything arrives `delay_s` later, in each direction; nothing else changes.
    """

    def __init__(self, port: int, target: int, delay_s: float = 0.1) -> None:
        self.port, self._target, self._delay_s = port, target, delay_s
        self._mode: Mode = "ok"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()

    def set(self, mode: Mode) -> None:
        self._run(self._set(mode))

    def reset(self) -> None:
        """Every connection ends with RST; new ones work."""
        self._run(self._drop())

    def __enter__(self) -> Self:
        self._thread.start()
        self.set("ok")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set("refuse")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        (self._open.clear if mode == "stall" else self._open.set)()
        if mode == "refuse" and self._server:
            self._server.close()
            self._server = None
            await self._drop()
        elif mode != "refuse" and not self._server:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _drop(self) -> None:
        for writer in self._writers:
            with suppress(OSError):
                lingering = struct.pack("ii", 1, 0)  # close sends RST
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(back)
            try:
                await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer))
            finally:
                self._end(back)
        except OSError:
            pass  # the broker is away, so the client shall see its connection end
        finally:
            self._end(writer)

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.transport.abort()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until either end is gone; what was read waits for its time in a queue, so that delay is no throttle."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        feeding = asyncio.create_task(self._feed(reader, waiting.put))
        try:
            while True:
                due, data = await waiting.get()
                if not data:
                    raise ConnectionResetError
                await asyncio.sleep(due - self._loop.time())
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        finally:
            feeding.cancel()

    async def _feed(self, reader: asyncio.StreamReader, put: Callable[[tuple[float, bytes]], Any]) -> None:
        data = b"more"
        while data:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except OSError:
                data = b""
            await put((self._loop.time() + (self._delay_s if self._mode == "delay" else 0.0), data))
