"""Predictions over HTTP: the endpoint on its socket, its key and its certificate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Sequence

import torch
import uvloop

from streamcl import connect, garbage
from streamcl.channel import open_reader
from streamcl.config import Config
from streamcl.endpoint import Endpoint, Models
from streamcl.follow import Follower
from streamcl.listen import BACKLOG, Server
from streamcl.outcomes import Outcomes
from streamcl.protocols import StreamclError
from streamcl.recovery import store_of
from streamcl.replica import Predictor
from streamcl.services import Serve

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""How long a snapshot that is being read may keep requests waiting at a time (s); Python's own is ten times that."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeError(StreamclError):
    """The endpoint can't listen, or its key or certificate can't be read."""


class Listening:
    """An endpoint on its socket; `run` it on any thread, `stop` it from another.

    Raises:
        ServeError: from the start, when the place is taken or the key or certificate can't be used.
    """

    def __init__(self, models: Models, config: Config) -> None:
        place = config.serve
        key, self._tls = _key(place), _tls(place)
        endpoint = Endpoint(models, config, connect.codec("json", config, "requests"), key)
        self.endpoint = endpoint
        self._server = Server(endpoint, place)
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        try:
            self._listener = socket.create_server((place.host, place.port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise ServeError(f"serve: can't listen on {place.host}:{place.port}: {error.strerror or error}") from error
        self.port: int = self._listener.getsockname()[1]
        host = f"[{place.host}]" if ":" in place.host else place.host
        self.url = f"{'https' if self._tls else 'http'}://{host}:{self.port}"
        self._stopped: asyncio.Event | None = None
        self._stopping = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        log.info("serving on %s%s", self.url, "" if key else ", without a key")
        if place.host not in LOOPBACK and not (key and self._tls):
            log.warning("serve: %s may be reached from outside, without %s", place.host, "TLS" if key else "a key")

    def run(self, *signals: signal.Signals) -> None:
        """Answer until `stop`, or one of these signals."""
        uvloop.run(self._run(signals))

    async def _run(self, signals: Sequence[signal.Signals]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        for each in signals:
            self._loop.add_signal_handler(each, self._stopped.set)
        if self._stopping.is_set():
            self._stopped.set()
        self.endpoint.tick()
        await self._server.run(self._listener, self._tls, self._stopped.wait())

    def stop(self) -> None:
        """Answer what has come, and leave."""
        self._stopping.set()
        if self._loop and self._stopped:
            with contextlib.suppress(RuntimeError):  # it has left already
                self._loop.call_soon_threadsafe(self._stopped.set)


def _key(place: Serve) -> bytes | None:
    """From the environment variable or the file that the config names."""
    if place.api_key_env is not None:
        found = os.environ.get(place.api_key_env, "")
        where = f"serve.api_key_env: {place.api_key_env}"
    elif place.api_key_file is not None:
        where = f"serve.api_key_file: {place.api_key_file}"
        try:
            found = place.api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{where}: {type(error).__name__}") from None
    else:
        return None
    if not found.strip():
        raise ServeError(f"{where}: is not set, or empty")
    return found.strip().encode()


def _tls(place: Serve) -> ssl.SSLContext | None:
    if place.ssl_certfile is None or place.ssl_keyfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty password instead of none: a key that has one is an error, not a question at the terminal.
        context.load_cert_chain(place.ssl_certfile, place.ssl_keyfile, password="")
    except (OSError, ValueError) as error:
        text = f"{place.ssl_certfile}, {place.ssl_keyfile}: {type(error).__name__}: {error}"
        raise ServeError(f"serve.ssl_certfile, serve.ssl_keyfile: {text}") from None
    return context


def serve(config: Config) -> None:
    """Answer until told to stop (SIGTERM, Ctrl-C), from the snapshots of `config`'s shard.

    Raises:
        CheckpointError: the folder, or a snapshot in it, can't be used.
        ServeError: see `Listening`.
    """
    torch.set_num_threads(config.worker.threads)
    sys.setswitchinterval(SWITCH_S)
    here = config.checkpoint.model_copy(update={"remote": None})  # fetching copies would be writing
    store = store_of(config.model_copy(update={"checkpoint": here}))
    outcomes = Outcomes(config.outcomes_url, config) if config.outcomes_url else None
    follower = Follower(open_reader(config.deltas_url, config)) if config.deltas_url else None
    predictor = Predictor(store, connect.codec("json", config, "requests"), outcomes, follower)
    predictor.refresh()
    listening = Listening(predictor, config)
    threading.Thread(target=predictor.follow, name="follow", daemon=True).start()
    garbage.spare()
    try:
        listening.run(signal.SIGTERM, signal.SIGINT)
    finally:
        predictor.close()
