"""What the chart renders for a container, run as a process: its command, environment, files, probes and its end.

A container's paths are folders of this machine here. What Kubernetes does with it all stays unproven.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from kafka import KafkaProducer

from connectors.apache import free_ports
from connectors.embedded import EmbeddedBroker
from deploy.chart import ROOT
from streamcl.protocols import ConnectorError
from tests.components import lack
from tests.helm.conftest import Manifest, Render, Rendered
from tests.helm.test_chart import container


class Machine:
    """Where containers run: their paths below `root`, and a log for each."""

    def __init__(self, root: Path, manifests: Rendered) -> None:
        self.root = root
        self.state = root / "var" / "lib" / "streamcl"
        for folder in (self.state, root / "tmp", root / "etc" / "streamcl" / "config"):
            folder.mkdir(parents=True)
        for name, text in manifests.the("ConfigMap")["data"].items():
            (root / "etc" / "streamcl" / "config" / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        """Paths of a container as paths of this machine."""
        return re.sub(r"/(etc|var/lib)/streamcl", rf"{self.root}/\1/streamcl", text)

    @contextmanager
    def running(self, pod: Manifest) -> Iterator[str]:
        """The URL of its probes' port, once it has started; it must end by itself within its grace period."""
        its = container(pod)
        given = {each["name"]: self.here(each["value"]) for each in its["env"] if "value" in each}
        given.pop("NUMBA_CACHE_DIR")  # compiling anew would take a minute
        values = {**given, "POD_NAME": "shop-streamcl-0", "POD_INDEX": "0"}
        arguments = [self.here(re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], each)) for each in its["args"]]
        log = self.root / f"{its['name']}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "streamcl.cli", *arguments],
                cwd=self.state,
                env={"PATH": os.environ["PATH"], "HOME": str(self.state), "PYTHONPATH": str(ROOT), **values},
                stdout=output,
                stderr=output,
            )
        try:
            url = f"http://127.0.0.1:{its['ports'][0]['containerPort']}"
            until_ok(url + its["startupProbe"]["httpGet"]["path"], process, log)
            until_ok(url + its["readinessProbe"]["httpGet"]["path"], process, log)
            yield url
            assert httpx.get(url + its["livenessProbe"]["httpGet"]["path"]).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(pod["spec"]["terminationGracePeriodSeconds"]) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def until(true: Callable[[], bool], patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_ok(url: str, process: subprocess.Popen[bytes], log: Path, patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} was never well: {log.read_text()}")


def test_worker_and_replica_start_answer_and_leave_as_rendered(render: Render, tmp_path: Path) -> None:
    broker = EmbeddedBroker()
    try:
        broker.__enter__()
    except ConnectorError as error:
        lack("kafka", str(error))
    telemetry, serve = free_ports(2)
    config = {
        "predictions": f"{broker.url}/scores",
        "events": {"url": f"{broker.url}/impressions", "label": "clicked"},
        "labels": None,
        "worker": {"engine": "eager"},
        "checkpoint": {"every_events": 10},
        "telemetry": {"port": telemetry},
        "serve": {"port": serve},
    }
    manifests = render(config=config, persistence={"mode": "shared"}, replica={"enabled": True})
    machine = Machine(tmp_path, manifests)
    try:
        broker.create_topic("impressions")
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap, enable_idempotence=False, acks="all")
        for i in range(30):
            row = {"id": i, "ts": i, "user": i % 7, "item": i % 3, "price": i % 5, "clicked": i % 2}
            producer.send("impressions", json.dumps(row).encode(), timestamp_ms=i)
        producer.close()
        with machine.running(manifests.the("StatefulSet")["spec"]["template"]) as worker:
            assert "streamcl_ready 1.0" in httpx.get(f"{worker}/metrics").text
            until(lambda: any(machine.state.rglob("*-30/manifest.json")))  # all is saved; the worker rests
            before = contents(machine.state)
            with machine.running(manifests.the("Deployment")["spec"]["template"]) as replica:
                answer = httpx.post(f"{replica}/v1/predict", json={"user": 1, "item": 2, "price": 3.0, "ts": 40})
                assert 0.0 < answer.json()["predictions"][0]["score"] < 1.0
                script, *urls = container(manifests.the("Pod"))["args"]
                ports = (telemetry, telemetry, serve)
                asked = [re.sub(r"//[^/]+", f"//127.0.0.1:{port}", url) for url, port in zip(urls, ports, strict=True)]
                command = [sys.executable, "-c", script, *asked]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert (done.returncode, done.stdout.count("200 ")) == (0, 3), done.stderr
            assert contents(machine.state) == before, "a replica's mount is read-only"
    finally:
        broker.__exit__(None, None, None)
    assert list((machine.state / "checkpoints").rglob("manifest.json"))


def contents(folder: Path) -> dict[Path, int]:
    """Sizes of files, but for the claims of workers, which beat."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file() and "claims" not in path.parts}
