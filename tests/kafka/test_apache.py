"""Apache Kafka comes up, loses brokers and finds its data again, goes away, and says why when it can't be had."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from connectors import apache
from connectors.apache import ApacheBroker, _identifier
from connectors.embedded import listens
from streamcl.protocols import ConnectorError
from tests.kafka.conftest import Cluster


def _port(bootstrap: str) -> int:
    return int(bootstrap.rpartition(":")[2])


def test_a_killed_broker_finds_its_data_again(apache_kafka: Cluster) -> None:
    with ApacheBroker() as broker:
        cluster = Cluster("apache", broker.bootstrap)
        topic = cluster.topic(2)
        cluster.produce(topic, [(1, b"kept", 1)])
        broker.kill()
        assert not listens(_port(broker.bootstrap))
        broker.restart()
        assert [each.value for each in cluster.read(topic)] == [b"kept"]
        assert broker.leader(topic) == 0
    assert not listens(_port(broker.bootstrap))


class _HangsOnce(ApacheBroker):
    """The first time it is started it stands still."""

    def _start(self, broker: int) -> None:
        super()._start(broker)
        self.starts = getattr(self, "starts", 0) + 1
        if self.starts == 1:
            self.freeze(broker)
        self._timeout_s = 0.5 if self.starts == 1 else 60.0


def test_a_broker_that_hangs_at_its_start_is_started_once_more(
    apache_kafka: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with _HangsOnce() as broker:
        assert (broker.starts, listens(_port(broker.bootstrap))) == (2, True)
    assert f"did not answer on {broker.bootstrap} within 0.5 s" in capsys.readouterr().err


def test_it_dies_with_its_parent(apache_kafka: Cluster) -> None:
    program = (
        "import os, signal\n"
        "from connectors.apache import ApacheBroker\n"
        "broker = ApacheBroker().__enter__()\n"
        "print(broker.bootstrap, broker._folder.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    bootstrap, folder = said.stdout.split()
    deadline = time.monotonic() + 5
    while listens(_port(bootstrap)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not listens(_port(bootstrap))
    subprocess.run(["rm", "-r", folder], check=True)


def test_without_java_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectorError, match="needs Java 17 or newer: java is not on the PATH"), ApacheBroker():
        pass


def test_an_old_java_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ConnectorError, match=r"Java 17 or newer; found: .*1\.8\.0_392"), ApacheBroker():
        pass


def test_without_jars_and_maven_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apache, "_require_java", lambda: None)
    monkeypatch.setattr(apache, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnectorError, match=r"is not in .*cache/4\.3\.1, and Maven \(mvn\)"), ApacheBroker():
        pass


def test_an_installed_package_keeps_the_jars_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert apache._cache() == Path(apache.__file__).parents[1] / "build" / "kafka"
    monkeypatch.setattr(apache, "_HERE", tmp_path / "site-packages" / "connectors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert apache._cache() == tmp_path / "streamcl" / "kafka"


def test_no_identifier_looks_like_an_option() -> None:
    assert not any(_identifier().startswith("-") for _ in range(2000))
