"""Apache Kafka on loopback for tests and benchmarks: one broker or three, to be killed, frozen and started again.

It is the real one, from Maven Central: it needs Java 17 or newer, and Maven the first time. Its jars are kept in
`build/kafka` of a checkout, else in the user's cache folder. What it stores lives as long as the context: a broker
that is killed and restarted finds its data again.
"""

from __future__ import annotations

import base64
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from kafka import KafkaAdminClient
from kafka import errors as kafka_errors

from connectors.embedded import die_with_parent, listens
from streamcl.protocols import ConnectorError

VERSION = "4.3.1"
JAVA_AT_LEAST = 17

_HERE = Path(__file__).parent
_JVM = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_LOGIN = "org.apache.kafka.common.security"
# Below what the kernel hands out for outgoing connections: a client that knocks at a dead broker would take its port.
_PORTS = range(15_000, 32_000)


@dataclass(frozen=True, slots=True)
class Listener:
    """One way in. `keystore` (key and certificate chain) and `truststore` (authorities) are PEM files, for TLS.

    Attributes:
        advertised: Port by broker that clients are sent to instead: a proxy's.
    """

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    keystore: Path | None = None
    truststore: Path | None = None
    client_certificate: bool = False
    advertised: Sequence[int] = ()


class _SilentError(ConnectorError):
    """A broker that lives and does not answer; with its threads."""


class ApacheBroker:
    """One broker or three of Apache Kafka on free ports of loopback, for as long as the context lasts.

        with ApacheBroker(brokers=3) as broker:
            broker.create_topic("clicks", 4)
            broker.kill(broker.leader("clicks"))

    Brokers are numbered from 0. With three, topics have three replicas and a write needs two of them. They die with
    the thread that started them, even when that is killed, so start (and restart) them from one that lives as long.

    Args:
        listeners: By name, in capitals, beside PLAINTEXT, which is always there.
        proxies: A port by broker where a proxy stands: adds a listener PROXY whose clients are sent there.
        users: Password by name, for the listeners with SASL (PLAIN, SCRAM; OAUTHBEARER takes any unsigned token).
        timeout_s: A broker must answer within it.

    Raises:
        ConnectorError: Java or Maven is missing, the jars can't be had, or it does not come up within `timeout_s`.
    """

    def __init__(
        self,
        brokers: Literal[1, 3] = 1,
        listeners: Mapping[str, Listener] | None = None,
        users: Mapping[str, str] | None = None,
        proxies: Sequence[int] = (),
        timeout_s: float = 60.0,
    ) -> None:
        self._listeners = {"PLAINTEXT": Listener()} | dict(listeners or {})
        if proxies:
            self._listeners["PROXY"] = Listener(advertised=proxies)
        self._users = dict(users or {})
        self._timeout_s = timeout_s
        ports = iter(free_ports(brokers * (len(self._listeners) + 1)))
        self._ports = [{name: next(ports) for name in (*self._listeners, "CONTROLLER")} for _ in range(brokers)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._folder: tempfile.TemporaryDirectory[str]

    @property
    def bootstrap(self) -> str:
        return self.listener("PLAINTEXT")

    @property
    def url(self) -> str:
        """What stands before `/topic`."""
        return f"kafka://{self.bootstrap}"

    @property
    def pid(self) -> int:
        """Of the first broker."""
        return self._processes[0].pid

    @property
    def brokers(self) -> int:
        return len(self._ports)

    def listener(self, name: str) -> str:
        """Its addresses, `host:port[,host:port]`, by broker; behind a proxy the real ones."""
        return ",".join(f"127.0.0.1:{ports[name]}" for ports in self._ports)

    def create_topic(self, name: str, partitions: int = 1) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap.split(","))
        try:
            admin.create_topics({name: {"num_partitions": partitions}}, wait_for_metadata=True)
        finally:
            admin.close()

    def leader(self, topic: str, partition: int = 0) -> int:
        """The broker that leads it, -1 when none does."""
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap.split(","))
        try:
            [found] = admin.describe_topics([topic])
        finally:
            admin.close()
        return next(int(p["leader_id"]) for p in found["partitions"] if p["partition_index"] == partition)

    def kill(self, broker: int = 0) -> None:
        """As kill -9 does; returns when it is gone."""
        self._processes[broker].kill()
        self._processes[broker].wait()

    def restart(self, broker: int = 0) -> None:
        """On its old data; returns when it answers."""
        self.kill(broker)
        self._start(broker)
        self._await([broker])

    def freeze(self, broker: int = 0) -> None:
        """It neither answers nor closes its connections, until `thaw`."""
        self._processes[broker].send_signal(signal.SIGSTOP)

    def thaw(self, broker: int = 0) -> None:
        self._processes[broker].send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        _require_java()
        _jars()
        self._folder = tempfile.TemporaryDirectory(prefix="streamcl-kafka-")
        try:
            self._format()
            for broker in range(self.brokers):
                self._start(broker)
            try:
                self._await(range(self.brokers))
            except _SilentError as silent:  # one start in a thousand hangs, alive and without a word
                print(f"{silent}; it is started once more", file=sys.stderr)
                for broker in range(self.brokers):
                    self.kill(broker)
                    self._start(broker)
                self._await(range(self.brokers))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._folder.cleanup()

    def _home(self, broker: int) -> Path:
        return Path(self._folder.name) / str(broker)

    def _format(self) -> None:
        """The first broker's storage by Kafka's tool; the others' is a copy of it with another name."""
        for broker in range(self.brokers):
            self._home(broker).mkdir()
            lines = [(_HERE / "apache.properties").read_text(encoding="utf-8")]
            lines += [f"{key}={value}" for key, value in self._properties(broker).items()]
            (self._home(broker) / "server.properties").write_text("\n".join(lines), encoding="utf-8")
        command = ["kafka.tools.StorageTool", "format", "-t", _identifier(), "-c", "server.properties"]
        for user, password in self._users.items():
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                command += ["--add-scram", f"{mechanism}=[name={user},password={password}]"]
        done = subprocess.run(  # noqa: S603 - Java on our own jars, no shell
            _java(*command), cwd=self._home(0), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConnectorError(f"Apache Kafka can't format its storage: {(done.stdout + done.stderr).strip()[-500:]}")
        for broker in range(1, self.brokers):
            data = shutil.copytree(self._home(0) / "data", self._home(broker) / "data")
            meta = (data / "meta.properties").read_text(encoding="utf-8")
            meta = re.sub(r"node\.id=.*", f"node.id={broker}", meta)
            meta = re.sub(r"directory\.id=.*", f"directory.id={_identifier()}", meta)
            (data / "meta.properties").write_text(meta, encoding="utf-8")

    def _properties(self, broker: int) -> dict[str, str]:
        replicas, quorum = str(self.brokers), str(self.brokers // 2 + 1)
        ports = self._ports[broker]
        bound = {name: f"{name}://127.0.0.1:{port}" for name, port in ports.items()}
        voters = (f"{i}@127.0.0.1:{each['CONTROLLER']}" for i, each in enumerate(self._ports))
        found = {
            "node.id": str(broker),
            "log.dirs": str(self._home(broker) / "data"),
            "controller.quorum.voters": ",".join(voters),
            "listeners": ",".join(bound.values()),
            "advertised.listeners": ",".join(self._advertised(broker)),
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,"
            + ",".join(f"{name}:{each.protocol}" for name, each in self._listeners.items()),
            "default.replication.factor": replicas,
            "min.insync.replicas": quorum,
        }
        for topic in ("transaction.state.log", "share.coordinator.state.topic"):
            found |= {f"{topic}.replication.factor": replicas, f"{topic}.min.isr": quorum}
        found["offsets.topic.replication.factor"] = replicas
        for name, each in self._listeners.items():
            found |= {f"listener.name.{name.lower()}.{key}": value for key, value in self._security(each)}
        return found

    def _advertised(self, broker: int) -> Iterator[str]:
        for name, listener in self._listeners.items():
            port = listener.advertised[broker] if listener.advertised else self._ports[broker][name]
            yield f"{name}://127.0.0.1:{port}"

    def _security(self, listener: Listener) -> Iterator[tuple[str, str]]:
        for store, path in (("keystore", listener.keystore), ("truststore", listener.truststore)):
            if path is not None:
                yield f"ssl.{store}.type", "PEM"
                yield f"ssl.{store}.location", str(path)
        if listener.client_certificate:
            yield "ssl.client.auth", "required"
        if listener.protocol.startswith("SASL"):
            users = " ".join(f'user_{user}="{password}"' for user, password in self._users.items())
            yield "plain.sasl.jaas.config", f"{_LOGIN}.plain.PlainLoginModule required {users};"
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                yield f"{mechanism}.sasl.jaas.config", f"{_LOGIN}.scram.ScramLoginModule required;"
            claim = 'unsecuredLoginStringClaim_sub="broker"'
            yield "oauthbearer.sasl.jaas.config", f"{_LOGIN}.oauthbearer.OAuthBearerLoginModule required {claim};"

    def _start(self, broker: int) -> None:
        with (self._home(broker) / "log").open("ab") as output:
            self._processes[broker] = subprocess.Popen(  # noqa: S603 - Java on our own jars, no shell
                _java("kafka.Kafka", "server.properties"),
                cwd=self._home(broker),
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for us: what we still send needs a broker
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )

    def _await(self, started: Sequence[int]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not all(self._answers(broker, started) for broker in started):
            dead = [broker for broker in started if self._processes[broker].poll() is not None]
            if dead:
                raise ConnectorError(f"Apache Kafka did not come up on {self.bootstrap}: {self._said(dead[0])[-2000:]}")
            if time.monotonic() > deadline:
                silent = next((each for each in started if not self._answers(each, started)), started[0])
                self._processes[silent].send_signal(signal.SIGQUIT)  # Java says what each of its threads waits for
                time.sleep(1.0)
                raise _SilentError(
                    f"Apache Kafka did not answer on {self.bootstrap} within {self._timeout_s:g} s:"
                    f" {self._said(silent) or 'silent'}"
                )
            time.sleep(0.1)

    def _said(self, broker: int) -> str:
        return (self._home(broker) / "log").read_text(encoding="utf-8", errors="replace").strip()

    def _answers(self, broker: int, others: Sequence[int]) -> bool:
        """Whether it serves, and knows the others."""
        if not listens(self._ports[broker]["PLAINTEXT"]):
            return False
        address = f"127.0.0.1:{self._ports[broker]['PLAINTEXT']}"
        try:
            admin = KafkaAdminClient(bootstrap_servers=address, bootstrap_timeout_ms=1000, request_timeout_ms=2000)
        except kafka_errors.KafkaError:
            return False
        try:
            return {each["broker_id"] for each in admin.describe_cluster()["brokers"]} >= set(others)
        except kafka_errors.KafkaError:
            return False
        finally:
            admin.close()


def _java(*arguments: str) -> list[str]:
    quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=error"
    return ["java", *_JVM, quiet, "-cp", f"{_jars()}/*", *arguments]


def _require_java() -> None:
    if shutil.which("java") is None:
        raise ConnectorError(f"Apache Kafka needs Java {JAVA_AT_LEAST} or newer: java is not on the PATH")
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr  # noqa: S607 - the user's own Java
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    if found is None or int(found[1]) < JAVA_AT_LEAST:
        raise ConnectorError(f"Apache Kafka needs Java {JAVA_AT_LEAST} or newer; found: {said.strip()[:100] or 'none'}")


def _jars() -> Path:
    """The folder of Kafka's jars, filled by Maven the first time; several processes may ask at once."""
    folder = _cache() / VERSION
    if folder.exists():
        return folder
    if shutil.which("mvn") is None:
        raise ConnectorError(
            f"Apache Kafka {VERSION} is not in {folder}, and Maven (mvn), which fetches it, is missing"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={partial}"]
    done = subprocess.run(  # noqa: S603 - the user's own Maven, no shell
        ["mvn", "-q", "-B", "-f", str(_HERE / "apache_pom.xml"), *goal],  # noqa: S607 - the user's own Maven
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConnectorError(f"Maven can't fetch Apache Kafka {VERSION}: {(done.stdout + done.stderr).strip()[-300:]}")
    partial.rename(folder)


def _cache() -> Path:
    checkout = _HERE.parent
    if (checkout / "pyproject.toml").exists():
        return checkout / "build" / "kafka"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamcl" / "kafka"


def _identifier() -> str:
    """A random id as Kafka writes it; like Kafka's own never one that begins as an option of a command does."""
    while (found := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return found


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ConnectorError(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop}")
